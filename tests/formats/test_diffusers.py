"""LoRAs of image and video models as diffusers loads them, before and after a merge. The factors were trained."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
from image_models import ATTENTION, DATA, adapt, flux, loaded, stable_diffusion, stable_diffusion_xl, wan
from peft.utils import get_peft_model_state_dict

import merge_engine

WEIGHTS = (0.75, -1.5)
PIPELINES = {
    "unet": (stable_diffusion, ("unet", "text_encoder")),
    "flux": (flux, ("transformer", "text_encoder")),
}


def assert_merged(make, components, files, merged, weights=WEIGHTS):
    """What diffusers loads of `merged` is the weighted sum of what it loads of the inputs, to 1e-6 of its size."""
    got = loaded(make, merged, components)
    inputs = [loaded(make, file, components) for file in files]
    for component in components:
        assert got[component] and got[component].keys() == {name for each in inputs for name in each[component]}
        for name, delta in got[component].items():
            zero = torch.zeros_like(delta)
            want = sum(w * each[component].get(name, zero) for w, each in zip(weights, inputs, strict=True))
            assert want.norm() > 0
            assert (delta - want).abs().max() <= 1e-6 * want.abs().max(), (component, name)


def spelled_by_kohya(factors, alpha, names):
    """The tensors of PEFT as kohya's scripts would have written them: other names, and alpha as a tensor."""
    tensors = {}
    for key, tensor in factors.items():
        module, side = re.fullmatch(r"(.*)\.lora_([AB])\.weight", key).groups()
        stem = names(module)
        tensors[f"{stem}.lora_{'down' if side == 'A' else 'up'}.weight"] = tensor.contiguous()
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(float(alpha))
    return tensors


def kohya(file, target, alpha):
    # diffusers 0.42 finds no layers of transformers 5 for kohya's names of a text encoder's attention.
    factors = {key: tensor for key, tensor in load_file(file).items() if "self_attn" not in key}
    header = {"ss_base_model_version": "sd_v1", "ss_v2": "False"}
    save_file(spelled_by_kohya(factors, alpha, kohya_unet), target, header)
    return target


def kohya_unet(module):
    """As PEFT's example for Stable Diffusion does: the component's prefix, and underscores."""
    component, _, name = module.partition(".")
    start = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[component]
    return start + name.replace(".", "_")


@pytest.mark.parametrize("kind", PIPELINES)
def test_trained_loras_of_diffusers(tmp_path, kind):
    make, components = PIPELINES[kind]
    files = [DATA / f"{kind}_{name}.safetensors" for name in ("one", "two")]
    options = {"method": "linear", "weights": WEIGHTS, "dtype": "float32"}
    merge_engine.merge(files, tmp_path / "out.safetensors", **options)
    assert_merged(make, components, files, tmp_path / "out.safetensors")
    merge_engine.merge(files, tmp_path / "folder", **options)
    assert_merged(make, components, files, tmp_path / "folder")


@pytest.mark.parametrize("alphas", [(2, 6), (1.5, None)])
def test_trained_loras_with_the_names_of_kohya(tmp_path, alphas):
    files = [
        kohya(DATA / f"unet_{name}.safetensors", tmp_path / f"{name}.safetensors", alpha)
        for name, alpha in zip(("one", "two"), alphas, strict=True)
    ]
    out = tmp_path / "out.safetensors"
    merge_engine.merge(files, out, method="linear", weights=WEIGHTS, dtype="float32")
    assert_merged(stable_diffusion, ("unet", "text_encoder"), files, out)


def fused(file, target, alpha):
    """A Flux LoRA of diffusers with kohya's names, whose q, k and v are one layer: three factors side by side."""
    parts = {}
    for key, tensor in load_file(file).items():
        module, side = re.fullmatch(r"(.*)\.lora_([AB])\.weight", key).groups()
        parts.setdefault(module, {})[side] = tensor
    block = "transformer.transformer_blocks.0"
    stem = "lora_unet_double_blocks_0"
    qkv = [parts[f"{block}.attn.to_{part}"] for part in "qkv"]
    layers = {
        f"{stem}_img_attn_qkv": (torch.cat([p["A"] for p in qkv]), torch.block_diag(*(p["B"] for p in qkv))),
        f"{stem}_img_attn_proj": tuple(parts[f"{block}.attn.to_out.0"].values()),
        f"{stem}_img_mlp_2": tuple(parts[f"{block}.ff.net.2"].values()),
        "lora_unet_single_blocks_0_linear2": tuple(parts["transformer.single_transformer_blocks.0.proj_out"].values()),
    }
    layers["lora_te1_text_model_encoder_layers_0_mlp_fc1"] = tuple(
        parts["text_encoder.encoder.layers.0.mlp.fc1"].values()
    )
    tensors = {}
    for name, (down, up) in layers.items():
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up.contiguous()}
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha * len(down)))
    save_file(tensors, target)
    return target


