"""LoRAs of image models: what files of each family mean, and what is no LoRA that can be merged."""

import json
import math
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import COMPONENTS, FAMILIES, KOHYA_MODULES, VIDEO, save_image
from peft_models import refused
from safetensors.torch import load_file, save_file

import merge_engine
from merge_engine.errors import AdapterError, MergeError
from merge_engine.formats.open import open_adapter

KOHYA = "lora_unet_down_blocks_0_attentions_0_to_q"
U32 = 2.0**-24


def deltas_of(adapter):
    return {
        name: module.scaling * B.double() @ A.double()
        for name, module in adapter.modules.items()
        for A, B in [adapter.factors(name)]
    }


@pytest.mark.quick
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    rank=st.integers(1, 9),
    alpha=st.none() | st.floats(-8, 64, allow_subnormal=False),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64]),
    mid=st.booleans(),
)
def test_deltas_of_every_family(tmp_path, family, rank, alpha, dtype, mid):
    file = tmp_path / "one.safetensors"
    mid = mid and FAMILIES[family][2] is not None
    wanted = save_image(file, family, rank, alpha=alpha and float(torch.tensor(alpha)), dtype=dtype, mid=mid)
    adapter = open_adapter(file)
    assert adapter.name == "one"
    got = deltas_of(adapter)
    assert got.keys() == wanted.keys()
    for name, delta in wanted.items():
        module = adapter.modules[name]
        A, B = adapter.factors(name)
        assert (module.rows, module.columns, module.rank) == (*delta.shape, rank)
        # A of three factors is rounded once to float32; a scaling, from a float32 alpha, once to float64.
        bound = 2 * U32 * abs(module.scaling) * B.double().abs() @ A.double().abs()
        assert ((got[name] - delta).abs() <= bound).all(), name


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    alphas=st.tuples(st.none() | st.sampled_from([0.5, 3.0]), st.none() | st.sampled_from([1.0, -7.0])),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])] * 2),
    mid=st.booleans(),
)
def test_a_sum_is_exact_whatever_the_ranks_and_alphas(tmp_path, family, ranks, alphas, dtypes, mid):
    mid = mid and FAMILIES[family][2] is not None
    wanted = []
    for number in (0, 1):
        file = tmp_path / f"{number}.safetensors"
        options = {"alpha": alphas[number], "dtype": dtypes[number], "mid": mid and number == 0, "seed": number}
        wanted.append(save_image(file, family, ranks[number], **options))
    files = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    out = tmp_path / "out.safetensors"
    merge_engine.merge(files, out, method="linear", weights=[0.5, -2.0], dtype="float32", overwrite=True)
    merged = open_adapter(out)
    assert {module.scaling for module in merged.modules.values()} == {1.0}
    assert len({module.rank for module in merged.modules.values()}) == 1
    for name, delta in deltas_of(merged).items():
        want = 0.5 * wanted[0][name] - 2.0 * wanted[1][name]
        size = 0.5 * wanted[0][name].norm() + 2.0 * wanted[1][name].norm()
        assert (delta - want).norm() <= 64 * U32 * size, name


def test_alpha_in_the_header_is_that_of_each_component(tmp_path):
    file = tmp_path / "one.safetensors"
    config = {"transformer.r": 4, "transformer.lora_alpha": 6, "transformer.alpha_pattern": {"blocks.0.conv": 8}}
    config |= {"text_encoder.r": 4, "text_encoder.lora_alpha": 2, "text_encoder.use_rslora": True}
    save_image(file, "diffusers", 4, header={"lora_adapter_metadata": json.dumps(config)})
    modules = open_adapter(file).modules
    assert modules["transformer.blocks.0.attn.to_q"].scaling == 1.5
    assert modules["transformer.blocks.0.conv"].scaling == 2.0
    assert modules["text_encoder.layers.0.mlp.fc1"].scaling == 2 / math.sqrt(4)


def test_alpha_may_be_of_any_dtype_and_shape_of_one_number(tmp_path):
    save_image(tmp_path / "a.safetensors", "kohya", 4)
    for alpha in (torch.tensor(3), torch.tensor([3.0]), torch.tensor(3.0, dtype=torch.bfloat16)):
        tensors = load_file(tmp_path / "a.safetensors") | {f"{KOHYA}.alpha": alpha}
        save_file(tensors, tmp_path / "b.safetensors")
        assert open_adapter(tmp_path / "b.safetensors").modules[KOHYA].scaling == 0.75


