"""The list of packages; all else is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

# Namespace packages, since folders of data count as packages too: setuptools warns of a data file
# whose folder is not listed. `convert/` is installed as `csm_jax.convert`.
setup(
    packages=[
        *find_namespace_packages(include=["csm_jax", "csm_jax.*"]),
        *(f"csm_jax.{name}" for name in find_namespace_packages(include=["convert", "convert.*"])),
    ]
)
