"""Adapters into a base model: against the textbook bit by bit, against PEFT, after kills, and by several processes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from lora_files import save_factors
from safetensors.torch import load_file, save_file

import merge_engine
from merge_engine.cli.main import main
from merge_engine.cpu.mask import keep_mask
from merge_engine.errors import MergeError, ModelError, OutputError
from merge_engine.files.safetensors_writer import SafetensorsWriter
from merge_engine.formats.checkpoint import open_checkpoint
from merge_engine.formats.open import open_adapter
from merge_engine.into import merge as into_merge
from merge_engine.into import resume as into_resume
from merge_engine.into import write as into_write
from merge_engine.into.job import make_job
from merge_engine.into.write import _costs, _share, _write
from merge_engine.rules import reference
from merge_engine.rules.philox import stream_id
from merge_engine.rules.recipe import Recipe
from merge_engine.rules.rule import make_rule

ROOT = Path(__file__).parents[2]
WEIGHTS = [2.0, 1.0, -0.5]  # powers of two: products with them are exact, fused or not
SHAPES = {
    "model.embed_tokens": (19, 12),
    "model.layers.0.q_proj": (12, 20),
    "model.layers.1.q_proj": (12, 20),
    "model.layers.1.up_proj": (31, 12),
    "model.norm": (12,),
    "lm_head": (19, 12),
}
ADAPTED = ("model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.1.up_proj")
CONFIG = {"model_type": "toy", "vocab_size": 19, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}


def save_base(folder, seed=0, dtype=torch.bfloat16, shapes=SHAPES, **config):
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    tensors["model.steps"] = torch.arange(5)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("hello")
    (folder / "modeling_toy.py").write_text("pass")
    (folder / "training_args.bin").write_bytes(b"no")
    return folder


def save_adapter(folder, seed, modules=ADAPTED, shapes=SHAPES, rank=4, whole=True, **config):
    """whole: factors of small whole numbers over 8, whose products are exact in float32."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        if whole:
            return torch.randint(-40, 41, shape, generator=generator) / 8
        return torch.randn(shape, generator=generator)

    sizes = {name: shapes[name] for name in modules}
    factors = {name: (draw(rank, columns), draw(rows, rank)) for name, (rows, columns) in sizes.items()}
    return save_factors(folder, factors, **config)


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path / "base")


@pytest.fixture
def three(tmp_path):
    return [save_adapter(tmp_path / name, seed) for seed, name in enumerate(["sql", "chat", "ads"], 1)]


