"""What of torch the command's own process imports only when it is asked for."""

import subprocess
import sys

import pytest

HEAD = """
import sys, types
from merge_engine.cli import postponed
postponed.postpone()
import torch
parts = [sys.modules[name] for name in postponed.POSTPONED]
assert all(type(module) is not types.ModuleType for module in parts), parts
"""
FILLED = "assert all(type(module) is types.ModuleType for module in parts), parts\n"


def run(text):
    return subprocess.run([sys.executable, "-c", HEAD + text], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "text",
    [
        "import transformers\n" + FILLED,
        "f = torch.compile(lambda x: x * 2, backend='eager')\nassert f(torch.ones(1)) == 2\n" + FILLED,
        "import torch.export.graph_signature as part; assert part.ExportGraphSignature\n"
        "postponed.fill(); from torch.export import Dim; assert Dim\n" + FILLED,
    ],
    ids=["transformers", "compile", "all"],
)
def test_empty_modules_are_filled_when_they_are_needed(text):
    done = run(text)
    assert done.returncode == 0, done.stderr


def test_an_attribute_fills_a_module_once_for_all_threads():
    """And what Python asks of every module does not."""
    done = run(
        "import inspect; inspect.getmodule(sys._getframe())\n"
        "assert type(torch.export) is not types.ModuleType and not hasattr(torch.export, '__no_such__')\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(8) as threads:\n"
        "    found = set(threads.map(lambda _: torch.export.export, range(8)))\n"
        "assert len(found) == 1 and type(torch.export) is types.ModuleType\n"
        "before = list(sys.meta_path); postponed.postpone(); assert sys.meta_path == before  # torch is there\n"
    )
    assert done.returncode == 0, done.stderr


def test_a_command_does_without(tmp_path):
    text = f"""
from merge_engine.cli.main import main
from merge_engine.demo import adapter_paths
adapters = list(map(str, adapter_paths().values()))[:3]
assert main(["merge", *adapters, "-o", {str(tmp_path / "out")!r}, "--method", "tsv", "--scale", "auto"]) == 0
assert all(type(module) is not types.ModuleType for module in parts), parts
"""
    done = run(text)
    assert done.returncode == 0, done.stderr
