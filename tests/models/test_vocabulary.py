"""Unions of vocabularies: rows by token, against float64."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from toy_models import bytes_of, weights_of
from toy_vocabularies import KEYS, WIDTH, WORDS, numbered, report_of, save_toy, ties, union_folder

import merge_engine
from merge_engine.cpu.mask import keep_mask
from merge_engine.errors import RecipeError
from merge_engine.models import finetuned as models_finetuned
from merge_engine.rules import reference
from merge_engine.rules.philox import stream_id
from merge_engine.rules.rule import make_rule

WEIGHTS = [1.0, 0.5, -2.0]  # powers of two: with whole eighths, sums of their products are exact
U = 2.0**-24  # half a step of float32


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


def linear(tasks, weights, density):
    return sum(weight * task for weight, task in zip(weights, tasks, strict=True))


@settings(max_examples=25)
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


@pytest.mark.quick
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
    assert {name for name in one | other if one.get(name) != other.get(name)} == {
        "README.md",
        "merge_report.json",
        "recipe.yaml",
    }
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


def test_triton_merges_unions_too(toys):
    pytest.importorskip("triton")
    base, models = toys
    for backend in ("torch", "triton"):
        merge_engine.merge_models(base, models, base.parent / backend, backend=backend, density=0.5, vocab="union")
    one, other = weights_of(base.parent / "torch"), weights_of(base.parent / "triton")
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=4 * U, atol=64 * U)


def test_only_two_vocabularies_are_known(toys):
    with pytest.raises(RecipeError, match=r"^vocab: wanted base or union, got 'all'$"):
        merge_engine.merge_models(toys[0], toys[1], "out", vocab="all")
