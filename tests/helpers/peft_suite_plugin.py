"""A pytest plugin for PEFT's own tests: packages that they import and never call, the drop-in, and each test's outcome.

DROP_IN=1 enables the drop-in. OUTCOMES names the JSON file that {test: outcome} is written to.
"""

import importlib
import importlib.util
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import pytest

NEVER_CALLED = {"datasets": ["load_dataset"], "diffusers": ["StableDiffusionPipeline"]}


class Everything(defaultdict[str, int]):
    """Models that a test need not ask the hub for: all, since they lie in the local cache."""

    def __contains__(self, key: object) -> bool:
        return True


def pytest_configure() -> None:
    importlib.import_module("transformers.trainer")  # which would look into the empty packages
    missing = [package for package in NEVER_CALLED if importlib.util.find_spec(package) is None]
    for package in missing:
        sys.modules[package] = ModuleType(package)
        for name in NEVER_CALLED[package]:
            setattr(sys.modules[package], name, None)
    importlib.import_module("tests.testing_common")
    for package in missing:
        del sys.modules[package]
    sys.modules["tests.testing_utils"]._HUB_MODEL_ACCESSES = Everything(int)
    if os.environ.get("DROP_IN") == "1":
        import merge_engine.peft_backend

        merge_engine.peft_backend.enable()


OUTCOMES: dict[str, str] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        OUTCOMES[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    Path(os.environ["OUTCOMES"]).write_text(json.dumps(OUTCOMES, indent=1))