def weights_of(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def bytes_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def textbook(folders, base, recipe, scale, density=0.4, seed=0):
    """{key: base + scale * reference(deltas) in float32, rounded once}."""
    adapters = [open_adapter(folder) for folder in folders]
    tasks = {}
    for number, adapter in enumerate(adapters):
        for name, module in adapter.modules.items():
            tasks.setdefault(name, {})[number] = reference.delta(*adapter.factors(name), module.scaling)
    masks = {
        name: {
            i: keep_mask(
                density,
                seed=seed,
                stream=stream_id(name, "delta"),
                adapter=i,
                rows=range(len(t)),
                columns=range(t.shape[1]),
            )
            for i, t in tensors.items()
        }
        for name, tensors in tasks.items()
    }
    rule = make_rule(**recipe)
    densities = {name: [density] * len(adapters) for name in tasks}
    merged = reference.merge_model(tasks, WEIGHTS, densities, rule, masks=masks, scale=scale)
    tensors = weights_of(base)
    return {
        f"{name}.weight": (tensors[f"{name}.weight"].float() + delta).to(tensors[f"{name}.weight"].dtype)
        for name, delta in merged.items()
    }


@pytest.mark.parametrize("method", ["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"])
@pytest.mark.parametrize("convention", ["peft", "paper", "mergekit"])
def test_every_tensor_is_base_plus_the_textbook_rounded_once(base, three, tmp_path, method, convention):
    recipe = {"method": method, "convention": convention}
    result = merge_engine.merge_into(base, three, tmp_path / "out", weights=WEIGHTS, scale=0.5, density=0.4, **recipe)
    got, before = weights_of(tmp_path / "out"), weights_of(base)
    want = textbook(three, base, recipe, 0.5)
    assert got.keys() == before.keys() and want.keys() < got.keys()
    for key, tensor in got.items():
        assert tensor.dtype == before[key].dtype
        if convention == "mergekit" and "dare" in method and key in want:  # the norms of a rescale sum in another order
            torch.testing.assert_close(tensor, want[key], rtol=2**-7, atol=2**-7)
        else:
            assert torch.equal(tensor, want.get(key, before[key])), key
    assert (result.merged, result.copied, result.resumed) == (3, 4, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_bases_of_other_dtypes(three, tmp_path, dtype):
    base = save_base(tmp_path / "base", dtype=dtype)
    merge_engine.merge_into(base, three, tmp_path / "out", method="ties", weights=WEIGHTS, scale=0.25, density=0.4)
    got, before = weights_of(tmp_path / "out"), weights_of(base)
    for key, want in textbook(three, base, {"method": "ties"}, 0.25).items():
        assert torch.equal(got[key], want) or dtype == torch.float64
        assert got[key].dtype == before[key].dtype == dtype
        torch.testing.assert_close(got[key], want, rtol=2**-22, atol=2**-22)


def test_real_factors_are_within_one_rounding(base, tmp_path):
    folders = [save_adapter(tmp_path / str(seed), seed, whole=False) for seed in range(3)]
    merge_engine.merge_into(base, folders, tmp_path / "out", method="ties", weights=WEIGHTS, density=0.4)
    want, got = textbook(folders, base, {"method": "ties"}, 1.0), weights_of(tmp_path / "out")
    for key in want:
        torch.testing.assert_close(got[key].float(), want[key].float(), rtol=2**-7, atol=2**-9)


def test_what_is_asked_for_as_dtype(base, three, tmp_path):
    merge_engine.merge_into(base, three, tmp_path / "out", method="linear", dtype="float32", weights=WEIGHTS)
    got, before = weights_of(tmp_path / "out"), weights_of(base)
    assert {tensor.dtype for tensor in got.values()} == {torch.float32, torch.int64}
    assert torch.equal(got["lm_head.weight"], before["lm_head.weight"].float())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    merge_engine.merge_into(base, three, tmp_path / "half", method="linear", dtype="float16", weights=WEIGHTS)
    for key, tensor in weights_of(tmp_path / "half").items():
        assert torch.equal(tensor, got[key].to(tensor.dtype))
    with pytest.raises(ModelError, match=r"q_proj\.weight has a value beyond 65504"):
        merge_engine.merge_into(base, three, tmp_path / "over", method="linear", dtype="float16", scale=1e6)
    for recipe in ({"scale": 1e38}, {"weights": [1e38, 1, 1], "scale": 1e3}, {"scale": 1e38, "dtype": "float32"}):
        with pytest.raises(ModelError, match=r"_proj\.weight has a value beyond 3\.\d+e\+38, the largest of"):
            merge_engine.merge_into(base, three, tmp_path / "over", method="linear", **recipe)
    assert not (tmp_path / "over").exists() and not (tmp_path / ".over.partial").exists()


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "cat"])
def test_factor_space(base, three, tmp_path, method):
    recipe = {"method": method, "space": "factors", "density": 0.4, "weights": WEIGHTS, "scale": 0.5}
    merge_engine.merge_into(base, three, tmp_path / "out", **recipe)
    merged = merge_engine.merge(three, **recipe).modules
    before, got = weights_of(base), weights_of(tmp_path / "out")
    for name, factors in merged.items():
        want = before[f"{name}.weight"].double() + factors.B.double() @ factors.A.double()
        torch.testing.assert_close(got[f"{name}.weight"].double(), want, rtol=2**-8, atol=2**-8 * want.abs().max())


@pytest.mark.parametrize(
    "recipe", [{"method": "ties"}, {"method": "dare_ties", "dtype": "float32"}, {"space": "factors"}]
)
def test_triton_merges_into_a_base_too(base, three, tmp_path, recipe):
    pytest.importorskip("triton")
    for backend in ("torch", "triton"):
        merge_engine.merge_into(base, three, tmp_path / backend, backend=backend, weights=WEIGHTS, **recipe)
    one, other = weights_of(tmp_path / "torch"), weights_of(tmp_path / "triton")
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype
        torch.testing.assert_close(tensor, other[key], rtol=2**-7, atol=2**-7)


