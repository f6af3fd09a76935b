"""What each process writes, and that several write the bytes of one."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from forks import ROOT
from lora_files import save_factors
from safetensors.torch import load_file, save_file
from toy_models import ADAPTED, CONFIG, SHAPES, bytes_of, save_adapter, save_base, weights_of
from toy_vocabularies import union_folder

import merge_engine
from merge_engine.cli.main import main
from merge_engine.formats.checkpoint import open_checkpoint
from merge_engine.formats.open import open_adapter
from merge_engine.into.job import make_job
from merge_engine.into.write import _costs, _share
from merge_engine.rules.recipe import Recipe
from merge_engine.runtime.memory import size_text


def command(base, adapters, out, *options):
    return ["merge", "--into", base, *adapters, "-o", out, "--method", "ties", "--shard-size", "300KB", *options]


def test_several_processes_write_the_bytes_of_one(big, tmp_path, forks):
    scopes, paper = {"scope": "model"}, {"convention": "paper"}
    for name, recipe in (("scopes", scopes), ("paper", paper)):
        merge_engine.merge_into(*big, tmp_path / name / "here", method="ties", shard_size="300KB", **recipe)
    for ranks, names in ((1, ["scopes"]), (2, ["scopes", "paper"]), (3, ["scopes"])):
        options = {"scopes": ["--scope", "model"], "paper": ["--convention", "paper"]}
        done = forks.ranks(ranks, *(command(*big, tmp_path / name / str(ranks), *options[name]) for name in names))
        assert done.codes == [0] * ranks, done.err
        assert done.out.count("tensors merged") == len(names)
        for name in names:
            assert bytes_of(tmp_path / name / "here") == bytes_of(tmp_path / name / str(ranks))


def test_several_processes_with_kernels_write_the_bytes_of_one(tmp_path, forks):
    """Factors of -1, 0 and 1: nearly all magnitudes are equal in both modules. Of three processes one has no module."""
    pytest.importorskip("triton")
    base, generator = save_base(tmp_path / "base", dtype=torch.float32), torch.Generator().manual_seed(1)
    adapters = []
    for name, modules in (("sql", ADAPTED[:2]), ("ads", ADAPTED[1:2])):
        sides = [[torch.randint(-1, 2, shape, generator=generator) for shape in ((1, 20), (12, 1))] for _ in modules]
        factors = {module: (A.float(), B.float()) for module, (A, B) in zip(modules, sides, strict=True)}
        adapters.append(save_factors(tmp_path / name, factors))
    recipes = {
        "exact": ({"density": 0.4}, ["--density", "0.4"]),
        "keep": ({"density": 0.4, "trim_ties": "keep"}, ["--density", "0.4", "--trim-ties", "keep"]),
        "none": ({"density": 0.0}, ["--density", "0"]),
        "all": ({"density": [1.0, 0.1]}, ["--density", "1", "0.1"]),
        "factors": (
            {"density": 0.4, "space": "factors", "method": "magnitude_prune"},
            ["--density", "0.4", "--space", "factors", "--method", "magnitude_prune"],
        ),
    }
    start = ["merge", "--into", base, *adapters, "--method", "ties", "--scope", "model", "--backend", "triton"]
    done = forks.ranks(3, *([*start, *options, "-o", tmp_path / "three" / n] for n, (_, options) in recipes.items()))
    assert done.codes == [0, 0, 0], done.err
    common = {"method": "ties", "scope": "model", "backend": "triton"}
    for name, (recipe, _) in recipes.items():
        merge_engine.merge_into(base, adapters, tmp_path / "one" / name, **common | recipe)
        assert bytes_of(tmp_path / "one" / name) == bytes_of(tmp_path / "three" / name), name


DIES = """
import os, signal
from merge_engine.into import write
right, seen = write._write, []
def dying(*arguments):
    seen.append(1)
    if len(seen) > 4 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return right(*arguments)
