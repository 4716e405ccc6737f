"""Measures the memory that a conversion takes, with the largest tensors of a model.

    python examples/conversion_memory.py [--config=miso_8b] [--layers=1] [--dtype=bfloat16] ...

A checkpoint in Sesame's layout is written as a hole (float32 zeros that take no space), with all
tensors of the model but for most layers: those are converted one after the other, so the memory
does not depend on their number. The program prints a JSON line: bytes of the checkpoint, the peak
of the memory that the process has for itself, and the peak with the pages of files that it maps,
which are the kernel's cache.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

import csm_jax
from csm_jax.checkpoints.native_format import flatten, param_shapes
from csm_jax.config import CSMConfig
from csm_jax.convert import csm, mimi
from csm_jax.convert.rules import Table, invert
from csm_jax.prompt.tokenizer import byte_tokenizer

CONFIGS = {"csm_1b": csm_jax.csm_1b(), "miso_8b": csm_jax.miso_8b()}
SAMPLE_SECONDS = 0.005


def shorten(config: CSMConfig, num_layers: int) -> CSMConfig:
    stacks = {
        name: dataclasses.replace(getattr(config, name), num_layers=num_layers)
        for name in ("backbone", "depth_decoder")
    }
    return dataclasses.replace(config, **stacks)


def write_hole(file: Path, table: Table, params: dict[str, jax.ShapeDtypeStruct]) -> int:
    """A safetensors file of zeros with the shapes of a layout. Returns its bytes."""

    def make_all(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: make() for name, make in invert(table, params, params.__getitem__)}

    header, end = {}, 0
    for name, shape in jax.eval_shape(make_all, params).items():
        start, end = end, end + 4 * shape.size
        header[name] = {
            "dtype": "F32",
            "shape": list(shape.shape),
            "data_offsets": [start, end],
        }
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with file.open("wb") as opened:
        opened.write(len(content).to_bytes(8, "little") + content)
        opened.truncate(8 + len(content) + end)
    return end


def write_checkpoint(directory: Path, config: CSMConfig) -> int:
    """All that `csm_jax.convert` reads. Returns the bytes of the language model."""
    shapes = flatten(param_shapes(config))
    own = {
        section: {p.removeprefix(section): s for p, s in shapes.items() if p.startswith(section)}
        for section in ("csm/", "codec/")
    }
    (directory / "codec").mkdir()
    write_hole(
        directory / "codec" / "model.safetensors", mimi.kyutai_table(config.codec), own["codec/"]
    )
    (directory / "sizes.json").write_text(json.dumps(config.to_dict()))
    byte_tokenizer(config).save(directory)
    table = csm.sesame_table(config.backbone, config.depth_decoder)
    return write_hole(directory / "model.safetensors", table, own["csm/"])


def memory(pid: int) -> tuple[int, int]:
    """Bytes of a process's own memory, and all of its resident memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    values = {line.partition(":")[0]: line.split()[1] for line in lines if "kB" in line}
    return 1024 * int(values.get("RssAnon", 0)), 1024 * int(values.get("VmRSS", 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="miso_8b", choices=CONFIGS)
    parser.add_argument("--layers", type=int, default=1, help="of both stacks")
    flags, others = parser.parse_known_args()  # others are for csm_jax.convert
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        size = write_checkpoint(directory, shorten(CONFIGS[flags.config], flags.layers))
        paths = [f"--source={directory}", f"--codec={directory / 'codec'}"]
        paths += [f"--config={directory / 'sizes.json'}", f"--out={directory / 'native'}"]
        command = [sys.executable, "-m", "csm_jax.convert", *paths, *others]
        process = subprocess.Popen(command)
        peak, resident = 0, 0
        while process.poll() is None:
            own, total = memory(process.pid)
            peak, resident = max(peak, own), max(resident, total)
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise SystemExit(process.returncode)
    figures = {"checkpoint_bytes": size, "peak_own_bytes": peak, "peak_resident_bytes": resident}
    print(json.dumps(vars(flags) | {"flags": others} | figures))


if __name__ == "__main__":
    main()