def test_shards_and_what_lies_beside_them(base, three, tmp_path):
    merge_engine.merge_into(base, three, tmp_path / "one", weights=WEIGHTS)
    merge_engine.merge_into(base, three, tmp_path / "many", weights=WEIGHTS, shard_size=900)
    one, many = tmp_path / "one", tmp_path / "many"
    beside = {"config.json", "tokenizer.json", "chat_template.jinja", "modeling_toy.py", "README.md"}
    assert set(bytes_of(one)) == {*beside, "merge_report.json", "model.safetensors"}
    shards = sorted(path.name for path in many.glob("model-*.safetensors"))
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 2
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    whole, parts = weights_of(one), weights_of(many)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in whole.values())
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    for shard in shards:
        assert sum(t.numel() * t.itemsize for t in load_file(many / shard).values()) <= 900
    assert (one / "config.json").read_bytes() == (base / "config.json").read_bytes()
    report = json.loads((one / "merge_report.json").read_text())
    assert report["recipe"]["weights"] == WEIGHTS and report["inputs"] == [str(path) for path in three]
    card = (one / "README.md").read_text()
    assert "method: ties" in card and "module_" not in card
    assert {path.name for path in tmp_path.iterdir()} == {"base", "sql", "chat", "ads", "one", "many"}


def test_the_card_names_a_base_of_the_hub(base, three, tmp_path, repositories):
    """Its front matter, that is: the hub takes no local path there."""
    repositories["org/base"] = base
    for source, named in ((base, []), ("org/base", ["base_model: org/base"])):
        merge_engine.merge_into(source, three, tmp_path / "out", overwrite=True)
        front = (tmp_path / "out" / "README.md").read_text().split("---\n")[1]
        assert [line for line in front.splitlines() if line.startswith("base_model")] == named


@pytest.mark.parametrize("form", ["sharded", "bin", "sharded bin"])
def test_other_forms_of_the_base(base, three, tmp_path, form):
    merge_engine.merge_into(base, three, tmp_path / "want", weights=WEIGHTS)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tensors = load_file(other / "model.safetensors")
    (other / "model.safetensors").unlink()
    if form == "bin":
        torch.save(tensors, other / "pytorch_model.bin")
    else:
        stem, save = ("model", save_file) if form == "sharded" else ("pytorch_model", torch.save)
        ending = "safetensors" if form == "sharded" else "bin"
        names = [f"{stem}-{i}-of-2.{ending}" for i in (1, 2)]
        weight_map = {key: names[i % 2] for i, key in enumerate(tensors)}
        for name in names:
            save({key: tensors[key] for key in tensors if weight_map[key] == name}, other / name)
        (other / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    merge_engine.merge_into(other, three, tmp_path / "out", weights=WEIGHTS)
    want, got = weights_of(tmp_path / "want"), weights_of(tmp_path / "out")
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)


def peft_model(model, folder, **config):
    from peft import LoraConfig, get_peft_model

    made = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **config))
    made.save_pretrained(folder, save_embedding_layers=False)
    return made


def tiny_llama(tie=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 37, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tie))


