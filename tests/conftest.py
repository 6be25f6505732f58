"""Strict settings for every test: float32, no silent promotion, eight CPU devices, shapes checked at run time."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "1"  # this and the next: see plan/environment.py
os.environ["JAX_HLO_SOURCE_FILE_CANONICALIZATION_REGEX"] = ".*/(?=metacanvas_jax/)"
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # read at import; else gcsfs asks Google about each bucket
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # several of the processes that run tests compile for a TPU
# Most of the time of these tests is compilation, and many compile the same programs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/metacanvas_jax/tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import collections
import pathlib

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# types.py stays outside: its structs also hold shardings and specs in place of arrays.
install_import_hook(
    [f"metacanvas_jax.{part}" for part in ("nn", "mllm", "connectors", "dit", "vae", "text", "kernels", "diffusion")],
    "beartype.beartype",
)


@pytest.fixture(scope="module", autouse=True)
def quick(request):
    """Compiles without LLVM's optimisations for a module that says ``QUICK = True``: its programs compute little."""
    jax.config.update("jax_disable_most_optimizations", getattr(request.module, "QUICK", False))
    yield
    jax.config.update("jax_disable_most_optimizations", False)


SLOW = pathlib.Path(__file__).with_name("slow.txt")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config, items):
    """Marks the tests that ``slow.txt`` lists. A line that names no test of a file that is collected is an error."""
    lines = SLOW.read_text(encoding="utf-8").splitlines()
    listed = {f"tests/{line}" for line in lines if line and not line.startswith("#")}
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.slow)
    if any("::" in str(argument) for argument in config.args):
        return  # a part of a file
    files, found = {item.nodeid.partition("::")[0] for item in items}, {item.nodeid for item in items}
    unknown = sorted(name for name in listed - found if name.partition("::")[0] in files)
    if unknown:
        raise pytest.UsageError(f"{SLOW}: {unknown[0]} is no test")


_faults: collections.Counter[str] = collections.Counter()


@pytest.fixture
def faults(request):
    """``faults(what)`` counts a fault that was survived, for the table at the end of `make test-faults`."""

    def survived(what: str) -> None:
        _faults[what] += 1

    return survived


def pytest_terminal_summary(terminalreporter):
    if _faults:
        failed = len(terminalreporter.stats.get("failed", []))
        terminalreporter.section("faults tried and survived")
        for what, count in sorted(_faults.items()):
            terminalreporter.write_line(f"{count:4d}  {what}")
        terminalreporter.write_line(f"{sum(_faults.values()):4d}  in all; {failed} tests failed")


@pytest.fixture(scope="session")
def bucket_address():
    """Host and port of a bucket of this session, which clients of Google Cloud Storage now take for Google's."""
    import bucket_support

    if reason := bucket_support.why_not():
        pytest.skip(reason)
    try:
        server = bucket_support.emulator()
        address = server.__enter__()
    except (RuntimeError, OSError) as error:
        pytest.skip(f"no bucket: {error}")
    yield address
    server.__exit__(None, None, None)


@pytest.fixture
def bucket(bucket_address, request, monkeypatch):
    """A place of its own in the bucket."""
    import bucket_support

    from metacanvas_jax import retries

    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.01)
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)[:60]
    return bucket_support.Bucket(bucket_address, f"gs://bucket/{name}-{os.getpid()}")