def test_two_dtypes_in_a_module(tmp_path):
    save_image(tmp_path / "a.safetensors", "kohya", 4)
    tensors = load_file(tmp_path / "a.safetensors")
    tensors[f"{KOHYA}.lora_up.weight"] = tensors[f"{KOHYA}.lora_up.weight"].half()
    save_file(tensors, tmp_path / "b.safetensors")
    A, B = open_adapter(tmp_path / "b.safetensors").factors(KOHYA)
    assert A.dtype == B.dtype == torch.float32
    assert torch.equal(B, tensors[f"{KOHYA}.lora_up.weight"].float())


@pytest.mark.quick
def test_a_folder_with_one_file_and_a_file_of_the_hub(tmp_path, repositories):
    folder = tmp_path / "style"
    folder.mkdir()
    save_image(folder / "pytorch_lora_weights.safetensors", "diffusers", 4)
    (folder / "README.md").write_text("A style.\n")
    assert open_adapter(folder).name == "style"
    assert open_adapter(folder).modules.keys() == COMPONENTS.keys()
    repositories["user/style"] = folder
    adapter = open_adapter("user/style:pytorch_lora_weights.safetensors")
    assert adapter.name == "pytorch_lora_weights" and adapter.modules.keys() == COMPONENTS.keys()
    assert adapter.source == "user/style:pytorch_lora_weights.safetensors"
    with pytest.raises(AdapterError, match=r"user/style has no adapter_config.json; .* as user/style:file.safetensors"):
        open_adapter("user/style")
    with pytest.raises(AdapterError, match=r"the repository user/style has no file other\.safetensors"):
        open_adapter("user/style:other.safetensors")
    save_image(folder / "second.safetensors", "diffusers", 4)
    refused(folder, match=r"has 2 files pytorch_lora_weights\.safetensors, second\.safetensors; wanted one of them")
    refused(tmp_path / "none.safetensors", match="does not exist")


