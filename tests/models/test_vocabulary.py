"""Unions of vocabularies: rows by token against float64, and results as transformers opens them."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lora_files import STEM, save_factors
from safetensors.torch import load_file, save_file

import merge_engine
from merge_engine.cli.main import main
from merge_engine.cpu.mask import keep_mask
from merge_engine.errors import MergeError, ModelError, OutputError, RecipeError
from merge_engine.formats.checkpoint import open_checkpoint
from merge_engine.formats.open import open_adapter
from merge_engine.into import write as into_write
from merge_engine.into.job import make_job
from merge_engine.into.resume import _files_of
from merge_engine.into.write import _write
from merge_engine.mergekit.recipe import merge_recipe
from merge_engine.models import finetuned as models_finetuned
from merge_engine.models.vocabulary import unite
from merge_engine.rules import reference
from merge_engine.rules.philox import stream_id
from merge_engine.rules.recipe import Recipe
from merge_engine.rules.rule import make_rule

ROOT = Path(__file__).parents[2]
WORDS = ["<unk>", "to", "be", "or", "not"]
WEIGHTS = [1.0, 0.5, -2.0]  # powers of two: with whole eighths, sums of their products are exact
WIDTH = 3
U = 2.0**-24  # half a step of float32


def weights_of(folder):
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def bytes_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def report_of(folder):
    return json.loads((folder / "merge_report.json").read_text())


def eighths(generator, *shape):
    return torch.randint(-40, 41, shape, generator=generator) / 8


# Models of nothing but embedding, head, the head's bias and a norm, as files.

KEYS = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")


def entry(index, token, special=True):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special, "special": special}
    return {"id": index, "content": token, **flags}


def write_tokenizer(folder, tokens, **model):
    """tokens: {token: index}; those in angle brackets are added ones."""
    words = {token: index for token, index in tokens.items() if not token.startswith("<")}
    added = [entry(index, token) for token, index in tokens.items() if token.startswith("<")]
    model = {"type": "WordLevel", "unk_token": "<unk>", "vocab": words, **model}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": model}))


def save_toy(folder, tokens, rows, seed=0, dtype=torch.float32, **config):
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(zip(KEYS, [(rows, WIDTH), (rows, WIDTH), (rows,)], strict=True)) | {"model.norm.weight": (WIDTH,)}
    folder.mkdir()
    tensors = {key: eighths(generator, *shape).to(dtype) for key, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"vocab_size": rows, "tie_word_embeddings": False, **config}))
    write_tokenizer(folder, tokens)
    return folder


def numbered(*tokens):
    return {token: index for index, token in enumerate(tokens)}


@st.composite
def vocabularies(draw):
    """({token: index}, rows) of a base and of models that shuffle, lose and add tokens, with padding."""
    words = WORDS[1 : 1 + draw(st.integers(1, 4))]
    found = [(numbered(*words), len(words) + draw(st.integers(0, 3)))]
    for _ in range(draw(st.integers(1, 3))):
        lost = draw(st.integers(0, min(1, len(words) - 1)))
        added = draw(st.lists(st.sampled_from(["<a>", "<b>", "<c>", "<d>"]), unique=True, max_size=3))
        tokens = draw(st.permutations([*words[lost:], *added]))
        found.append((numbered(*tokens), len(tokens) + draw(st.integers(0, 3))))
    return [(tokens, max(rows, 1)) for tokens, rows in found]


def union_of(found):
    """{token: index}: the base's, then others by model and index."""
    union = dict(found[0][0])
    for tokens, _ in found[1:]:
        for token in sorted(tokens, key=tokens.get):
            union.setdefault(token, len(union))
    return union


def row_of(token_or_row, tokens, rows):
    """Which row a model has for a token, or for padding at an index: None if none."""
    if isinstance(token_or_row, str):
        return tokens.get(token_or_row)
    return token_or_row if token_or_row < rows and token_or_row not in tokens.values() else None


def aligned(key, found, folders):
    """In float64: the base, and every model with the base's rows where it has none of its own."""
    (tokens, rows), union = found[0], union_of(found)
    owner = {index: token for token, index in union.items()}
    start = weights_of(folders[0])[key].double()
    models = []
    for (other, count), folder in zip(found[1:], folders[1:], strict=True):
        x, theirs = start.clone(), weights_of(folder)[key].double()
        for index in range(rows):
            if owner.get(index) is None or owner[index] in tokens:
                row = row_of(owner.get(index, index), other, count)
                if row is not None:
                    x[index] = theirs[row]
        models.append(x)
    return start, models


def means(key, found, folders):
    """{index: mean of the rows of an added token} in float64."""
    wanted = {}
    for token, index in union_of(found).items():
        if token not in found[0][0]:
            having = [
                (tokens[token], folder) for (tokens, _), folder in zip(found, folders, strict=True) if token in tokens
            ]
            wanted[index] = torch.stack([weights_of(folder)[key][row].double() for row, folder in having]).mean(0)
    return wanted


