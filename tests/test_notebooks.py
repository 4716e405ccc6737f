"""The notebooks of `examples/`: valid, without outputs, and run on a CPU with `demo`."""

import ast
import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def code_of(notebook: dict) -> list[str]:
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def find_imports(cell: str) -> list[tuple[str, str]]:
    """Module and name of everything that is imported from csm_jax, and the names used of it."""
    found = []
    for node in ast.walk(ast.parse(cell)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("csm_jax"):
            found += [(str(node.module), alias.name) for alias in node.names]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += [("csm_jax", node.attr)] if node.value.id == "csm_jax" else []
    return found


def test_there_are_three_notebooks():
    names = [path.name for path in NOTEBOOKS]
    assert names == ["colab_tpu.ipynb", "finetune_tpu.ipynb", "research.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_have_no_outputs_and_use_what_exists(path):
    notebook = read(path)
    for cell in notebook["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    assert f"blob/main/examples/{path.name})" in "".join(notebook["cells"][0]["source"])
    used = [name for cell in code_of(notebook) for name in find_imports(cell)]
    assert len(used) > 3
    for module, name in used:
        has_name = hasattr(importlib.import_module(module), name)
        assert has_name or importlib.util.find_spec(f"{module}.{name}"), f"{module}.{name}"
    # Each has to install and to load: Colab opens one file.
    assert code_of(notebook)[:2] == code_of(read(NOTEBOOKS[0]))[:2]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_valid(path):
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(path, as_version=4))


def run_setup(monkeypatch, tmp_path, **installed: str) -> list[str]:
    """Runs the first cell where csm_jax is missing; returns the arguments of pip."""
    calls = []
    versions = dict(installed)

    def pip(arguments, check):
        calls.append(arguments)
        versions["jax"] = "0.10.2"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("subprocess.run", pip)
    monkeypatch.setattr("importlib.metadata.version", lambda name: versions.get(name, "1"))
    exec(code_of(read(NOTEBOOKS[0]))[0], {"__name__": "cell"})  # noqa: S102, the cell is under test
    return calls[0]


def test_the_first_cell_asks_for_a_restart_if_an_older_jax_is_loaded(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"older versions of jax: .*Restart session"):
        run_setup(monkeypatch, tmp_path, jax="0.7.2")
    arguments = run_setup(monkeypatch, tmp_path, jax="0.10.2")
    assert arguments[:4] == [sys.executable, "-m", "pip", "install"]
    assert arguments[-1].startswith("csm-jax[")
    assert "train] @ git+https://" in arguments[-1]


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_from_top_to_bottom(path, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))  # without a token
    monkeypatch.delenv("HF_TOKEN", raising=False)
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    if kept := os.environ.get("CSM_JAX_KEEP_NOTEBOOKS"):
        nbformat.write(notebook, Path(kept) / path.name)
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    assert not [out for out in outputs if out.output_type == "error"]
    printed = "".join(out.text for out in outputs if out.output_type == "stream")
    assert "demo on" in printed
    shown = {kind for out in outputs if "data" in out for kind in out.data}
    assert {"image/png", "text/html"} <= shown
