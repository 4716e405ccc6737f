import gc
import importlib.util
import os
import signal
from pathlib import Path

import fixtures
import jax
import pytest
from huggingface_hub import constants

# libtpu is installed for its compiler: without a chip, jax would look for one and print warnings.
_CHIPS = [*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*")]
if importlib.util.find_spec("libtpu") and not _CHIPS:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])

# The workers of pytest-xdist share the cores: torch's threads would wait for each other, spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests spend four fifths of their time compiling programs that run for milliseconds. 0 is the
# users' setting. The variable also applies to the processes that tests start.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
jax.config.update(
    "jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0"
)

# XLA's former way to compile fused operations takes half the time; newer versions have it no more.
# And one thread a program takes a fifth less: dividing it is work, and the workers share the cores.
# The processes that tests start do not get these flags, because they use the compilation cache,
# which is off here: XLA crashed once when it wrote a program to it that was compiled so.
_XLA_FLAGS = os.environ.get("XLA_FLAGS", "")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0":
    _XLA_FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
    if jax.__version_info__ < (0, 11):
        _XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
jax.config.update("jax_enable_compilation_cache", False)
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XLA_FLAGS", _XLA_FLAGS)
    jax.devices()  # reads them

# Tracing makes and drops many objects, among the hundred thousands of the imported modules, which
# a full collection would visit each time.
gc.set_threshold(50_000, 20, 100)

# Tests of servers, browsers and other processes wait a third of their time.
_WAITING_WORKERS = 1


def pytest_xdist_auto_num_workers() -> int:
    """The workers of `-n auto`."""
    return (os.cpu_count() or 1) + _WAITING_WORKERS


# Linux lets a process have 65530 memory maps, XLA:CPU makes some ten for every program that it
# compiles, and it crashes where it gets no more.
# A module of tests adds 9000 at most. With fewer programs a worker also takes less memory.
_MAX_MEMORY_MAPS = 20_000

# A silent promotion to float32 doubles memory traffic, and a silent broadcast hides a wrong axis.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def bounded_memory_maps():
    """Drops the compiled programs of earlier modules before a process has too many."""
    yield
    if _num_memory_maps() > _MAX_MEMORY_MAPS:
        jax.clear_caches()
        gc.collect()


def _num_memory_maps() -> int:
    maps = Path("/proc/self/maps")
    return len(maps.read_bytes().splitlines()) if maps.exists() else 0


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Keeps the tests and the processes they start off the user's cache and the network."""
    directory = tmp_path_factory.mktemp("cache")
    os.environ["CSM_JAX_CACHE"] = str(directory)
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True  # imported before the variable was set
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    return directory


@pytest.fixture(scope="session")
def compiled_alike():
    """Variables of a process whose numbers are compared with those of this one to the bit."""
    return {"XLA_FLAGS": _XLA_FLAGS, "JAX_ENABLE_COMPILATION_CACHE": "0"}


@pytest.fixture
def heeded_signals():
    """The signals' default actions, for processes that the test starts.

    Tests that run in the background of a shell, or under nohup, ignore SIGINT or SIGHUP, and their
    processes inherit that.
    """
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def lenient():
    """The dtype promotion of users: optax multiplies its int32 step count with floats."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="session")
def sesame(tmp_path_factory):
    return fixtures.write_sesame(tmp_path_factory.mktemp("sesame"))


@pytest.fixture(scope="session")
def huggingface(tmp_path_factory):
    return fixtures.write_huggingface(tmp_path_factory.mktemp("huggingface"))


@pytest.fixture(scope="session")
def mixed(tmp_path_factory):
    return fixtures.write_mixed(tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="session", params=["kyutai_codec", "huggingface_codec"])
def codec(request, tmp_path_factory):
    return fixtures.write_codec(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def native(tmp_path_factory):
    return fixtures.write_native(tmp_path_factory.mktemp("native") / "native")


@pytest.fixture(scope="session")
def shallow(tmp_path_factory):
    """A native checkpoint that is compiled in less time than `native` and `random:tiny`."""
    directory = tmp_path_factory.mktemp("shallow") / "native"
    return fixtures.write_native(directory, fixtures.shallow())