def trimmed(task, density):
    """The k largest magnitudes, of equal ones those with the lowest index."""
    flat = task.flatten()
    order = torch.sort(-flat.abs(), stable=True).indices[: int(density * flat.numel())]
    return torch.zeros_like(flat).index_copy(0, order, flat[order]).reshape(task.shape)


def ties(tasks, weights, density):
    kept = torch.stack([trimmed(task, density) for task in tasks])
    sign = torch.where(kept.sum(0) >= 0, 1.0, -1.0)
    agree = kept * sign > 0
    shape = (-1, *[1] * (kept.ndim - 1))
    return (torch.tensor(weights).double().reshape(shape) * kept * agree).sum(0) / agree.sum(0).clamp_min(1)


def linear(tasks, weights, density):
    return sum(weight * task for weight, task in zip(weights, tasks, strict=True))


@settings(max_examples=60)
@given(vocabularies(), st.sampled_from(["linear", "ties"]))
@example([(numbered("to", "be"), 2), (numbered("to", "be", "<a>"), 3), (numbered("to", "be", "<b>"), 3)], "linear")
@example([(numbered("to", "be"), 2), (numbered("<a>", "be", "to"), 3), (numbered("be", "to", "<a>"), 4)], "ties")
@example([(numbered("to"), 4), (numbered("to", "<b>", "<a>"), 3), (numbered("<a>", "to"), 9)], "ties")
def test_rows_go_by_their_tokens(found, method):
    """Every row of the result, whatever the order, losses, additions and padding of the models."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(models_finetuned, "_PIECE", 2 * WIDTH)  # two rows a piece
        home = Path(name)
        folders = [save_toy(home / str(i), *each, seed=i) for i, each in enumerate(found)]
        weights = WEIGHTS[: len(found) - 1]
        options = {"method": method, "density": 0.5, "scale": 0.5, "weights": weights, "vocab": "union"}
        merge_engine.merge_models(folders[0], folders[1:], home / "out", **options)
        got, union = weights_of(home / "out"), union_of(found)
        rows = max(found[0][1], len(union))
        assert json.loads((home / "out" / "config.json").read_text())["vocab_size"] == rows
        written = json.loads((home / "out" / "tokenizer.json").read_text())["added_tokens"]
        assert {each["content"]: each["id"] for each in written}.items() <= union.items()
        assert {token for token in union if token not in found[0][0]} <= {each["content"] for each in written}
        for key in KEYS:
            start, models = aligned(key, found, folders)
            merged = {"linear": linear, "ties": ties}[method]([x - start for x in models], weights, 0.5) / 2
            added = means(key, found, folders)
            assert len(got[key]) == rows
            for index, row in enumerate(got[key].double()):
                if index in added:
                    assert torch.all((row - added[index]).abs() <= U * added[index].abs())
                else:  # one rounding each: of the mean, and of the sum with the base
                    want = start[index] + merged[index]
                    assert torch.all((row - want).abs() <= 2 * U * (want.abs() + merged[index].abs()))


@pytest.fixture
def toys(tmp_path):
    """A base with a row of padding, and three models: two with a token of their own in its place, one without."""
    base = save_toy(tmp_path / "base", numbered("to", "be", "or"), 4)
    models = [
        save_toy(tmp_path / "chat", numbered("to", "be", "or", "<a>"), 4, seed=1),
        save_toy(tmp_path / "code", numbered("to", "be", "or", "<b>", "<a>"), 6, seed=2),
        save_toy(tmp_path / "math", numbered("to", "be", "or"), 3, seed=3),
    ]
    return base, models


def union_folder(toys, **options):
    base, models = toys
    merge_engine.merge_models(base, models, base.parent / "out", vocab="union", **options)
    return base.parent / "out"


@pytest.mark.parametrize("method", ["ties", "dare_ties", "magnitude_prune", "dare_linear"])
@pytest.mark.parametrize("recipe", [{"scope": "model"}, {"convention": "paper"}])
def test_thresholds_and_drops_see_aligned_rows(toys, method, recipe):
    """Scopes over the whole model, majority signs and random masks act on the aligned task tensors."""
    out = union_folder(toys, method=method, density=0.4, seed=3, weights=WEIGHTS, **recipe)
    base, models = toys
    found = [(numbered("to", "be", "or"), 4), (numbered("to", "be", "or", "<a>"), 4)]
    found += [(numbered("to", "be", "or", "<b>", "<a>"), 6), (numbered("to", "be", "or"), 3)]
    tasks, masks = {}, {}
    for key in [*KEYS, "model.norm.weight"]:
        name = key.removesuffix(".weight")
        if key in KEYS:
            start, each = aligned(key, found, [base, *models])
        else:
            start, each = weights_of(base)[key].double(), [weights_of(model)[key].double() for model in models]
        tasks[name] = {i: (x - start).float().reshape(-1 if x.ndim > 1 else 1, x.shape[-1]) for i, x in enumerate(each)}
        masks[name] = {
            i: keep_mask(
                0.4,
                seed=3,
                stream=stream_id(name, "delta"),
                adapter=i,
                rows=range(t.shape[0]),
                columns=range(t.shape[1]),
            )
            for i, t in tasks[name].items()
        }
    rule = make_rule(method, **recipe)
    merged = reference.merge_model(tasks, WEIGHTS, {name: [0.4] * 3 for name in tasks}, rule, masks=masks)
    got, start = weights_of(out), weights_of(base)
    for key in KEYS:
        want = start[key] + merged[key.removesuffix(".weight")].reshape(start[key].shape)
        assert torch.equal(got[key][:3], want[:3])
        chat, code = (weights_of(model)[key] for model in models[:2])
        assert torch.equal(got[key][3:], torch.stack([(chat[3] + code[4]) / 2, code[3]]))


def test_equal_vocabularies_merge_as_without_a_union(tmp_path):
    base = save_toy(tmp_path / "base", numbered("to", "be", "<a>"), 5)
    models = [save_toy(tmp_path / str(i), numbered("to", "be", "<a>"), 5, seed=i) for i in (1, 2)]
    for vocab in ("base", "union"):
        merge_engine.merge_models(base, models, tmp_path / f"{vocab}-out", method="dare_ties", vocab=vocab)
    one, other = bytes_of(tmp_path / "base-out"), bytes_of(tmp_path / "union-out")
    assert {name for name in one | other if one.get(name) != other.get(name)} == {"README.md", "merge_report.json"}
    assert report_of(tmp_path / "base-out")["recipe"]["vocab"] == "base"


def test_means_are_of_float32_and_rounded_once(tmp_path):
    """Rows of models in bfloat16 and float16; base rows that a model lacks differ by nothing, whatever its dtype."""
    base = save_toy(tmp_path / "base", numbered("to", "be"), 2)
    start = weights_of(base)
    start["lm_head.weight"][1, 0] = 1 + 2**-20  # no number of bfloat16
    save_file(start, base / "model.safetensors")
    one = save_toy(tmp_path / "one", numbered("to", "<a>"), 2, seed=1, dtype=torch.bfloat16)
    two = save_toy(tmp_path / "two", numbered("<a>", "to", "be"), 3, seed=2, dtype=torch.float16)
    three = save_toy(tmp_path / "three", numbered("<a>", "be", "to"), 3, seed=3)
    save_file({key: tensor + 2**-15 for key, tensor in weights_of(three).items()}, three / "model.safetensors")
    options = {"method": "linear", "weights": [3.0, 0.0, 0.0], "vocab": "union"}
    merge_engine.merge_models(base, [one, two, three], tmp_path / "out", **options)
    merge_engine.merge_models(base, [one, two, three], tmp_path / "half", dtype="bfloat16", **options)
    got, half = weights_of(tmp_path / "out"), weights_of(tmp_path / "half")
    for key in KEYS:
        assert torch.equal(got[key][1], start[key][1])
        rows = [weights_of(model)[key][row].float() for model, row in ((one, 1), (two, 0), (three, 0))]
        assert torch.equal(got[key][2], sum(rows) / 3)
        assert torch.equal(half[key][2], (sum(rows) / 3).bfloat16())


def test_a_head_that_is_saved_beside_its_embedding_stays_tied(tmp_path):
    folders = []
    for seed, added in enumerate([[], ["<a>"], ["<b>", "<a>"]]):
        folder = save_toy(tmp_path / str(seed), numbered("to", *added), 2 + seed, seed, tie_word_embeddings=True)
        tensors = weights_of(folder)
        save_file({**tensors, KEYS[1]: tensors[KEYS[0]].clone()}, folder / "model.safetensors")
        folders.append(folder)
    out = union_folder((folders[0], folders[1:]), method="linear")
    got, (one, two) = weights_of(out), (weights_of(folder)[KEYS[0]] for folder in folders[1:])
    assert torch.equal(got[KEYS[0]], got[KEYS[1]])
    assert torch.equal(got[KEYS[0]][1:], torch.stack([(one[1] + two[2]) / 2, two[1]]))


def test_an_adapter_merges_into_the_bases_rows(toys):
    base, (chat, *_) = toys
    generator = torch.Generator().manual_seed(9)
    A, B = eighths(generator, 2, 4), eighths(generator, WIDTH, 2)
    adapter = save_factors(base.parent / "sql", {"model.embed_tokens": (A, B)})
    out = union_folder((base, [adapter, chat]), method="linear", weights=[1.0, 0.5])
    start, x = weights_of(base)[KEYS[0]], weights_of(chat)[KEYS[0]]
    want = start + 2 * (B @ A).t() + 0.5 * (x - start)
    want[3] = x[3]
    assert torch.equal(weights_of(out)[KEYS[0]], want)
    shutil.rmtree(out)
    write_tokenizer(adapter, numbered("to", "be", "or", "<z>"))
    with pytest.raises(ModelError, match=r"^sql: it changes model\.embed_tokens\.weight and has tokens that base has"):
        merge_engine.merge_into(base, [adapter], out, vocab="union")
    assert not out.exists()


@torch.no_grad()
def test_an_adapter_that_peft_saved_with_added_tokens(tmp_path):
    """Its rows of embedding and head go by their tokens, beside those of a full model; its factors merge as ever."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = save_llama(tmp_path / "base", make_tokenizer("WordLevel"), 0)
    full = save_llama(tmp_path / "full", make_tokenizer("WordLevel", ["<full>", "<both>"]), 1)
    tokenizer, folder = make_tokenizer("WordLevel", ["<both>", "<lora>"]), tmp_path / "lora"
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    generator = torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        if ".lora_" in name or "embed_tokens" in name or "lm_head" in name:
            weight.copy_(eighths(generator, *weight.shape))
    model.save_pretrained(folder, save_embedding_layers=True)
    tokenizer.save_pretrained(folder)
    factors = load_file(folder / "adapter_model.safetensors")
    want = {
        key.replace("base_model.model.", ""): tensor for key, tensor in model.merge_and_unload().state_dict().items()
    }

    alone = merge_engine.merge_into(base, [folder], tmp_path / "alone", method="linear", vocab="union")
    got = weights_of(tmp_path / "alone")
    assert alone.merged == 3 and got.keys() == want.keys() and len(factors) == 4
    assert all(torch.equal(got[key], want[key]) for key in want)

    job = make_job(open_checkpoint(base), [open_adapter(folder)], Recipe(method="linear"), 10**9, "union")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= _files_of(job.plan.adapters[0]).keys()

    options = {"method": "linear", "weights": [0.5, 2.0], "vocab": "union"}
    merge_engine.merge_models(base, [full, folder], tmp_path / "out", **options)
    got, start, one = map(opened, (tmp_path / "out", base, full))
    assert got.tokenizer.convert_tokens_to_ids(["<full>", "<both>", "<lora>"]) == [5, 6, 7]
    ids = tokenizer.get_vocab()
    for part, key in (("embedding", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
        rows, before, first = (getattr(each, part) for each in (got, start, one))
        for word in WORDS:
            expected = before[word] + 0.5 * (first[word] - before[word]) + 2 * (want[key][ids[word]] - before[word])
            assert torch.equal(rows[word], expected)
        assert torch.equal(rows["<full>"], first["<full>"])
        assert torch.equal(rows["<lora>"], want[key][ids["<lora>"]])
        assert torch.equal(rows["<both>"], (first["<both>"] + want[key][ids["<both>"]]) / 2)
    key = "model.layers.0.self_attn.q_proj.weight"
    before, first = weights_of(base)[key], weights_of(full)[key]
    expected = before + 0.5 * (first - before) + 2 * (want[key] - before)
    torch.testing.assert_close(weights_of(tmp_path / "out")[key], expected, rtol=4 * U, atol=512 * U)

    with pytest.raises(MergeError, match="vocabularies differ"):
        merge_engine.merge_into(base, [folder], tmp_path / "no")
    with pytest.raises(RecipeError, match=r"^space: lora holds its vocabulary whole and has no factors"):
        merge_engine.merge_into(base, [folder], tmp_path / "no", vocab="union", space="factors")
    stem = "base_model.model."
    for change, message in (
        ({f"{stem}score.weight": torch.zeros(2)}, "not adapted, got score.weight"),
        (
            {f"{stem}lm_head.lora_A.weight": torch.zeros(2, 8), f"{stem}lm_head.lora_B.weight": torch.zeros(5, 2)},
            "lm_h",
        ),
        ({next(key for key in factors if "lora_B" in key): torch.full((8, 2), torch.nan)}, "holds NaN"),
        ({f"{stem}lm_head.weight": torch.zeros(7, 9)}, "lm_head.weight is .7, 9., wanted .5, 8. as in base"),
    ):
        save_file({**factors, **change}, folder / "adapter_model.safetensors")
        rewrite(folder, "adapter_config.json", modules_to_save=["score"])
        with pytest.raises(MergeError, match=f"^lora: .*{message}"):
            merge_engine.merge_into(base, [folder], tmp_path / "no", vocab="union")
    del factors[f"{stem}lm_head.weight"]
    save_file(factors, folder / "adapter_model.safetensors")
    with pytest.raises(MergeError, match="vocabularies differ"):
        merge_engine.merge_into(base, [folder], tmp_path / "no", vocab="union")


@pytest.mark.parametrize("same", [True, False])
def test_an_adapter_whose_head_is_tied_to_its_embedding(tmp_path, repositories, same):
    """From the hub, with its tokens."""
    base = save_llama(tmp_path / "base", make_tokenizer("WordLevel"), 0, tied=True)
    rows = eighths(torch.Generator().manual_seed(1), 6, 8)
    factors = {"model.layers.0.self_attn.q_proj": (torch.ones(1, 8), torch.ones(8, 1))}
    held = {f"{STEM}{KEYS[0]}": rows, f"{STEM}{KEYS[1]}": rows + (not same)}
    repositories["user/lora"] = save_factors(tmp_path / "lora", factors, held)
    make_tokenizer("WordLevel", ["<a>"]).save_pretrained(tmp_path / "lora")
    if same:
        merge_engine.merge_into(base, ["user/lora"], tmp_path / "out", method="linear", vocab="union")
        assert torch.equal(weights_of(tmp_path / "out")[KEYS[0]], rows) and KEYS[1] not in weights_of(tmp_path / "out")
    else:
        with pytest.raises(
            ModelError, match=r"^lora: lm_head\.weight is tied to model\.embed_tokens\.weight in base, w"
        ):
            merge_engine.merge_into(base, ["user/lora"], tmp_path / "out", method="linear", vocab="union")


def test_triton_merges_unions_too(toys):
    pytest.importorskip("triton")
    base, models = toys
    for backend in ("torch", "triton"):
        merge_engine.merge_models(base, models, base.parent / backend, backend=backend, density=0.5, vocab="union")
    one, other = weights_of(base.parent / "torch"), weights_of(base.parent / "triton")
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=4 * U, atol=64 * U)


def test_an_interrupted_union_goes_on_and_no_other_vocabulary_does(toys, monkeypatch):
    base, models = toys
    want = bytes_of(union_folder(toys).rename(base.parent / "want"))
    write, seen = _write, []

    def dying(*arguments):
        seen.append(1)
        if len(seen) > 2:
            raise KeyboardInterrupt
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(into_write, "_write", dying)
        with pytest.raises(KeyboardInterrupt):
            union_folder(toys)
    kept = (models[1] / "tokenizer.json").read_text()
    write_tokenizer(models[1], numbered("to", "be", "or", "<b>", "<c>"))  # the weights are what they were
    with pytest.raises(OutputError, match=r"with another vocab \(it was union of 5 tokens \w+, now union of 6 tokens"):
        union_folder(toys)
    (models[1] / "tokenizer.json").write_text(kept)
    base_rows = [save_toy(base.parent / str(i), numbered("to", "be", "or"), 4, seed=i) for i in (1, 2, 3)]
    with pytest.raises(OutputError, match="an unfinished merge is in"):
        merge_engine.merge_models(base, base_rows, base.parent / "out")
    assert main(["merge-models", "--base", str(base), *map(str, models), "-o", str(base.parent / "out")]) == 2
    out = base.parent / "out"
    assert merge_engine.merge_models(base, models, out, vocab="union").resumed == 2
    assert bytes_of(out) == want


def test_base_and_union_are_not_one_run(tmp_path, monkeypatch):
    """Models of one vocabulary, of which both could be: the journal tells them apart."""
    base, tuned = (save_toy(tmp_path / name, numbered("to"), 1, seed=i) for i, name in enumerate(["base", "tuned"]))
    with monkeypatch.context() as patch:
        patch.setattr(into_write, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge_engine.merge_models(base, [tuned], tmp_path / "out")
    with pytest.raises(OutputError, match=r"with another vocab \(it was base, now union of 1 tokens"):
        merge_engine.merge_models(base, [tuned], tmp_path / "out", vocab="union")


TOGETHER = """
import os, sys
import torch.distributed
from merge_engine.cli.main import main
store, *words = sys.argv[1:]
other = os.fork()
rank = int(other == 0)
os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
code = main(words)
torch.distributed.destroy_process_group()
sys.exit(code or (os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) if other else 0))
"""


def test_several_processes_and_the_command_write_the_same(toys, capsys):
    base, models = toys
    words = ["merge-models", "--base", base, *models, "--vocab", "union", "--shard-size", "60B"]
    words = list(map(str, words))
    assert main([*words, "-o", str(base.parent / "dry"), "--dry-run"]) == 0
    want = union_folder(toys, shard_size=60)
    total = sum(file.stat().st_size for file in want.glob("*.safetensors"))
    assert f"{total / 1e9:.3g} GB" in capsys.readouterr().out and not (base.parent / "dry").exists()
    done = subprocess.run(
        [sys.executable, "-c", TOGETHER, str(base.parent / "store"), *words, "-o", str(base.parent / "two")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert bytes_of(base.parent / "two") == bytes_of(want)
    assert main(["merge", str(models[0]), "-o", str(base.parent / "no"), "--vocab", "union"]) == 2
    assert "vocab: is of merges into a full model" in capsys.readouterr().err


def rewrite(folder, name, **changes):
    file = folder / name
    value = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**value, **changes}))


def test_mergekits_recipes_may_ask_for_a_union(toys):
    base, models = toys
    entries = [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(models, WEIGHTS, strict=True)]
    asked = {"merge_method": "task_arithmetic", "base_model": str(base), "models": entries, "tokenizer_source": "union"}
    merge_recipe(asked, base.parent / "theirs")
    out = union_folder(toys, method="linear", convention="mergekit", weights=WEIGHTS)
    ours, theirs = weights_of(out), weights_of(base.parent / "theirs")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_every_tokenizer_file_tells_of_the_added_tokens(toys):
    """As transformers 4 saves them; what else they hold stays, and the card and the report list the tokens."""
    base, models = toys
    decoder = {"0": {key: value for key, value in entry(0, "to").items() if key != "id"}}
    rewrite(base, "tokenizer_config.json", added_tokens_decoder=decoder, model_max_length=9, pad_token="to")
    rewrite(base, "special_tokens_map.json", additional_special_tokens=["be"], pad_token="to")
    rewrite(base, "added_tokens.json", to=0)
    rewrite(models[1], "added_tokens.json", **{"<plain>": 5})  # nothing more is known of it
    out = union_folder(toys)
    config, special, added, whole = (
        json.loads((out / name).read_text())
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")
    )
    assert config["model_max_length"] == 9 and config["additional_special_tokens"] == ["<a>", "<b>"]
    assert list(config["added_tokens_decoder"]) == ["0", "3", "4", "5"]
    assert config["added_tokens_decoder"]["4"] == {key: value for key, value in entry(4, "<b>").items() if key != "id"}
    assert special == {"additional_special_tokens": ["be", "<a>", "<b>"], "pad_token": "to"}
    assert added == {"to": 0, "<a>": 3, "<b>": 4, "<plain>": 5}
    assert whole["added_tokens"] == [entry(3, "<a>"), entry(4, "<b>"), entry(5, "<plain>", special=False)]
    assert whole["model"] == json.loads((base / "tokenizer.json").read_text())["model"]
    assert report_of(out)["added_tokens"] == {"<a>": 3, "<b>": 4, "<plain>": 5}
    card = (out / "README.md").read_text()
    assert "vocab: union" in card and '| `"<b>"` | 4 |' in card


def test_vocabularies_inside_a_part_of_the_configuration(tmp_path):
    folders = [
        save_toy(tmp_path / str(i), numbered("to", *added), 1 + len(added), seed=i, text_config={"vocab_size": 1})
        for i, added in enumerate([[], ["<a>"]])
    ]
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        del config["vocab_size"]
        (folder / "config.json").write_text(json.dumps(config))
    merge_engine.merge_models(folders[0], folders[1:], tmp_path / "out", vocab="union")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"tie_word_embeddings": False, "text_config": {"vocab_size": 2}}


