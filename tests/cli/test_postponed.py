"""What of torch a merge of full models imports only when it is asked for."""

import subprocess
import sys

import pytest
import yaml
from toy_models import save_base

from merge_engine.cli import postponed
from merge_engine.cli.main import main

HEAD = """
import sys, types
from merge_engine.cli import postponed
postponed.allow()
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


RUN = "from merge_engine.cli.main import main\nassert main({arguments!r}) == 0\n"


@pytest.mark.parametrize("method", ["slerp", "model_stock", "della", "ties"])
def test_merges_of_full_models_do_without(tmp_path, method):
    """With the bytes of a process that has all of torch, as this one."""
    base, *tuned = (str(save_base(tmp_path / str(seed), seed)) for seed in range(2 if method == "slerp" else 3))
    models = [{"model": each, "parameters": {"weight": 0.5, "density": 0.5}} for each in tuned]
    recipe = {
        "merge_method": method,
        "base_model": base,
        "models": models,
        "parameters": {"t": 0.5},
        "dtype": "float32",
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    arguments = ["merge", str(tmp_path / "recipe.yml"), "-o", str(tmp_path / "out")]
    still_empty = "assert all(type(module) is not types.ModuleType for module in parts), parts\n"
    done = run(RUN.format(arguments=arguments) + still_empty)
    assert done.returncode == 0, done.stderr
    assert main([*arguments[:-1], str(tmp_path / "whole")]) == 0
    assert bytes_of(tmp_path / "out", "model.safetensors") == bytes_of(tmp_path / "whole", "model.safetensors")


def bytes_of(folder, name):
    return (folder / name).read_bytes()


@pytest.mark.parametrize("tested", [True, False])
def test_only_where_it_was_tested_and_allowed(monkeypatch, tested):
    """In a process of the command's own, and with this version of torch."""
    monkeypatch.setattr(sys, "meta_path", before := list(sys.meta_path))
    monkeypatch.setattr(sys, "modules", {name: module for name, module in sys.modules.items() if name != "torch"})
    count = len(before)
    monkeypatch.setattr(postponed, "_allowed", False)
    postponed.postpone()
    assert len(sys.meta_path) == count
    monkeypatch.setattr(postponed, "_torch", lambda: "2.13.0+cu130" if tested else "2.14.0")
    postponed.allow()
    postponed.postpone()
    assert len(sys.meta_path) == count + tested