def tiny_classifier():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = {"vocab_size": 37, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
    return BertForSequenceClassification(BertConfig(**shape, num_attention_heads=4))


def tiny_gpt2(tie=True):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"vocab_size": 37, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**shape, tie_word_embeddings=tie))


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (tiny_llama, {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]}),
        (tiny_gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
        (tiny_gpt2, {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
        (tiny_classifier, {"target_modules": ["word_embeddings", "query"]}),
        (lambda: tiny_gpt2(tie=False), {"target_modules": ["attn.c_proj", "lm_head"]}),
        (lambda: tiny_gpt2(tie=False), {"target_modules": ["c_attn", "c_proj", "lm_head"]}),
        (tiny_llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "use_rslora": True}),
        (lambda: tiny_llama(tie=True), {"target_modules": ["q_proj", "up_proj"]}),
    ],
    ids=["llama", "gpt2", "gpt2 squares", "classifier", "gpt2 squares and head", "gpt2 and head", "saved head", "tied"],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_one_adapter_is_pefts_merge_and_unload(tmp_path, make, config):
    """And transformers loads the result, whose logits are those of the adapted model."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make().save_pretrained(base)
    adapted = peft_model(make(), adapter, **config)
    if "modules_to_save" in config:
        with torch.no_grad():
            adapted.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
        adapted.save_pretrained(adapter, save_embedding_layers=False)
    merge_engine.merge_into(base, [adapter], tmp_path / "out", method="linear")
    ids = torch.arange(8)[None]
    model = type(make()).from_pretrained(tmp_path / "out")
    with torch.no_grad():
        want = adapted.eval()(input_ids=ids).logits
        got = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    merged = adapted.merge_and_unload().state_dict()
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, merged[key], rtol=1e-5, atol=1e-5)
    assert weights_of(tmp_path / "out").keys() == weights_of(base).keys()


def test_convolutions(tmp_path):
    torch.manual_seed(0)
    layers = {"one": torch.nn.Conv1d(6, 8, 3), "two": torch.nn.Conv2d(4, 6, (3, 5)), "point": torch.nn.Conv2d(4, 6, 1)}
    model = torch.nn.ModuleDict(layers)
    base = tmp_path / "base"
    base.mkdir()
    save_file({key: tensor.clone() for key, tensor in model.state_dict().items()}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    adapted = peft_model(model, tmp_path / "adapter", target_modules=list(layers))
    merge_engine.merge_into(base, [tmp_path / "adapter"], tmp_path / "out", method="linear")
    got = weights_of(tmp_path / "out")
    for key, tensor in adapted.merge_and_unload().state_dict().items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_of_a_tied_layer_is_refused(tmp_path, target):
    tiny_llama(tie=True).save_pretrained(tmp_path / "base")
    shapes = {"model.embed_tokens": (32, 37), "lm_head": (37, 32), "model.layers.0.self_attn.q_proj": (32, 32)}
    name = f"model.{target}" if target == "embed_tokens" else target
    adapter = save_adapter(tmp_path / "sql", 1, modules=["model.layers.0.self_attn.q_proj", name], shapes=shapes)
    with pytest.raises(
        ModelError, match=rf"^sql: {name} is tied to another layer of base, .*wanted a base saved untied"
    ):
        merge_engine.merge_into(tmp_path / "base", [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes_are_one_line_each(base, three, tmp_path, capsys):
    odd = save_adapter(tmp_path / "odd", 5, modules=["layers.0.q_proj"], shapes={"layers.0.q_proj": (12, 20)})
    wide = save_adapter(tmp_path / "wide", 5, modules=["lm_head"], shapes={"lm_head": (21, 12)})
    whole = save_base(tmp_path / "quantized", quantization_config={"bits": 4})
    broken = save_base(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    cases = [
        (
            base,
            [odd],
            {},
            "odd: wanted tensor layers.0.q_proj.weight in base for module layers.0.q_proj, got none; it ",
        ),
        (
            base,
            [wide],
            {},
            "wide: the delta of lm_head is [21, 12], wanted [19, 12] as lm_head.weight in base: vocabul",
        ),
        (base, three, {"rank": 4}, "rank: a merge into a base model is not cut to a rank"),
        (base, three, {"shard_size": "5 apples"}, "shard_size: wanted a size such as 5GB or 200MB, got '5 apples'"),
        (whole, three, {}, "quantized: config.json has a quantization_config"),
        (broken, three, {}, "broken: config.json cannot be read: "),
        (
            three[0],
            three,
            {},
            f"sql: {three[0]} is an adapter (adapter_config.json), wanted a full model (config.json)",
        ),
        (tmp_path / "none", three, {}, f"{tmp_path / 'none'} does not exist"),
        (base, [], {}, "adapters: wanted at least one, got none"),
    ]
    before = {path.name for path in tmp_path.iterdir()}
    for folder, adapters, recipe, message in cases:
        with pytest.raises(MergeError) as error:
            merge_engine.merge_into(folder, adapters, tmp_path / "out", **recipe)
        assert str(error.value).startswith(message) and "\n" not in str(error.value)
        assert {path.name for path in tmp_path.iterdir()} == before
    assert main(["merge", str(three[0]), "-o", str(tmp_path / "out"), "--dry-run"]) == 2
    assert "dry_run: is of merges into a full model" in capsys.readouterr().err
    assert main(["merge", "--into", str(broken), str(three[0]), "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_equals_the_api_and_a_dry_run_writes_nothing(base, three, tmp_path, capsys):
    options = ["--into", base, *three, "-o", tmp_path / "one", "--density", "0.3", "--shard-size", "1KB"]
    options = [str(option) for option in options]
    assert main(["merge", *options, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "3 inputs, 3 tensors merged, 4 copied" in out and "model-00001-of-0000" in out
    assert not list(tmp_path.glob("*one*"))
    assert main(["merge", *options]) == 0
    assert "3 tensors merged, 4 copied" in capsys.readouterr().out
    merge_engine.merge_into(base, three, tmp_path / "two", density=0.3, shard_size=1000)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    with pytest.raises(OutputError, match="already exists"):
        merge_engine.merge_into(base, three, tmp_path / "two")


def interrupt(monkeypatch, after):
    """A run that dies after some tensors."""
    write, seen = _write, []

    def dying(*arguments):
        seen.append(1)
        if len(seen) > after:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(into_write, "_write", dying)


def test_an_interrupted_run_goes_on_where_it_stopped(base, three, tmp_path, monkeypatch):
    recipe = {"method": "ties", "scope": "model", "density": 0.4, "shard_size": 900}
    merge_engine.merge_into(base, three, tmp_path / "want", **recipe)
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            merge_engine.merge_into(base, three, tmp_path / "out", **recipe)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.partial").exists()
    for change, message in [
        ({"density": 0.5}, r"with another density \(it was 0.4, now 0.5\)"),
        ({"weights": [1, 2, 3]}, "with another weights"),
        ({"shard_size": 901}, "with another shard_size"),
    ]:
        with pytest.raises(OutputError, match=message):
            merge_engine.merge_into(base, three, tmp_path / "out", **{**recipe, **change})
    with pytest.raises(OutputError, match="with another inputs"):
        merge_engine.merge_into(base, three[::-1], tmp_path / "out", **recipe)
    result = merge_engine.merge_into(base, three, tmp_path / "out", **recipe)
    assert result.resumed == 3
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "want")
    assert not (tmp_path / ".out.partial").exists()


def test_a_changed_input_is_not_resumed_with(base, three, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            merge_engine.merge_into(base, three, tmp_path / "out")
    shutil.rmtree(three[1])
    save_adapter(three[1], 99)
    with pytest.raises(OutputError, match=r"an unfinished merge is in .*, with another inputs"):
        merge_engine.merge_into(base, three, tmp_path / "out")


@pytest.mark.parametrize("where", ["data", "header", "journal"])
def test_a_flipped_bit_is_found_and_made_good(base, three, tmp_path, monkeypatch, caplog, where):
    merge_engine.merge_into(base, three, tmp_path / "want", shard_size=900)
    with monkeypatch.context() as patch:
        interrupt(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            merge_engine.merge_into(base, three, tmp_path / "out", shard_size=900)
    folder = tmp_path / ".out.partial"
    if where == "journal":
        with open(folder / ".journal.0", "ab") as file:
            file.write(b'{"tensor": "lm_head.weight", "sha2')
    else:
        first = json.loads((folder / ".journal.0").read_text().splitlines()[1])["tensor"]
        path = next(path for path in folder.glob("*.safetensors") if first in load_header(path))
        data = bytearray(path.read_bytes())
        length = int.from_bytes(data[:8], "little")
        data[10 if where == "header" else 8 + length + load_header(path)[first]["data_offsets"][0]] ^= 4
        path.write_bytes(data)
    result = merge_engine.merge_into(base, three, tmp_path / "out", shard_size=900)
    assert result.resumed == 5 if where == "journal" else result.resumed < 5
    assert ("is damaged, it is made again" in caplog.text) == (where != "journal")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "want")


def load_header(path):
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


BIG = {f"model.layers.{i}.up_proj": (257, 192) for i in range(24)}


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A base and two adapters that take a moment."""
    root = tmp_path_factory.mktemp("big")
    base = save_base(root / "base", shapes=BIG)
    adapters = [save_adapter(root / name, seed, BIG, BIG, whole=False) for seed, name in enumerate("ab")]
    return base, adapters


def command(base, adapters, out, *extra):
    words = ["merge", "--into", base, *adapters, "-o", out, "--method", "ties", "--shard-size", "300KB", *extra]
    return ["-m", "merge_engine", *map(str, words)]


def test_kills_at_random_moments(big, tmp_path):
    """Twenty times SIGKILL, then the same command: always the bytes of a run that nobody disturbed."""
    base, adapters = big
    merge_engine.merge_into(base, adapters, tmp_path / "want", method="ties", shard_size="300KB")
    arguments = command(base, adapters, tmp_path / "out")[2:]
    code = "import sys, merge_engine.into; from merge_engine.cli import main; print(flush=True); sys.stdin.read(1); "
    code += f"sys.exit(main({arguments}))"
    chance, killed, duration = random.Random(1), 0, None
    for _ in range(21):  # the first is not killed: it says how long one takes
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
        )
        child.stdout.readline()
        start = time.perf_counter()
        child.stdin.write("x")
        child.stdin.flush()
        if duration is None:
            assert child.wait() == 0
            duration = time.perf_counter() - start
        else:
            time.sleep(chance.uniform(0, duration))
            child.send_signal(signal.SIGKILL)
        child.communicate()
        killed += child.returncode == -signal.SIGKILL
        if (tmp_path / "out").exists():
            assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "want")
            shutil.rmtree(tmp_path / "out")
        elif chance.random() < 0.5:
            merge_engine.merge_into(base, adapters, tmp_path / "out", method="ties", shard_size="300KB")
            assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "want")
            shutil.rmtree(tmp_path / "out")
    assert killed > 10