def test_more_added_tokens_than_a_card_can_list(tmp_path):
    names = [f"<|{number}`|>" for number in range(70)]
    base = save_toy(tmp_path / "base", numbered("to"), 1)
    tuned = save_toy(tmp_path / "tuned", numbered("to", *names), 71, seed=1)
    card = (union_folder((base, [tuned])) / "README.md").read_text()
    assert '| `"<\\u007c63\\u0060\\u007c>"` | 64 |' in card and "and 6 more, listed in" in card
    assert report_of(tmp_path / "out")["added_tokens"] == {name: 1 + i for i, name in enumerate(names)}


def no_tokenizer(base, chat):
    (chat / "tokenizer.json").unlink()


def no_tokenizer_in_the_base(base, chat):
    (base / "tokenizer.json").unlink()


def torn(base, chat):
    (chat / "tokenizer.json").write_text('{"model": {')


def no_object(base, chat):
    (chat / "tokenizer_config.json").write_text("[]")


def no_content(base, chat):
    rewrite(chat, "tokenizer.json", added_tokens=[{"id": 3}])


def no_number(base, chat):
    rewrite(chat, "added_tokens.json", **{"<z>": "3"})


def no_tokens(base, chat):
    write_tokenizer(chat, {})


def too_many(base, chat):
    write_tokenizer(chat, numbered("to", "be", "or", "<a>", "<z>"))