write._write = dying
"""


def test_a_rank_that_dies_fails_the_run_and_torchrun_resumes_it(big, tmp_path, forks):
    words = command(*big, tmp_path / "out")
    done = forks.ranks(2, words, first=DIES)
    assert done.codes == [2, -signal.SIGKILL] and "another rank is gone" in done.err
    assert not (tmp_path / "out").exists()
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = [*start, "-m", "merge_engine", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    resumed = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert "tensors finished by an earlier run" in resumed.stdout
    merge_engine.merge_into(*big, tmp_path / "want", method="ties", shard_size="300KB")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "want")


def written_by(job, world):
    """Bytes that each of so many ranks writes: its own copies, and its modules with their twins."""
    from merge_engine.runtime.processes import Ranks

    keys, nbytes = list(job.layout.slots), {key: slot.nbytes for key, slot in job.layout.slots.items()}
    shares = [[keys[i] for i in Ranks(rank, world).share(_costs(job, keys))] for rank in range(world)]
    assert [key for share in shares for key in share] == keys
    written = []
    for share in shares:
        modules = _share(job, share)
        copies = [key for key in share if key not in job.module_of]
        written.append(sum(nbytes[key] for key in [*copies, *(k for name in modules for k in job.keys_of(name))]))
    assert sum(written) == sum(nbytes.values())
    return written, max(nbytes.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("world", [2, 3, 4, 7])
def test_no_rank_writes_more_than_its_due(tmp_path, dtype, world):
    """Embeddings outweigh the layers, one small one of which is merged: as good as all of the cost is what is copied.

    A run of neighbours ends within half a tensor of its due at either end.
    """
    shapes = {f"model.embed.{i}": (500 - 40 * i, 64) for i in range(9)}
    shapes |= {f"model.layers.{i}.q_proj": (16, 16) for i in range(4)} | {"lm_head": (800, 64)}
    base = save_base(tmp_path / "base", shapes=shapes, dtype=dtype)
    adapted = ["model.layers.0.q_proj"]
    if dtype == torch.int8:  # copied as it is, but for what is merged
        tensors = load_file(base / "model.safetensors")
        tensors = {k: t.float() if k.startswith("model.layers") else t for k, t in tensors.items()}
        save_file(tensors, base / "model.safetensors")
    adapter = open_adapter(save_adapter(tmp_path / "sql", 1, modules=adapted, shapes=shapes))
    job = make_job(open_checkpoint(base), [adapter], Recipe.from_mapping({"method": "linear"}), 10**9)
    written, largest = written_by(job, world)
    assert max(written) <= sum(written) / world + largest + 4 * 16 * 16 + 4 * len(shapes)


@pytest.mark.quick
def test_what_is_merged_costs_its_writing_too(base, three):
    """Elements of every task tensor, and a quarter of the bytes of each tensor; and one, so that nothing is free."""
    recipe = Recipe.from_mapping({"method": "ties", "dtype": "float32"})
    opened = [open_adapter(folder) for folder in three]
    job = make_job(open_checkpoint(base), opened, recipe, 10**9)
    keys = list(job.layout.slots)
    want = {f"{name}.weight": 1 + torch.Size(shape).numel() for name, shape in SHAPES.items()}  # float32
    want |= {f"{name}.weight": want[f"{name}.weight"] + 3 * torch.Size(SHAPES[name]).numel() for name in ADAPTED}
    assert dict(zip(keys, _costs(job, keys), strict=True)) == want | {"model.steps": 1 + 5 * 8 // 4}


def test_twins_cost_the_rank_that_writes_them(tmp_path):
    """A full model whose head is tied to the embeddings in its file: the first of the two is written with the other."""
    folders = []
    for seed, name in enumerate(["base", "tuned"]):
        folder, generator = tmp_path / name, torch.Generator().manual_seed(seed)
        folder.mkdir()
        tensors = {"model.embed_tokens.weight": torch.randn(300, 8, generator=generator)}
        tensors |= {f"model.layers.{i}.up.weight": torch.randn(40, 8, generator=generator) for i in range(15)}
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        torch.save(tensors, folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 300, "tie_word_embeddings": True}))
        folders.append(open_checkpoint(folder))
    job = make_job(folders[0], folders[1:], Recipe.from_mapping({"method": "linear"}), 10**9)
    costs = dict(zip(job.layout.slots, _costs(job, list(job.layout.slots)), strict=True))
    assert job.base.twins == {"lm_head.weight": "model.embed_tokens.weight"}
    assert costs["lm_head.weight"] == 1 and costs["model.embed_tokens.weight"] == 1 + 3 * 300 * 8
    written, largest = written_by(job, 2)
    assert max(written) <= sum(written) / 2 + largest


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_tensors_of_several_pieces_are_copied_whole(tmp_path, dtype, form):
    """Pieces are read one in place of another: each is written, cast or not, before the next."""
    shapes = {"model.embed_tokens": (1300, 1024), "model.layers.0.q_proj": (12, 20), "lm_head": (1025, 1024)}
    base = save_base(tmp_path / "base", shapes=shapes, dtype=torch.float32)
    before = load_file(base / "model.safetensors")
    if form == "bin":
        torch.save(before, base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
    adapter = save_adapter(tmp_path / "sql", 1, modules=["model.layers.0.q_proj"], shapes=shapes)
    merge_engine.merge_into(base, [adapter], tmp_path / "out", dtype=dtype)
    got = weights_of(tmp_path / "out")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(got[key], before[key].to(getattr(torch, dtype) if dtype else torch.float32))


def test_several_processes_and_the_command_write_the_same_union(toys, capsys, forks):
    base, models = toys
    words = ["merge-models", "--base", base, *models, "--vocab", "union", "--shard-size", "60B"]
    words = list(map(str, words))
    assert main([*words, "-o", str(base.parent / "dry"), "--dry-run"]) == 0
    want = union_folder(toys, shard_size=60)
    total = sum(file.stat().st_size for file in want.glob("*.safetensors"))
    assert f" copied, {size_text(total)} in " in capsys.readouterr().out and not (base.parent / "dry").exists()
    done = forks.ranks(2, [*words, "-o", base.parent / "two"])
    assert done.codes == [0, 0], done.err
    assert bytes_of(base.parent / "two") == bytes_of(want)
    assert main(["merge", str(models[0]), "-o", str(base.parent / "no"), "--vocab", "union"]) == 2
    assert "vocab: only applies to full models; wanted --into BASE with it" in capsys.readouterr().err


@pytest.mark.parametrize("world", [1, 2, 5])
def test_ranks_share_experts_and_rows_of_tokens(tmp_path, world):
    """Every byte is written by one of them: each expert by itself, all rows of trained tokens together."""
    from expert_models import save_experts, tiny

    tiny("gpt_oss").save_pretrained(tmp_path / "base")
    adapter = open_adapter(save_experts(tmp_path / "a", 1, trainable_token_indices=[3, 30, 4]))
    job = make_job(open_checkpoint(tmp_path / "base"), [adapter], Recipe.from_mapping({"method": "linear"}), 10**9)
    written, _ = written_by(job, world)
    assert len(written) == world and sum(written) == job.layout.nbytes - len(next(iter(job.layout.headers.values())))


def test_several_processes_write_the_same_experts_and_tokens(tmp_path, forks):
    from expert_models import save_experts, tiny

    tiny("gpt_oss").save_pretrained(tmp_path / "base")
    adapters = [save_experts(tmp_path / str(i), i, trainable_token_indices=[3, 30 + i]) for i in range(2)]
    recipe = {"method": "ties", "density": 0.4, "shard_size": "9KB"}
    merge_engine.merge_into(tmp_path / "base", adapters, tmp_path / "one", **recipe)
    words = ["merge", *map(str, adapters), "--into", str(tmp_path / "base"), "--method", "ties", "--density", "0.4"]
    done = forks.ranks(2, [*words, "--shard-size", "9KB", "-o", str(tmp_path / "two")])
    assert done.codes == [0, 0], done.err
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")
