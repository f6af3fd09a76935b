"""Layers that adapters hold whole: carried over where they agree, or where only one has them; else as asked for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft_models import SCORE, classifier, edit_tensors, llama, saved
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification

import merge_engine
from merge_engine.errors import AdapterError, RecipeError
from merge_engine.files.weights import StoredTensor
from merge_engine.formats.extras import AverageTensor, carried_over

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def stored(tensor):
    return StoredTensor("t", None, tuple(tensor.shape), tensor.dtype, mapped=tensor)


def heads(tmp_path):
    """Two classifiers whose heads differ, and an adapter of the same layers without one; the two heads."""
    edit_tensors(classifier(tmp_path / "two", seed=1), lambda t: t.update({SCORE: t[SCORE] * 3 + 1}))
    plain = saved(tmp_path / "plain", r=4, target_modules=["q_proj"])
    folders = [classifier(tmp_path / "one"), tmp_path / "two", plain]
    return folders, [load_file(folder / "adapter_model.safetensors")[SCORE] for folder in folders[:2]]


def head_of(folder):
    """The head as PEFT has it once the adapter is loaded."""
    model = PeftModel.from_pretrained(llama(LlamaForSequenceClassification), folder)
    return model.base_model.model.score.modules_to_save["default"].weight.detach()


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(2, 5),
    shape=st.lists(st.integers(0, 5), max_size=3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 10**6),
    elements=st.integers(1, 20),
)
def test_the_average_is_the_mean_in_float64_rounded_once(count, shape, dtype, seed, elements):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]
    want = (torch.stack([tensor.double() for tensor in tensors]).sum(0) / count).to(dtype)
    owners = [(str(number), {"t": stored(tensor)}) for number, tensor in enumerate(tensors)]
    average = carried_over(owners, "average")["t"]
    same = all(torch.equal(tensor, tensors[0]) for tensor in tensors)
    assert isinstance(average, AverageTensor) or same
    got = average.read()
    assert (got.shape, got.dtype) == (torch.Size(shape), dtype)
    torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps if dtype == torch.float64 else 0, atol=0)
    if isinstance(average, AverageTensor):
        average = AverageTensor("t", None, tuple(shape), dtype, parts=average.parts)
        pieces = [piece.clone() for piece in average.pieces(elements)]
        assert not pieces or torch.equal(torch.cat(pieces), got.reshape(-1))
    assert carried_over(owners, "first")["t"].read().equal(tensors[0])


@pytest.mark.quick
def test_a_head_that_only_one_adapter_has_is_carried_over(tmp_path):
    (one, _, plain), (head, _) = heads(tmp_path)
    for number, folders in enumerate(([one, plain], [plain, one])):
        merge_engine.merge(folders, tmp_path / f"out{number}", method="linear")
        assert torch.equal(head_of(tmp_path / f"out{number}"), head)


@pytest.mark.parametrize("way", ["merge", "merge_many", "Session"])
def test_heads_that_differ(tmp_path, way):
    folders, (first, second) = heads(tmp_path)

    def merged(saved, name):
        recipe = {"method": "linear", **({} if saved is None else {"saved": saved})}
        if way == "merge":
            return merge_engine.merge(folders, tmp_path / name, **recipe)
        if way == "Session":
            with merge_engine.Session(folders) as session:
                return session.merge(tmp_path / name, **recipe)
        return next(iter(merge_engine.merge_many(folders, [recipe], tmp_path, names=[name])))

    with pytest.raises(AdapterError, match=rf"{SCORE} differs between one and two; .*or saved average or first"):
        merged(None, "no")
    merged("average", "mean")
    assert torch.equal(head_of(tmp_path / "mean"), ((first.double() + second.double()) / 2).float())
    merged("first", "first")
    assert torch.equal(head_of(tmp_path / "first"), first)
    assert not (tmp_path / "no").exists()


def test_into_a_base_model(tmp_path):
    base, (folders, (first, second)) = tmp_path / "base", heads(tmp_path)
    llama(LlamaForSequenceClassification).save_pretrained(base)
    with pytest.raises(AdapterError, match=r"^score\.weight differs between one and two"):
        merge_engine.merge_into(base, folders, tmp_path / "no", method="linear")
    for saved_, want in (("average", ((first.double() + second.double()) / 2).float()), ("first", first)):
        merge_engine.merge_into(base, folders, tmp_path / saved_, method="linear", saved=saved_)
        assert torch.equal(load_file(tmp_path / saved_ / "model.safetensors")["score.weight"], want)


def test_what_cannot_be_averaged():
    one, two = torch.ones(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(AdapterError, match=r"^t differs between a and b: it is int64, which has no average; wanted"):
        carried_over([("a", {"t": stored(one)}), ("b", {"t": stored(two)})], "average")
    key = "base_model.model.emb.base_layer.weight"
    copies = [("a", {key: stored(torch.ones(2))}), ("b", {key: stored(torch.zeros(2))})]
    for saved_ in (None, "average", "first"):
        with pytest.raises(AdapterError, match=rf"^{key} differs between a and b: they were trained on different base"):
            carried_over(copies, saved_)
    with pytest.raises(AdapterError, match=r"^t differs: a has \[3\] int64, b has \[2\] float32"):
        carried_over([("a", {"t": stored(one)}), ("b", {"t": stored(torch.ones(2))})], "first")
    with pytest.raises(RecipeError, match=r"^saved: wanted average or first, got 'last'"):
        merge_engine.Recipe(saved="last")