def too_many_in_the_base(base, chat):
    write_tokenizer(base, numbered("to", "be", "or", "not", "even"))


def two_at_one(base, chat):
    rewrite(chat, "added_tokens.json", **{"<z>": 1})


def one_at_two(base, chat):
    rewrite(chat, "added_tokens.json", be=3)


def other_words(base, chat):
    write_tokenizer(chat, numbered("to", "be", "or", "not"))


def other_rules(base, chat):
    write_tokenizer(chat, numbered("to", "be", "or", "<a>"), continuing_subword_prefix="##")


def a_hole(base, chat):
    write_tokenizer(base, {"to": 0, "be": 1, "or": 3})


def no_embedding(base, chat):
    rewrite(base, "config.json", vocab_size=77)


def uneven(base, chat):
    save_file({**weights_of(chat), "lm_head.weight": torch.zeros(5, WIDTH)}, chat / "model.safetensors")


def narrow(base, chat):
    save_file({**weights_of(chat), KEYS[0]: torch.zeros(4, WIDTH + 1)}, chat / "model.safetensors")


def nothing(base, chat):
    save_file({"model.norm.weight": torch.zeros(WIDTH)}, chat / "model.safetensors")


def not_finite(base, chat):
    tensors = weights_of(chat)
    tensors["lm_head.weight"][3, 1] = float("nan")
    save_file(tensors, chat / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_tokenizer, "chat: {chat} has no tokenizer.json, wanted one to align its tokens with those of others"),
        (no_tokenizer_in_the_base, "base: {base} has no tokenizer.json, wanted one to align"),
        (torn, "chat: its tokenizer files cannot be read: JSONDecodeError: "),
        (no_object, "chat: its tokenizer files cannot be read: ValueError: tokenizer_config.json holds a list, wanted"),
        (no_content, "chat: its tokenizer files cannot be read: KeyError: 'content'"),
        (no_number, "chat: its tokenizer files cannot be read: ValueError: '<z>' has the index '3'"),
        (no_tokens, "chat: tokenizer.json has no tokens"),
        (too_many, "chat: its tokenizer has <z> at 4, wanted an index below 4, the rows of "),
        (too_many_in_the_base, "base: its tokenizer has even at 4, wanted an index below 4, the rows of "),
        (two_at_one, "chat: its tokenizer has both be and <z> at 1"),
        (one_at_two, "chat: its tokenizer has be at 1 and at 3"),
        (other_words, "chat: its tokenizer's model has tokens that base has not (not), wanted them among its added "),
        (other_rules, "chat: the continuing_subword_prefix of its tokenizer's model are not those of base: wanted "),
        (a_hole, "base: its tokenizer has 3 tokens and the highest index 3, wanted no index free below the tokens to "),
        (no_embedding, "base: wanted an embedding of vocab_size rows as config.json says, got none"),
        (uneven, "chat: "),
        (narrow, "chat: model.embed_tokens.weight is [4, 4], wanted [4, 3] as in base"),
        (nothing, "chat: wanted tensor "),
        (not_finite, "chat: tensor lm_head.weight in {chat}/model.safetensors holds NaN"),
    ],
)
def test_vocabularies_that_cannot_be_united(toys, spoil, message):
    base, (chat, *_) = toys
    spoil(base, chat)
    before = {path.name for path in base.parent.iterdir()}
    with pytest.raises(MergeError) as error:
        union_folder((base, [chat]))
    assert str(error.value).startswith(message.format(base=base, chat=chat)) and "\n" not in str(error.value)
    assert {path.name for path in base.parent.iterdir()} == before
    if spoil is uneven:
        assert "rows, wanted" in str(error.value)


