"""Where tests run: kernels compiled on a GPU if there is one, else in Triton's interpreter."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import pytest

# Threads of torch that wait for each other sleep: they would take the cores from the tests of other workers.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch

# A shell runs background jobs with Ctrl-C ignored, and every process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
HAS_GPU = torch.cuda.is_available()
hypothesis.settings.register_profile(
    "same everywhere",
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # a busy machine once took 30 s to draw a number
)
hypothesis.settings.load_profile("same everywhere")
if not HAS_GPU:
    # Read when a kernel is decorated, and triton's own helpers are when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import bench  # noqa: E402
import merge_engine  # noqa: E402, F401
from merge_engine.loops import door  # noqa: E402

# Compiled once, before a test starts processes or looks at what they print. What is said of it would be captured here,
# and come after the summary.
with mock.patch.object(door, "LATE", 3600.0):
    door.load()

# Tests import the modules of tests/helpers by their bare names.
sys.path.append(str(Path(__file__).parent / "helpers"))
if os.environ.get("TRITON_INTERPRET") == "1":
    import kernel_interpreter

    kernel_interpreter.install()

# transformers imports whatever `kernels` it finds: that must not be ours, which lies in the root. `bench` stays.
bench.__path__ = [str(ROOT / "bench")]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "peft_suite" not in config.option.markexpr:
        items[:] = [item for item in items if not item.get_closest_marker("peft_suite")]
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU with the interpreter."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(scope="session")
def forks() -> Iterator[Any]:
    """Where the command runs in other processes, that start at once: see `Forks`."""
    from forks import Forks

    with Forks() as processes:
        yield processes


@pytest.fixture
def repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """{hub id: folder}, to be filled: of each, what huggingface_hub is asked for is fetched, and nothing else."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    folders: dict[str, Path] = {}

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        source, target = folders[repo_id], tmp_path / "hub" / repo_id
        names = [str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: None)
    return folders


@pytest.fixture
def pretended_hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub to push to, in memory: see `PretendedHub`."""
    import huggingface_hub
    from pretended_hub import PretendedHub

    hub = PretendedHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub.api)
    return hub


@pytest.fixture(scope="session")
def aot() -> Iterator[Callable[..., Any]]:
    """aot(function, *arguments): its result in one child process, in which Triton compiles.

    An interpreting process cannot: once a kernel has been interpreted, triton's language stays patched.
    """
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="0"),
        mock.patch.object(sys, "path", [str(ROOT), *sys.path]),
    ):
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        pool.submit(int).result()  # the child starts, and copies both
    yield lambda function, *arguments: pool.submit(function, *arguments).result()
    pool.shutdown()
