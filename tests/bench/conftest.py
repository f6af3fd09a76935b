"""What several tests of the benchmarks share."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from bench.harness.inputs import MODELS, llama
from bench.harness.row import Row


@pytest.fixture
def row() -> Callable[..., Row]:
    """row(**fields): a row of the report, with values for all other fields."""

    def make(**fields: Any) -> Row:
        sizes = {"method": "ties", "rows": 8, "columns": 8, "layers": 0, "adapters": 3, "rank": 4, "elements": 64}
        known = {"kind": "deltas", "workload": "w", "contestant": "tiled", "density": 0.2, "dtype": "float32"}
        timing = {"device": "cpu", "threads": 2, "runs": 3, "seconds": 1.0, "low": 0.9, "high": 1.1}
        return Row(**{**sizes, **known, **timing, **fields})

    return make


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a model with small layers."""
    monkeypatch.setenv("MERGE_ENGINE_BACKEND", "torch")
    monkeypatch.setitem(MODELS, "tiny", llama(64, 64, 96))
    return "tiny"


@pytest.fixture
def importable() -> Iterator[None]:
    """Processes that are forked from the server can import `bench`, too."""
    with mock.patch.object(sys, "path", [str(Path(__file__).parents[2]), *sys.path]):
        yield