def test_only_two_vocabularies_are_known(toys):
    with pytest.raises(RecipeError, match=r"^vocab: wanted base or union, got 'all'$"):
        merge_engine.merge_models(toys[0], toys[1], "out", vocab="all")


def test_rules_of_older_and_newer_files_are_one(tmp_path):
    """Merges as strings and as pairs, and what is off left out or said; scores count, indices do not."""

    def saved(name, model):
        folder = save_toy(tmp_path / name, {}, 4)
        (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))
        return open_checkpoint(folder)

    old = saved("old", {"type": "BPE", "vocab": numbered("a", "b", "ab"), "merges": ["a b"]})
    new = {"type": "BPE", "vocab": numbered("b", "ab", "a"), "merges": [["a", "b"]], "ignore_merges": False}
    other = saved("new", {**new, "dropout": 0.1, "unk_token": None})
    union = unite(old, [other])
    assert union.places[other].tolist() == [1, 2, 0, 3] and not union.added
    with pytest.raises(ModelError, match=r"^other: the merges of its tokenizer's model are not those of old"):
        unite(old, [saved("other", {**new, "merges": [["b", "a"]]})])
    pieces = [["<unk>", 0.0], ["a", -1.5], ["b", -2.0]]
    scored = saved("scored", {"type": "Unigram", "unk_id": 0, "vocab": pieces})
    turned = saved("turned", {"type": "Unigram", "unk_id": 2, "vocab": pieces[::-1]})
    assert unite(scored, [turned]).places[turned].tolist() == [2, 1, 0, 3]
    with pytest.raises(ModelError, match=r"^rescored: the vocab of its tokenizer's model are not those of scored"):
        unite(scored, [saved("rescored", {"type": "Unigram", "unk_id": 0, "vocab": [*pieces[:2], ["b", -3.0]]})])