def test_flux_with_the_names_of_kohya(tmp_path):
    files = [
        fused(DATA / f"flux_{name}.safetensors", tmp_path / f"{name}.safetensors", alpha)
        for name, alpha in (("one", 0.5), ("two", 1.0))
    ]
    out = tmp_path / "out.safetensors"
    merge_engine.merge(files, out, method="linear", weights=WEIGHTS, dtype="float32")
    assert_merged(flux, ("transformer", "text_encoder"), files, out)


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_stable_diffusion_xl(tmp_path, form):
    # Of kohya's names for text encoders diffusers 0.42 finds these layers of transformers 5, and none of the second.
    components = ("unet", "text_encoder", "text_encoder_2")[: 2 if form == "kohya" else 3]
    text = ["fc1"] if form == "kohya" else ["q_proj", "fc2"]
    targets = ([*ATTENTION, "conv2"], text, text)
    starts = ("lora_unet_", "lora_te1_text_model_")
    files = []
    for seed, (rank, alpha) in enumerate([(2, 3), (4, 1)]):
        pipeline, tensors, given = stable_diffusion_xl(), {}, {}
        for component, start, layers in zip(components, (*starts, ""), targets, strict=False):
            model = getattr(pipeline, component)
            adapt(model, rank, alpha, layers, seed)
            given[f"{component}_lora_layers"] = factors = get_peft_model_state_dict(model)
            given[f"{component}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
            tensors |= spelled_by_kohya(factors, alpha, lambda name, start=start: start + name.replace(".", "_"))
        files.append(tmp_path / f"{seed}.safetensors")
        if form == "diffusers":
            pipeline.save_lora_weights(tmp_path, weight_name=files[-1].name, **given)
        else:
            save_file(tensors, files[-1])
    out = tmp_path / "out.safetensors"
    merge_engine.merge(files, out, method="linear", weights=WEIGHTS)
    assert_merged(stable_diffusion_xl, components, files, out)


def name_of_sdxl(module):
    """The name that kohya's scripts give a layer of SDXL's UNet: with the blocks of Stability's code."""
    if (mid := re.fullmatch(r"mid_block\.(attentions|resnets)\.(\d)\.(.*)", module)) is not None:
        kind, number, rest = mid.groups()
        block = f"middle_block_{1 if kind == 'attentions' else 2 * int(number)}"
    else:
        way, i, kind, j, rest = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", module).groups()
        number = 3 * int(i) + int(j) + (way == "down")
        block = f"{'input' if way == 'down' else 'output'}_blocks_{number}_{int(kind == 'attentions')}"
    return f"lora_unet_{block}_{rest.replace('conv2', 'out_layers.3').replace('.', '_')}"


def test_stable_diffusion_xl_with_the_blocks_of_kohya(tmp_path):
    files = []
    for seed, (rank, alpha) in enumerate([(2, 3), (4, 1)]):
        model = stable_diffusion_xl().unet
        adapt(model, rank, alpha, [*ATTENTION, "conv2"], seed)
        files.append(tmp_path / f"{seed}.safetensors")
        save_file(spelled_by_kohya(get_peft_model_state_dict(model), alpha, name_of_sdxl), files[-1])
    out = tmp_path / "out.safetensors"
    merge_engine.merge(files, out, method="linear", weights=WEIGHTS)
    assert_merged(stable_diffusion_xl, ("unet",), files, out)


WAN = {f"attn1.to_{part}": f"self_attn.{part}" for part in "qkv"} | {"attn1.to_out.0": "self_attn.o"}
WAN |= {name.replace("attn1", "attn2"): other.replace("self", "cross") for name, other in WAN.items()}
WAN |= {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}


@pytest.mark.parametrize("form", ["musubi", "ai-toolkit", "diffusers"])
def test_wan(tmp_path, form):
    def name(module):
        _, block, layer = module.split(".", 2)
        return f"blocks.{block}.{WAN[layer]}"

    files = []
    for seed, (rank, alpha) in enumerate([(2, 3), (4, 4)]):
        pipeline = wan()
        adapt(pipeline.transformer, rank, alpha, list(WAN), seed)
        factors = get_peft_model_state_dict(pipeline.transformer)
        files.append(tmp_path / f"{seed}.safetensors")
        if form == "diffusers":
            given = {"transformer_lora_adapter_metadata": pipeline.transformer.peft_config["default"].to_dict()}
            pipeline.save_lora_weights(tmp_path, weight_name=files[-1].name, transformer_lora_layers=factors, **given)
        elif form == "musubi":
            save_file(
                spelled_by_kohya(factors, alpha, lambda module: f"lora_unet_{name(module).replace('.', '_')}"),
                files[-1],
            )
        else:
            split = {key: re.fullmatch(r"(.*)(\.lora_[AB]\.weight)", key).groups() for key in factors}
            renamed = {key: f"diffusion_model.{name(module)}{end}" for key, (module, end) in split.items()}
            save_file({renamed[key]: tensor for key, tensor in factors.items()}, files[-1])
    out = tmp_path / "out.safetensors"
    merge_engine.merge(files, out, method="linear", weights=WEIGHTS)
    assert_merged(wan, ("transformer",), files, out)
