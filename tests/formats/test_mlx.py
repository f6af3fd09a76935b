"""Adapters of MLX: what they mean, what a merge writes, and that mlx-lm loads it."""

import json

import pytest
import torch
from dense_merges import dense_merge
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import save_image
from lora_files import save_factors
from mlx_files import DOWN, LAYERS, SWITCH, Q, read_mlx, save_mlx
from peft_models import refused
from safetensors.torch import load_file, save_file

import merge_engine
from merge_engine.errors import AdapterError, ModelError, OutputError
from merge_engine.formats.open import open_adapter

WEIGHTS = [0.75, -1.5]
RECIPES = [{"method": "linear"}, {"method": "ties", "density": 0.4}, {"method": "tsv"}]


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.quick
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(
    rank=st.integers(1, 7),
    scale=st.sampled_from([20.0, 1, -0.5, 0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_deltas(tmp_path, rank, scale, dtype):
    wanted = save_mlx(tmp_path / "a", rank, scale, dtype=dtype)
    adapter = open_adapter(tmp_path / "a")
    assert (adapter.name, adapter.base_model) == ("a", "org/base")
    assert adapter.modules.keys() == wanted.keys() and len(wanted) == len(LAYERS) - 1 + LAYERS[SWITCH][0]
    for name, delta in wanted.items():
        A, B = adapter.factors(name)
        assert A.dtype == B.dtype == dtype and A.is_contiguous() and B.is_contiguous()
        assert torch.allclose(adapter.modules[name].scaling * B.double() @ A.double(), delta, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "recipe", [{"method": "linear"}, {"method": "ties", "density": 0.4}, {"method": "tsv"}], ids=str
)
def test_a_merge_against_float64(tmp_path, recipe):
    deltas = [save_mlx(tmp_path / "a", 3, 20.0), save_mlx(tmp_path / "b", 4, 0.5, seed=1)]
    tasks = {name: {number: each[name] for number, each in enumerate(deltas)} for name in deltas[0]}
    merge_engine.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", weights=WEIGHTS, rank=40, **recipe)
    want = dense_merge(tasks, {**recipe, "weights": WEIGHTS})
    got = read_mlx(tmp_path / "out")
    assert got.keys() == want.keys()
    for name, delta in got.items():
        assert (delta - want[name]).norm() <= 3e-6 * max(task.norm() for task in tasks[name].values()), name
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {"adapters.safetensors", "adapter_config.json", "README.md", "merge_report.json"}


def test_one_rank_and_the_configuration(tmp_path):
    save_mlx(tmp_path / "a", 3, 20.0, layers={Q: (4, 16), SWITCH: (3, 6, 10)}, keys=["self_attn.q_proj"])
    save_mlx(tmp_path / "b", 4, 2.0, seed=1, layers={Q: (4, 16), DOWN: (9, 20)}, keys=["mlp.down_proj"], num_layers=8)
    result = merge_engine.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", method="linear")
    assert {result.ranks[Q], result.ranks[DOWN], result.ranks[f"{SWITCH}.0"]} == {4, 3}
    shapes = {key: list(tensor.shape) for key, tensor in load_file(tmp_path / "out" / "adapters.safetensors").items()}
    assert shapes == {
        **{f"{Q}.lora_a": [16, 4], f"{Q}.lora_b": [4, 4], f"{DOWN}.lora_a": [20, 4], f"{DOWN}.lora_b": [4, 9]},
        **{f"{SWITCH}.lora_a": [3, 4, 10], f"{SWITCH}.lora_b": [3, 6, 4]},
    }
    keys = ["mlp.down_proj", "self_attn.q_proj"]
    parameters = {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": keys}
    common = {"fine_tune_type": "lora", "model": "org/base"}
    assert config_of(tmp_path / "out") == {**common, "num_layers": 8, "lora_parameters": parameters}
    save_mlx(tmp_path / "all", 3, 1.0, layers={DOWN: (9, 20)}, keys=None, num_layers=-1)
    merge_engine.merge([tmp_path / "a", tmp_path / "all"], tmp_path / "some", method="linear")
    assert config_of(tmp_path / "some")["num_layers"] == -1
    assert config_of(tmp_path / "some")["lora_parameters"]["keys"] == sorted([Q, DOWN, SWITCH])
    merge_engine.merge([tmp_path / "all", tmp_path / "all"], tmp_path / "none", method="linear")
    assert "keys" not in config_of(tmp_path / "none")["lora_parameters"]


def test_many_merges_and_sessions(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        save_mlx(folder, 3, 2.0, seed=seed)
    recipe = {"method": "ties", "rank": 5}
    merge_engine.merge(folders, tmp_path / "one", **recipe)
    (many,) = merge_engine.merge_many(folders, [recipe], tmp_path / "many")
    with merge_engine.Session(folders) as session:
        session.merge(tmp_path / "session", **recipe)
    for folder in (many.path, tmp_path / "session"):
        assert (folder / "adapters.safetensors").read_bytes() == (
            tmp_path / "one" / "adapters.safetensors"
        ).read_bytes()
    assert open_adapter(tmp_path / "one").family == open_adapter(folders[0]).family
    assert merge_engine.interference(folders).overall.norms[0] > 0


def parameters(**fields):
    return {"lora_parameters": {"rank": 3, "scale": 2.0, "keys": [], **fields}}


MALFORMED = {
    "DoRA": ({"fine_tune_type": "dora"}, "fine_tune_type is 'dora', wanted lora: DoRA rescales.*mlx_lm.fuse"),
    "full": ({"fine_tune_type": "full"}, "it holds whole weights; mlx_lm.fuse"),
    "no parameters": ({"lora_parameters": None}, "has no lora_parameters"),
    "no scale": (parameters(scale=None), "scale of lora_parameters is None, wanted a number"),
    "a scale of text": (parameters(scale="2"), "scale of lora_parameters is '2'"),
    "another rank": (parameters(rank=5), r"lora_a \[16, 3\] and lora_b \[3, 12\], wanted \[N, 5\].* rank 5 from"),
    "no rank": (parameters(rank=0), "rank of lora_parameters is 0, wanted a positive integer"),
    "keys": (parameters(keys="q_proj"), "keys of lora_parameters is 'q_proj', wanted a list"),
    "layers": ({"num_layers": "all"}, "num_layers is 'all', wanted a whole number"),
}
TENSORS = {
    "m": ({f"{Q}.m": torch.ones(12)}, f"tensor {Q}.m is DoRA's"),
    "unknown": ({f"{Q}.weight": torch.ones(12)}, "is unknown, wanted <module>.lora_a"),
    "one side": ({f"{DOWN}.x.lora_a": torch.ones(4, 3)}, "lora_a has no lora_b beside it"),
    "integers": ({f"{Q}.lora_a": torch.ones(16, 3, dtype=torch.int32)}, "is int32, wanted floating point"),
    "experts": ({f"{SWITCH}.lora_a": torch.ones(2, 3, 10)}, r"has lora_a \[2, 3, 10\] and lora_b \[3, 6, 3\], wanted"),
    "NaN": ({f"{Q}.lora_a": torch.full((16, 3), torch.nan)}, None),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_damaged_configuration_is_refused(tmp_path, case):
    fields, match = MALFORMED[case]
    save_mlx(tmp_path / "a", 3, 2.0, layers={Q: (12, 16)})
    config = config_of(tmp_path / "a") | fields
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    refused(tmp_path / "a", match=f"^a: .*{match}")


@pytest.mark.parametrize("case", TENSORS)
def test_other_tensors_are_refused(tmp_path, case):
    tensors, match = TENSORS[case]
    save_mlx(tmp_path / "a", 3, 2.0)
    file = tmp_path / "a" / "adapters.safetensors"
    save_file(load_file(file) | tensors, file)
    if match is None:
        with pytest.raises(AdapterError, match="holds NaN"):
            merge_engine.merge([tmp_path / "a"], tmp_path / "out", method="linear")
        assert not (tmp_path / "out").exists()
    else:
        refused(tmp_path / "a", match=match)


def test_what_does_not_go_together(tmp_path):
    save_mlx(tmp_path / "a", 3, 2.0)
    peft = save_factors(tmp_path / "peft", {Q: (torch.ones(2, 16), torch.ones(12, 2))})
    save_image(tmp_path / "image.safetensors", "kohya", 2)
    with pytest.raises(AdapterError, match=r"peft is PEFT's folder, a is MLX's folder: .*no tool converts them"):
        merge_engine.merge([tmp_path / "a", peft], tmp_path / "out")
    for folder in ("a is MLX's folder", "peft is PEFT's folder"):  # nothing makes one of the other
        with pytest.raises(AdapterError, match=f"image is kohya's file .*, {folder}: .* must be of one family$"):
            merge_engine.merge([tmp_path / folder.split()[0], tmp_path / "image.safetensors"], tmp_path / "out")
    with pytest.raises(OutputError, match=r"out\.safetensors is a file, wanted a folder"):
        merge_engine.merge([tmp_path / "a"], tmp_path / "out.safetensors", method="linear")
    with pytest.raises(OutputError, match="MLX's folder has one rank for all modules"):
        merge_engine.merge([tmp_path / "a"], tmp_path / "out", method="linear", ranks="own")
    with pytest.raises(ModelError, match=r"a is MLX's folder, which is not merged into a base here; mlx_lm.fuse"):
        merge_engine.merge_into(tmp_path / "base", [tmp_path / "a"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def mlx_model():
    llama = pytest.importorskip("mlx_lm.models.llama")
    import mlx.core as mx

    mx.random.seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 20, "num_attention_heads": 2}
    arguments = llama.ModelArgs(
        model_type="llama", rms_norm_eps=1e-5, vocab_size=30, num_key_value_heads=2, tie_word_embeddings=False, **sizes
    )
    return llama.Model(arguments)


def double(array):
    return torch.tensor(array.tolist(), dtype=torch.float64)


def test_mlx_lm_loads_what_is_written(tmp_path):
    """mlx-lm trains nothing here: its own layers get random factors, are saved by it, and loaded by it again."""
    mlx_model()
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

    def fused(model):
        """{module: its weight, with the adapter merged into it by mlx-lm}."""
        layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_a")}
        return {
            name: torch.tensor(module.fuse().weight.tolist(), dtype=torch.float64) for name, module in layers.items()
        }

    specs = {"a": (3, 20.0, 2, ["self_attn.q_proj", "mlp.down_proj"]), "b": (4, 0.5, 3, ["self_attn.q_proj"])}
    base = {name: value for name, value in tree_flatten(mlx_model().parameters())}
    weights = {name: double(value) for name, value in base.items()}
    deltas = []
    for seed, (name, (rank, scale, layers, keys)) in enumerate(specs.items()):
        model, folder = mlx_model(), tmp_path / name
        settings = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}
        linear_to_lora_layers(model, layers, settings)
        model.freeze()
        mx.random.seed(seed + 1)
        adapters = {
            key: 0.1 * mx.random.normal(value.shape)
            for key, value in tree_flatten(model.parameters())
            if key.rsplit(".", 1)[-1] in ("lora_a", "lora_b")
        }
        folder.mkdir()
        mx.save_safetensors(str(folder / "adapters.safetensors"), adapters)
        config = {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": settings}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        loaded = fused(load_adapters(mlx_model(), str(folder)))
        deltas.append({module: weight - weights[f"{module}.weight"] for module, weight in loaded.items()})
    merge_engine.merge([tmp_path / name for name in specs], tmp_path / "out", method="linear", weights=WEIGHTS)
    got = fused(load_adapters(mlx_model(), str(tmp_path / "out")))
    assert deltas[0].keys() | deltas[1].keys() <= got.keys()
    for name, weight in got.items():
        zero = torch.zeros_like(weight)
        want = sum(w * each.get(name, zero) for w, each in zip(WEIGHTS, deltas, strict=True))
        # Weights are about 0.3, and each was rounded to float32 where mlx-lm added the delta.
        assert ((weight - weights[f"{name}.weight"]) - want).abs().max() <= 1e-6, name
