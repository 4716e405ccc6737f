"""Imports go downwards only, and never in a circle."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the lowest layer to the highest; a module imports its own layer and lower ones. A package
# stands for all its modules that are not in the list themselves.
LAYERS = """
csm_jax.errors
csm_jax.io
csm_jax.config
csm_jax.model
csm_jax.mimi
csm_jax.prompt
csm_jax.checkpoints
csm_jax.convert
csm_jax.loading.hub
csm_jax.loading
csm_jax.watermark
csm_jax.inference
csm_jax.train
csm_jax.cli
csm_jax
csm_jax.serve
csm_jax.evaluate
csm_jax.align
csm_jax.serve.ray_app csm_jax.serve.__main__ csm_jax.evaluate.__main__ csm_jax.convert.__main__
csm_jax.align.__main__ csm_jax.watermark.__main__
csm_jax.generate csm_jax.finetune csm_jax.benchmark
""".strip().splitlines()

RANKS = {module: rank for rank, line in enumerate(LAYERS) for module in line.split()}


def _find_modules() -> dict[str, Path]:
    """All modules by name; `convert/` is installed as `csm_jax.convert`."""
    found = {}
    for folder, package in (("csm_jax", "csm_jax"), ("convert", "csm_jax.convert")):
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *inside]).removesuffix(".__init__")] = path
    return found


MODULES = _find_modules()


def _find_imports(module: str) -> Iterator[str]:
    """What a module imports: at its top, inside of functions and for type checkers."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else str(node.module)


# Module -> the modules of this project that it imports.
IMPORTS = {module: {*_find_imports(module)} & {*MODULES} - {module} for module in MODULES}


def _rank(module: str) -> int:
    """The place of a module's layer in the list."""
    layer = module
    while layer not in RANKS:
        layer = layer.rpartition(".")[0]
    assert layer != "csm_jax" or module == layer, f"{module} has no layer: add it to LAYERS"
    return RANKS[layer]


def test_every_layer_is_a_package_or_module():
    assert set(RANKS) <= set(MODULES)


def test_no_module_imports_a_higher_layer():
    upwards = [
        f"{module} imports {imported}"
        for module in MODULES
        for imported in IMPORTS[module]
        if _rank(imported) > _rank(module)
    ]
    assert not upwards


def test_no_modules_import_each_other_in_a_circle():
    assert_no_circle(IMPORTS)


def test_no_packages_import_each_other_in_a_circle():
    """But for their `__main__`, which are commands and import what they like."""

    def package(module: str) -> str:
        return ".".join(module.split(".")[:2])

    packages: dict[str, set[str]] = {}
    for module, imported in IMPORTS.items():
        if module != "csm_jax" and not module.endswith(".__main__"):
            others = {package(each) for each in imported} - {package(module), "csm_jax"}
            packages.setdefault(package(module), set()).update(others)
    assert_no_circle(packages)


def assert_no_circle(imports: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" is imported by ".join(error.args[1]))
