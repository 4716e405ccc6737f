"""What importing the package, and loading a checkpoint, does not import."""

import subprocess
import sys

PROGRAM = """
import sys
import csm_jax
{then}
print(*(name for name in {names} if name in sys.modules))
"""
NAMES = ("orbax", "csm_jax.convert", "csm_jax.train", "csm_jax.serve")


def _imported(then: str = "") -> str:
    program = PROGRAM.format(then=then, names=NAMES)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_importing_the_package_imports_neither_orbax_nor_the_converters():
    assert _imported() == ""


def test_the_bundled_checkpoint_loads_without_orbax():
    assert "orbax" not in _imported("csm_jax.load('demo')")