def test_a_full_disk_is_one_error_and_can_be_resumed(big, tmp_path, monkeypatch):
    base, adapters = big
    recipe = {"method": "linear", "shard_size": "300KB"}
    merge_engine.merge_into(base, adapters, tmp_path / "want", **recipe)
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=False).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        (disk / "other").write_bytes(bytes(2_000_000))
        with pytest.raises(OutputError, match=r"out needs 0\.00 GB of disk, 0\.00 GB is free$"):
            merge_engine.merge_into(base, adapters, disk / "out", **recipe)
        assert {path.name for path in disk.iterdir()} == {"other"}
        with monkeypatch.context() as patch:
            patch.setattr(into_resume, "check_space", lambda *_: None)  # another process fills the disk meanwhile
            with pytest.raises(OutputError, match=r"cannot be written: No space left on device$"):
                merge_engine.merge_into(base, adapters, disk / "out", **recipe)
        assert not (disk / "out").exists()
        (disk / "other").unlink()
        assert merge_engine.merge_into(base, adapters, disk / "out", **recipe).resumed > 0
        assert bytes_of(disk / "out") == bytes_of(tmp_path / "want")
    finally:
        subprocess.run(["umount", disk], check=True)


def torchrun(ranks, arguments, **environment):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*start, *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("options", "counts"), [(("--scope", "model"), (1, 2, 3)), (("--convention", "paper"), (2,))])
def test_several_processes_write_the_bytes_of_one(big, tmp_path, options, counts):
    base, adapters = big
    for ranks in counts:
        done = torchrun(ranks, command(base, adapters, tmp_path / str(ranks), *options), OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("tensors merged") == 1
    merge_engine.merge_into(
        base, adapters, tmp_path / "here", method="ties", shard_size="300KB", **{options[0][2:]: options[1]}
    )
    for ranks in counts:
        assert bytes_of(tmp_path / "here") == bytes_of(tmp_path / str(ranks))


def test_several_processes_with_kernels_write_the_bytes_of_one(tmp_path):
    """Factors of -1, 0 and 1: nearly all magnitudes are equal in both modules. Of three processes one has no module."""
    pytest.importorskip("triton")
    base, generator = save_base(tmp_path / "base", dtype=torch.float32), torch.Generator().manual_seed(1)
    adapters = []
    for name, modules in (("sql", ADAPTED[:2]), ("ads", ADAPTED[1:2])):
        sides = [[torch.randint(-1, 2, shape, generator=generator) for shape in ((1, 20), (12, 1))] for _ in modules]
        factors = {module: (A.float(), B.float()) for module, (A, B) in zip(modules, sides, strict=True)}
        adapters.append(save_factors(tmp_path / name, factors))
    recipes = {
        "exact": {"density": 0.4},
        "keep": {"density": 0.4, "trim_ties": "keep"},
        "none": {"density": 0.0},
        "all": {"density": [1.0, 0.1]},
        "factors": {"density": 0.4, "space": "factors", "method": "magnitude_prune"},
    }
    common = {"method": "ties", "scope": "model", "backend": "triton"}
    (tmp_path / "merges.py").write_text(
        "import json, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from merge_engine import merge_into\n"
        "for output, recipe in json.loads(sys.argv[1]):\n"
        f"    merge_into({str(base)!r}, {list(map(str, adapters))}, output, **recipe)\n"
    )
    jobs = [(str(tmp_path / "three" / name), common | recipe) for name, recipe in recipes.items()]
    done = torchrun(3, [str(tmp_path / "merges.py"), json.dumps(jobs)], OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    for name, recipe in recipes.items():
        merge_engine.merge_into(base, adapters, tmp_path / "one" / name, **common | recipe)
        assert bytes_of(tmp_path / "one" / name) == bytes_of(tmp_path / "three" / name), name


def test_a_rank_that_dies_fails_the_run_and_can_be_resumed(big, tmp_path):
    base, adapters = big
    (tmp_path / "dies.py").write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from merge_engine import into\n"
        "from merge_engine.cli import main\n"
        "write, seen = _write, []\n"
        "def dying(*arguments):\n"
        "    seen.append(1)\n"
        "    if len(seen) > 4 and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return write(*arguments)\n"
        "into._write = dying\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = command(base, adapters, tmp_path / "out")
    done = torchrun(2, [str(tmp_path / "dies.py"), *arguments[2:]])
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    done = torchrun(2, arguments)
    assert done.returncode == 0, done.stderr
    assert "tensors found finished" in done.stdout
    merge_engine.merge_into(base, adapters, tmp_path / "want", method="ties", shard_size="300KB")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "want")


def test_adapters_alone_are_merged_by_one_process(big, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["merge", *map(str, big[1]), "-o", str(tmp_path / "out")]) == 2
    assert "ranks: adapters are merged into one by a single process" in capsys.readouterr().err


def test_memory_does_not_hold_the_model(tmp_path):
    """A base of 300 MB in tensors of 8 MB: the peak stays far below it, Numba's compiler (about 70 MB) not counted."""
    shapes = {f"layers.{i}.up_proj": (2048, 2048) for i in range(36)}
    base = tmp_path / "base"
    base.mkdir()
    with SafetensorsWriter(base / "model.safetensors", [f"{name}.weight" for name in shapes]) as writer:
        for name, shape in shapes.items():
            writer.add(f"{name}.weight", torch.zeros(shape, dtype=torch.bfloat16))
    (base / "config.json").write_text(json.dumps(CONFIG))
    adapters = [save_adapter(tmp_path / name, seed, shapes, shapes) for seed, name in enumerate("ab")]
    code = (
        "import torch, merge_engine, merge_engine.jit\n"
        "merge_engine.jit.loops()\n"
        "peak = lambda: int(next(l for l in open('/proc/self/status') if 'VmHWM' in l).split()[1]) / 1e3\n"
        "before = peak()\n"
        f"merge_engine.merge_into({str(base)!r}, {[str(a) for a in adapters]}, {str(tmp_path / 'out')!r})\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 200


def test_ranks_share_by_cost():
    from merge_engine.runtime.processes import Ranks

    costs = [5, 1, 1, 1, 8, 1, 1]
    shares = [Ranks(rank, 3).share(costs) for rank in range(3)]
    assert [i for share in shares for i in share] == list(range(7))
    assert max(sum(costs[i] for i in share) for share in shares) <= 10


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


def unfinished(base, adapters, tmp_path, monkeypatch, after=5):
    """The journal of a run that was interrupted after some tensors; its recipe is the default one."""
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        with pytest.raises(KeyboardInterrupt):
            merge_engine.merge_into(base, adapters, tmp_path / "out", shard_size=900)
    return tmp_path / ".out.partial" / ".journal.0"


def test_the_journal_has_the_hash_of_what_is_on_the_disk(base, three, tmp_path, monkeypatch):
    from xxhash import xxh3_128_hexdigest

    journal = unfinished(base, three, tmp_path, monkeypatch)
    entries = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    assert len({entry["tensor"] for entry in entries}) == 5
    found = {}
    for path in journal.parent.glob("*.safetensors"):
        data, header = path.read_bytes(), load_header(path)
        start = 8 + int.from_bytes(data[:8], "little")
        for key in header.keys() - {"__metadata__"}:
            begin, end = header[key]["data_offsets"]
            found[key] = xxh3_128_hexdigest(data[start + begin : start + end])
    assert entries == [{"tensor": entry["tensor"], "xxh3": found[entry["tensor"]]} for entry in entries]


@pytest.mark.parametrize("old", [5, 2])
def test_what_an_older_journal_says_is_made_again(base, three, tmp_path, monkeypatch, caplog, old):
    """Lines with SHA-256, which the version before wrote: nothing is taken over from them, nor looked at."""
    merge_engine.merge_into(base, three, tmp_path / "want", shard_size=900)
    journal = unfinished(base, three, tmp_path, monkeypatch)
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for entry in lines[1 : 1 + old]:
        entry["sha256"] = 2 * entry.pop("xxh3")
    journal.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    result = merge_engine.merge_into(base, three, tmp_path / "out", shard_size=900)
    assert result.resumed == 5 - old and "damaged" not in caplog.text
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "want")


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


def test_neither_base_nor_adapter_is_replaced(base, three, tmp_path):
    before = (base / "model.safetensors").read_bytes()
    for inputs, output in (([base, three], base), ([base, three], three[1]), ([base, [base]], base)):
        merge = merge_engine.merge_models if inputs[1] == [base] else merge_engine.merge_into
        for dry_run in (True, False):
            with pytest.raises(OutputError, match="which is merged; wanted another folder to write to"):
                merge(*inputs, output, method="linear", overwrite=True, dry_run=dry_run)
    assert (base / "model.safetensors").read_bytes() == before and (three[1] / "adapter_config.json").exists()


def test_a_dry_run_finds_that_the_output_exists(base, three, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="already exists; pass overwrite to replace it"):
        merge_engine.merge_into(base, three, tmp_path / "out", dry_run=True)
    assert merge_engine.merge_into(base, three, tmp_path / "out", dry_run=True, overwrite=True).path is None


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("biases", [{}, {"wide": 20}, {"wide": 12}, {"wide": 20, "tall": 20}], ids=str)
def test_a_square_weight_lies_as_those_beside_it(tmp_path, flag, biases):
    """Of a weight [12, 20] a bias says which side is out; where none says it, the adapter's flag does."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"wide": (12, 20), "tall": (20, 12), "square": (12, 12)}
    tensors = {f"layers.0.{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors |= {f"layers.0.{name}.bias": torch.zeros(size) for name, size in biases.items()}
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    factors = torch.randn(2, 12, generator=generator), torch.randn(12, 2, generator=generator)
    save_factors(tmp_path / "a", {"layers.0.square": factors}, lora_alpha=2, fan_in_fan_out=flag)
    of_both = pytest.raises(ModelError, match=r"square is square, and layers beside it in base are laid out both ways")
    with of_both if len(biases) == 2 else nullcontext():
        merge_engine.merge_into(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", method="linear")
    if len(biases) == 2:
        return
    turned = {20: True, 12: False}[biases["wide"]] if biases else flag
    delta = factors[1] @ factors[0]
    got = weights_of(tmp_path / "out")["layers.0.square.weight"] - tensors["layers.0.square.weight"]
    torch.testing.assert_close(got, delta.T if turned else delta, rtol=1e-5, atol=1e-5)


def test_a_saved_layer_may_come_with_its_original_and_twice(base, tmp_path):
    """As PEFT writes embeddings in modules_to_save where the vocabulary was resized."""
    head = torch.full((19, 12), 0.5)
    factors = {"model.layers.0.q_proj": (torch.ones(2, 20), torch.ones(12, 2))}
    stem, names = "base_model.model.lm_head", ("weight", "modules_to_save.weight", "original_module.weight")
    extras = {f"{stem}.{name}": tensor for name, tensor in zip(names, (head, head.clone(), head - 3), strict=True)}
    save_factors(tmp_path / "a", factors, extras, modules_to_save=["lm_head"])
    merge_engine.merge_into(base, [tmp_path / "a"], tmp_path / "out", method="linear")
    got = weights_of(tmp_path / "out")
    assert got.keys() == weights_of(base).keys() and torch.equal(got["lm_head.weight"], head.bfloat16())
    extras[f"{stem}.modules_to_save.weight"] = head + 1
    save_factors(tmp_path / "b", factors, extras, modules_to_save=["lm_head"])
    with pytest.raises(
        ModelError, match=r"^b: \S+lm_head\.modules_to_save\.weight would replace lm_head\.modules_to_s"
    ):
        merge_engine.merge_into(base, [tmp_path / "b"], tmp_path / "no", method="linear")


def test_a_kill_while_files_are_flushed_loses_nothing(base, three, tmp_path, monkeypatch):
    def killed(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(into_merge, "sync", killed)
    with pytest.raises(KeyboardInterrupt):
        merge_engine.merge_into(base, three, tmp_path / "out", method="linear")
    monkeypatch.undo()
    result = merge_engine.merge_into(base, three, tmp_path / "out", method="linear")
    assert result.resumed == result.merged + result.copied == len(weights_of(base))


def test_what_no_input_touches_may_be_infinite_and_cast(base, three, tmp_path):
    """As the mask of an attention layer, which some models have saved."""
    tensors = weights_of(base) | {"model.mask": torch.tensor([0, float("-inf")], dtype=torch.bfloat16)}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    merge_engine.merge_into(base, three, tmp_path / "out", method="linear", dtype="float32")
    assert weights_of(tmp_path / "out")["model.mask"].tolist() == [0, float("-inf")]
