"""Where the cache is: named, the user's own, or a private temporary directory."""

import logging
import os
import stat
from pathlib import Path

import pytest
from huggingface_hub import constants

from csm_jax.errors import OutputError
from csm_jax.loading import hub


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """A user without a home directory, whose temporary files are in `tmp_path`."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    for name in ("CSM_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub.tempfile, "tempdir", str(tmp_path))
    hub._temporary_cache.cache_clear()
    yield tmp_path
    hub._temporary_cache.cache_clear()


@pytest.mark.parametrize(
    ("named", "root", "wanted"),
    [
        ("/c", "/x", "/c"),
        ("", "/x", "/x/csm-jax"),
        (None, "/x", "/x/csm-jax"),
        (None, "", "/home/me/.cache/csm-jax"),
    ],
)
def test_variables_name_the_cache(monkeypatch, named, root, wanted):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    for name, value in (("CSM_JAX_CACHE", named), ("XDG_CACHE_HOME", root)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert hub.cache_directory() == Path(wanted)


def test_without_a_home_the_cache_is_private_and_told_once(homeless, caplog):
    with caplog.at_level(logging.WARNING):
        found = {hub.cache_directory() for _ in range(3)}
    (directory,) = found
    assert directory == homeless / f"csm-jax-{os.getuid()}"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    (record,) = caplog.records
    assert "CSM_JAX_CACHE names another" in record.getMessage()
    hub._temporary_cache.cache_clear()
    assert hub.cache_directory() == directory, "the next process has the same one"


def made_by_others(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


def link(path: Path) -> None:
    (path.parent / "target").mkdir(mode=0o700)
    path.symlink_to(path.parent / "target")


@pytest.mark.parametrize("make", [made_by_others, link])
def test_a_directory_that_others_can_write_to_is_not_used(homeless, make):
    """Compiled programs are run from it."""
    taken = homeless / f"csm-jax-{os.getuid()}"
    make(taken)
    directory = hub.cache_directory()
    assert directory not in (taken, taken.resolve())
    assert directory.parent == homeless
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_without_any_place_the_message_names_the_variable(homeless, monkeypatch):
    monkeypatch.setattr(hub.tempfile, "tempdir", "/proc/nowhere")
    with pytest.raises(OutputError, match="name a directory for the cache with CSM_JAX_CACHE"):
        hub.cache_directory()


def test_downloads_are_not_put_into_a_directory_named_tilde(homeless, monkeypatch):
    assert hub._hub_cache() is None
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")
    assert hub._hub_cache() == hub.cache_directory() / "hub"
