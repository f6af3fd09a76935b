"""Merges of whole tensors: killed, resumed and shared out they make the same bytes; in little memory."""

import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
import yaml
from mergekit_oracle import save_home
from safetensors.torch import load_file, save_file
from toy_models import bytes_of

from merge_engine.errors import ModelError, OutputError
from merge_engine.into import whole_write
from merge_engine.mergekit.recipe import merge_recipe
from merge_engine.rules.whole_methods import WHOLE_METHODS
from merge_engine.runtime.processes import Ranks

OWN = {"t": 0.3, "select_topk": 0.5}


def recipe_of(method, folder="."):
    """A recipe of two or three models by the method."""
    row = WHOLE_METHODS[method]
    names = ["ft1"] if row.most in (1, 2) else ["ft1", "ft2"]
    parameters = {name: OWN[name] for name in row.options if name in OWN}
    parameters |= {"weight": 0.5} if "weight" in row.options else {}
    if "density" in row.options and "density" not in row.unused:
        parameters |= {"density": 0.5, "rescale": True}  # trims are not rescaled by the engine for adapters
    found = {"merge_method": method, "models": [{"model": f"{folder}/{name}"} for name in names]}
    return found | {"parameters": parameters} | ({"base_model": f"{folder}/base"} if row.base == "needed" else {})


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(save_home(tmp_path))
    return tmp_path


@pytest.fixture
def large(tmp_path, monkeypatch):
    """Models of a few larger tensors, which take a while."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(300, 400, generator=generator) for i in range(6)}
    for name in ("base", "ft1", "ft2"):
        (tmp_path / name).mkdir()
        tensors = {key: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for key, tensor in base.items()}
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"num_hidden_layers": 6, "vocab_size": 7}))
    return tmp_path


@pytest.mark.parametrize("method", WHOLE_METHODS)
def test_an_interrupted_run_goes_on_where_it_stopped(home, monkeypatch, method):
    recipe = recipe_of(method)
    merge_recipe(recipe, "want", shard_size="4KB", convention="published")
    right, seen = whole_write._write, []

    def dying(*arguments):
        seen.append(1)
        if len(seen) > 20:
            raise KeyboardInterrupt
        return right(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(whole_write, "_write", dying)
        with pytest.raises(KeyboardInterrupt):
            merge_recipe(recipe, "out", shard_size="4KB", convention="published")
    assert not (home / "out").exists()
    with pytest.raises(OutputError, match="with another seed"):
        merge_recipe(recipe, "out", shard_size="4KB", convention="published", seed=1)
    result = merge_recipe(recipe, "out", shard_size="4KB", convention="published")
    assert result.resumed == 20 and bytes_of(home / "out") == bytes_of(home / "want")


@pytest.mark.parametrize("method", ["slerp", "della", "model_stock", "sce", "ties", "arcee_fusion"])
def test_two_ranks_make_the_bytes_of_one(large, forks, method):
    (large / "recipe.yml").write_text(yaml.safe_dump(recipe_of(method, large)))
    command = ["merge", large / "recipe.yml", "--shard-size", "1MB", "-o"]
    assert forks.run([*command, large / "one"]).codes == [0]
    done = forks.ranks(2, [*command, large / "two"])
    assert done.codes == [0, 0], done.err
    assert bytes_of(large / "one") == bytes_of(large / "two")


def test_no_rank_writes_before_all_have_read_the_journals(home, monkeypatch):
    events = []

    def told(name, right):
        return lambda *arguments: (events.append(name), right(*arguments))[1]

    monkeypatch.setattr(whole_write, "finished_keys", told("read", whole_write.finished_keys))
    monkeypatch.setattr(whole_write, "_write", told("write", whole_write._write))
    monkeypatch.setattr(Ranks, "wait", told("wait", Ranks.wait))
    merge_recipe(recipe_of("slerp"), "out", convention="published")
    assert events[events.index("read") + 1] == "wait" and "write" in events


def test_kills_at_random_moments(large, forks):
    (large / "recipe.yml").write_text(yaml.safe_dump(recipe_of("della", large)))
    command = ["merge", large / "recipe.yml", "--shard-size", "1MB", "-o"]
    start = time.perf_counter()
    assert forks.run([*command, large / "want"]).codes == [0]
    duration, chance, killed = time.perf_counter() - start, random.Random(1), 0
    for _ in range(5):
        (child,) = forks.start([*command, large / "out"])
        time.sleep(chance.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        killed += forks.wait().codes == [-signal.SIGKILL]
        if not (large / "out").exists():
            assert forks.run([*command, large / "out"]).codes == [0]
        assert bytes_of(large / "out") == bytes_of(large / "want")
        shutil.rmtree(large / "out")
    assert killed > 1


def test_results_do_not_depend_on_threads(large):
    before = torch.get_num_threads()
    try:
        for method in ("slerp", "nuslerp", "della", "model_stock", "sce", "karcher", "arcee_fusion", "ties"):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                merge_recipe(recipe_of(method), f"{method}{threads}")
            one, two = (load_file(f"{method}{threads}/model.safetensors") for threads in (1, 2))
            assert all(torch.equal(one[key], two[key]) for key in one), method
    finally:
        torch.set_num_threads(before)


def test_what_is_wrong_is_said_and_leaves_nothing(home):
    tensors = load_file("ft1/model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, "ft1/model.safetensors")
    with pytest.raises(ModelError, match=r"^ft1: tensor model.norm.weight in .* holds NaN"):
        merge_recipe(recipe_of("slerp"), "out")
    del tensors["model.norm.weight"]
    save_file(tensors, "ft1/model.safetensors")
    with pytest.raises(ModelError, match=r"^ft1: wanted tensor model.norm.weight, got none"):
        merge_recipe(recipe_of("slerp"), "out")
    assert not (home / "out").exists() and not (home / ".out.partial").exists()