# Real Llamas with tokenizers of their own.


def make_tokenizer(kind, added=(), order=None):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "WordLevel":
        words = [WORDS[i] for i in order] if order else WORDS
        tokenizer = Tokenizer(models.WordLevel(numbered(*words), unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.BpeTrainer(vocab_size=24, special_tokens=["<unk>"], show_progress=False)
        tokenizer.train_from_iterator(["to be or not to be", "bento robot not"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    for token in added:
        fast.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    return fast


def save_llama(folder, tokenizer, seed, *, tied=False, rows=None, shards=None):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=rows or len(tokenizer), tie_word_embeddings=tied, **sizes)
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(eighths(generator, *weight.shape))
    model.save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    tokenizer.save_pretrained(folder)
    return folder


def opened(folder):
    """What transformers makes of a folder: tokenizer, model, and rows of embedding and head by token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    layers = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    rows = {name: {t: layer.weight[i] for t, i in tokenizer.get_vocab().items()} for name, layer in layers.items()}
    return SimpleNamespace(tokenizer=tokenizer, model=model, **rows)


@pytest.mark.parametrize("kind", ["WordLevel", "BPE"])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_two_llamas_that_added_other_tokens_at_one_index(tmp_path, kind, tied):
    """The merged model answers with the right embedding for both, and for those of the base."""
    plain = make_tokenizer(kind)
    base = save_llama(tmp_path / "base", plain, 0, tied=tied, shards="1KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    chat = save_llama(tmp_path / "chat", make_tokenizer(kind, ["<chat>", "<both>"]), 1, tied=tied)
    code = save_llama(tmp_path / "code", make_tokenizer(kind, ["<code>", "<tool>", "<both>"]), 2, tied=tied)
    math = save_llama(tmp_path / "math", plain, 3, tied=tied)
    options = {"method": "ties", "density": 0.5, "weights": WEIGHTS, "shard_size": 600, "vocab": "union"}
    merge_engine.merge_models(base, [chat, code, math], tmp_path / "out", **options)
    got, start, *models = map(opened, (tmp_path / "out", base, chat, code, math))

    size, added = len(plain), ["<chat>", "<both>", "<code>", "<tool>"]
    assert got.tokenizer.convert_tokens_to_ids(added) == list(range(size, size + 4))
    assert got.tokenizer.get_vocab().items() >= plain.get_vocab().items()
    assert got.model.config.vocab_size == len(got.tokenizer) == size + 4
    assert set(added) <= set(got.tokenizer.all_special_tokens)
    ids = got.tokenizer("to be<code>or <chat> not<both>").input_ids
    assert got.tokenizer.convert_ids_to_tokens(ids) == [
        *plain.tokenize("to be"),
        "<code>",
        "or",
        "<chat>",
        "not",
        "<both>",
    ]
    assert got.tokenizer.decode(ids, skip_special_tokens=True).split() == "to be or not".split()
    for part in ("embedding", "head"):
        rows, before, (one, two, three) = getattr(got, part), getattr(start, part), [getattr(m, part) for m in models]
        assert torch.equal(rows["<chat>"], one["<chat>"])
        assert torch.equal(rows["<code>"], two["<code>"]) and torch.equal(rows["<tool>"], two["<tool>"])
        assert torch.equal(rows["<both>"], (one["<both>"] + two["<both>"]) / 2)
        words = sorted(plain.get_vocab(), key=plain.get_vocab().get)
        tasks = [torch.stack([(m[word] - before[word]).double() for word in words]) for m in (one, two, three)]
        for word, merged in zip(words, ties(tasks, WEIGHTS, 0.5), strict=True):
            want = before[word].double() + merged
            assert torch.all((rows[word].double() - want).abs() <= 2 * U * (want.abs() + merged.abs()))
    tied_now = got.model.get_input_embeddings().weight.data_ptr() == got.model.get_output_embeddings().weight.data_ptr()
    assert tied_now == tied and ("lm_head.weight" in weights_of(tmp_path / "out")) == (not tied)
    assert got.model(**got.tokenizer("to be <chat>", return_tensors="pt")).logits.isfinite().all()
    before = got.model.get_input_embeddings().weight.clone()
    got.model.resize_token_embeddings(len(got.tokenizer))
    assert torch.equal(got.model.get_input_embeddings().weight, before)
    got.tokenizer.add_tokens(["<late>"])
    assert got.tokenizer.convert_tokens_to_ids("<late>") == size + 4
    got.model.resize_token_embeddings(len(got.tokenizer))
    assert torch.equal(got.model.get_input_embeddings().weight[: size + 4], before)


@torch.no_grad()
def test_llamas_with_padding_and_words_in_another_order(tmp_path):
    """Tokens that took the place of the base's padding stay inside it; words are found at whatever index."""
    plain = make_tokenizer("WordLevel")
    base = save_llama(tmp_path / "base", plain, 0, rows=8)
    chat = save_llama(tmp_path / "chat", make_tokenizer("WordLevel", ["<chat>"]), 1, rows=8)
    code = save_llama(tmp_path / "code", make_tokenizer("WordLevel", ["<code>"], order=[0, 4, 2, 1, 3]), 2, rows=16)
    merge_engine.merge_models(base, [chat, code], tmp_path / "out", method="linear", weights=[0.5, 2.0], vocab="union")
    got, start, one, two = map(opened, (tmp_path / "out", base, chat, code))
    assert got.model.config.vocab_size == 8 and len(got.tokenizer) == 7
    assert got.tokenizer("not <code> to <chat>").input_ids == [4, 6, 1, 5]
    for part in ("embedding", "head"):
        rows, before, first, second = (getattr(each, part) for each in (got, start, one, two))
        for word in WORDS:
            want = before[word] + 0.5 * (first[word] - before[word]) + 2 * (second[word] - before[word])
            assert torch.equal(rows[word], want)
        assert torch.equal(rows["<chat>"], first["<chat>"]) and torch.equal(rows["<code>"], second["<code>"])
    got.model.resize_token_embeddings(len(got.tokenizer))
    assert torch.equal(got.model.get_input_embeddings().weight[5], one.embedding["<chat>"])