REFUSED = {  # kind: (keys that such files hold, what the message says)
    "DoRA": (".dora_scale", "DoRA"),
    "LoHa": (".hada_w1_a", "LoHa"),
    "LoKr": (".lokr_w1", "LoKr"),
    "GLoRA": (".a1.weight", "GLoRA"),
    "OFT": (".oft_blocks", "OFT"),
    "BOFT": (".boft_R", "OFT"),
    "IA3": (".on_input", "IA3"),
    "a whole difference": (".diff", "whole difference"),
    "a difference of a bias": (".diff_b", "whole difference"),
    "set_weight": (".set_weight", "replaces a weight"),
    "reshape_weight": (".reshape_weight", "shape of a base weight"),
    "a norm": (".w_norm", "norm"),
    "a norm's bias": (".b_norm", "norm"),
    "a bias": (".lora_up.bias", "bias of LoRA"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_plain_lora_is_refused_by_name(tmp_path, kind):
    ending, says = REFUSED[kind]
    save_image(tmp_path / "plain.safetensors", "kohya", 4)
    key = f"{KOHYA}{ending}"
    save_file({**load_file(tmp_path / "plain.safetensors"), key: torch.ones(4)}, tmp_path / "one.safetensors")
    refused(tmp_path / "one.safetensors", match=rf"^one: tensor {key} cannot be merged: .*{says}")


def changed(**tensors):
    """A function that changes a file's tensors; None removes one."""

    def change(own):
        own |= {f"{KOHYA}.{end.replace('__', '.')}": tensor for end, tensor in tensors.items()}
        return {key: tensor for key, tensor in own.items() if tensor is not None}

    return change


ONE = torch.ones


def pair(name, down, up):
    """A function that adds two factors of these shapes to a file's tensors."""
    return lambda own: own | {f"{name}.lora_down.weight": ONE(down), f"{name}.lora_up.weight": ONE(up)}


MALFORMED = {
    "no up": (changed(lora_up__weight=None), r"lora_down\.weight has no up factor beside it"),
    "no down": (changed(lora_down__weight=None), r"lora_up\.weight has no down factor beside it"),
    "another rank": (changed(lora_up__weight=ONE(12, 5)), r"lora_up\.weight is \[12, 5\], wanted rank 4"),
    "a vector": (changed(lora_down__weight=ONE(4)), r"lora_down\.weight is \[4\], wanted a factor of a linear"),
    "no rank": (changed(lora_down__weight=ONE(0, 16)), r"is \[0, 16\], wanted a factor"),
    "whole numbers": (changed(lora_down__weight=ONE(4, 16, dtype=torch.int32)), "int32, wanted floating point"),
    "a mid of a linear layer": (changed(lora_mid__weight=ONE(4, 4)), r"lora_mid\.weight is \[4, 4\], wanted"),
    "alpha of two numbers": (changed(alpha=ONE(2)), r"alpha is \[2\], wanted one number"),
    "alpha of NaN": (changed(alpha=torch.tensor(math.nan)), "alpha is nan, wanted a number"),
    "alpha alone": (lambda own: own | {"lora_unet_other.alpha": ONE(1)}, "lora_unet_other.alpha has no factors"),
    "two spellings": (changed(lora_A__weight=ONE(4, 16)), r"is spelled \.lora_\w+\.weight and \.lora_\w+\.weight"),
    "unknown": (lambda own: own | {"step": ONE(1)}, "tensor step is unknown, wanted <module>"),
    "nothing": (lambda own: {}, "holds no LoRA tensors"),
    "groups": (
        lambda own: (
            own | {"lora_unet_c.lora_down.weight": ONE(4, 2, 3, 3), "lora_unet_c.lora_up.weight": ONE(6, 2, 1, 1)}
        ),
        "a convolution in 2 groups",
    ),
    "two families": (
        lambda own: own | {"unet.x.lora_A.weight": ONE(4, 2), "unet.x.lora_B.weight": ONE(6, 4)},
        "spelled as in .*; wanted one family",
    ),
    "names of two tools": (
        lambda own: (
            own | {"lora_transformer_x.lora_down.weight": ONE(4, 2), "lora_transformer_x.lora_up.weight": ONE(6, 4)}
        ),
        "wanted names of one kind",
    ),
    "NaN": (changed(lora_up__weight=torch.full((12, 4), math.nan)), r"tensor .*lora_up\.weight in .* holds NaN"),
}


def test_a_directory_of_malformed_files(tmp_path):
    """One clear error each, in one line, that names the file; nothing is written."""
    save_image(tmp_path / "good.safetensors", "kohya", 4)
    good = load_file(tmp_path / "good.safetensors")
    wanted = {}
    for number, (change, match) in enumerate(MALFORMED.values()):
        save_file(change(dict(good)), tmp_path / f"m{number}.safetensors")
        wanted[f"m{number}"] = match
    data = (tmp_path / "good.safetensors").read_bytes()
    broken = {
        "short": (data[:-3], "is truncated"),
        "header": (data[:8] + b"[" + data[9:], "the header of header.safetensors is damaged"),
        "empty": (b"", "is truncated or damaged"),
        "long": (struct.pack("<Q", 2**40) + data[8:], "shorter than its header"),
    }
    text = {"transformer.r": 3, "transformer.lora_alpha": 3}
    headers = {
        "rank": (json.dumps(text), "has rank 4, wanted 3 from lora_adapter_metadata"),
        "text": ("{", "lora_adapter_metadata in the header is damaged"),
        "list": ("[1]", "lora_adapter_metadata is a list, wanted an object"),
        "component": (json.dumps({"unet.r": 4, "unet.lora_alpha": 4}), "lora_adapter_metadata says nothing of"),
        "norank": (json.dumps({"transformer.lora_alpha": 4}), "has no rank r of transformer"),
        "dora": (
            json.dumps({"transformer.r": 4, "transformer.use_dora": True}),
            "metadata of transformer: use_dora is set",
        ),
    }
    for name, (content, match) in broken.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        wanted[name] = match
    for name, (metadata, match) in headers.items():
        header = {"lora_adapter_metadata": metadata}
        layer = {"transformer.to_q": (12, 16)}
        save_image(tmp_path / f"{name}.safetensors", "diffusers", 4, header=header, modules=layer)
        wanted[name] = match
    save_image(tmp_path / "both.safetensors", "diffusers", 4, alpha=2.0, header={"lora_adapter_metadata": "{}"})
    wanted["both"] = "two sources of alpha"
    before = sorted(tmp_path.iterdir())
    for name, match in wanted.items():
        for inputs in ([f"{name}.safetensors"], ["good.safetensors", f"{name}.safetensors"]):
            with pytest.raises(MergeError, match=match) as caught:
                merge_engine.merge([tmp_path / file for file in inputs], tmp_path / "out.safetensors", method="linear")
            assert name in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


NAMES_OF_OTHERS = {  # two inputs that do not go together: (family, modules) each, and what the message says
    "kohya and diffusers": (
        ("kohya", KOHYA_MODULES),
        ("diffusers", COMPONENTS),
        "PEFT-named.*kohya's file.*save_lora_weights",
    ),
    "two tools' names": (
        ("kohya", KOHYA_MODULES),
        ("OneTrainer", None),
        r"lora_transformer_ names .*lora_unet_ names of diffusers.*convert_flux_lora\.py",
    ),
    "SDXL's and diffusers' blocks": (
        ("kohya", {"lora_unet_input_blocks_4_1_proj_in": (8, 8)}),
        ("kohya", KOHYA_MODULES),
        "names of SDXL's blocks",
    ),
    "ComfyUI's and diffusers' names": (("ai-toolkit", VIDEO), ("diffusers", COMPONENTS), "names after diffusion_model"),
    "default and not": (("PEFT's default", None), ("diffusers", None), "adapter 'default'"),
    "spellings of one module": (("early diffusers", None), ("attention processors", None), "spells .* what"),
}


@pytest.mark.parametrize("case", NAMES_OF_OTHERS)
def test_names_are_never_translated(tmp_path, case):
    one, two, match = NAMES_OF_OTHERS[case]
    for name, (family, modules) in {"one": one, "two": two}.items():
        save_image(tmp_path / f"{name}.safetensors", family, 4, modules=modules)
    with pytest.raises(AdapterError, match=match) as caught:
        merge_engine.merge([tmp_path / "one.safetensors", tmp_path / "two.safetensors"], tmp_path / "out")
    assert "one" in str(caught.value) and "two" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_text_encoders_go_with_any_names(tmp_path):
    for name, modules in {
        "text": {"lora_te_text_model_encoder_layers_0_mlp_fc1": (20, 9)},
        "unet": {"lora_unet_input_blocks_4_1_proj_in": (8, 8), "lora_unet_conv_in": (8, 4, 3, 3)},
        "names": {"lora_unet_double_blocks_0_img_mlp_0": (8, 8)},
    }.items():
        save_image(tmp_path / f"{name}.safetensors", "kohya", 2, modules=modules)
    for other in ("unet", "names"):
        merged = merge_engine.merge([tmp_path / "text.safetensors", tmp_path / f"{other}.safetensors"], method="linear")
        assert len(merged.modules) >= 2


def test_names_that_do_not_say_whose_they_are(tmp_path):
    modules = {"diffusion_model.blocks.0.q": (8, 8), "text_embedding_projection": (8, 8)}
    save_image(tmp_path / "a.safetensors", "ai-toolkit", 2, modules=modules)
    save_image(tmp_path / "b.safetensors", "ai-toolkit", 2, modules={"diffusion_model.blocks.0.q": (8, 8)})
    merged = merge_engine.merge([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], method="linear")
    assert merged.ranks == {"diffusion_model.blocks.0.q": 4, "text_embedding_projection": 2}


def test_files_of_two_models_are_told_apart_by_their_modules(tmp_path):
    for name, module in {"flux": "lora_unet_double_blocks_0_img_mlp_0", "wan": "lora_unet_blocks_0_ffn_0"}.items():
        save_image(tmp_path / f"{name}.safetensors", "kohya", 2, modules={module: (8, 8)})
    with pytest.warns(UserWarning, match="wan and flux have no module in common: are they for one model"):
        merge_engine.merge([tmp_path / "flux.safetensors", tmp_path / "wan.safetensors"], method="linear")
