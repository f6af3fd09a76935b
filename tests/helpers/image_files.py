"""LoRAs of image models as files in the spellings of several tools, written and read without the package.

What the tools do with a key is repeated here as data, from their sources: ComfyUI's `comfy/weight_adapter/lora.py` and
`comfy/lora.py`, and sd-scripts' `library/train_util.py`.
"""

import hashlib
import math
import re

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

# {name: (the ends of the keys of A, of B and of a mid, the modules)}
KOHYA_MODULES = {
    "lora_unet_down_blocks_0_attentions_0_to_q": (12, 16),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (20, 9),
    "lora_unet_down_blocks_0_resnets_0_conv1": (10, 6, 3, 3),
    "lora_unet_mid_block_attentions_0_proj_in": (8, 5, 1, 1),
}
COMPONENTS = {
    "transformer.blocks.0.attn.to_q": (12, 16),
    "transformer.blocks.0.conv": (10, 6, 3, 3),
    "text_encoder.layers.0.mlp.fc1": (20, 9),
}
UNET = {
    "unet.down_blocks.0.attn1.processor.to_q": (12, 16),
    "unet.down_blocks.0.resnets.0.conv1": (10, 6, 3, 3),
    "unet.mid_block.ff.0": (20, 9),
}
VIDEO = {"diffusion_model.blocks.0.self_attn.q": (12, 16), "diffusion_model.patch_embedding": (10, 4, 1, 2, 2)}
FAMILIES = {
    "kohya": (".lora_down.weight", ".lora_up.weight", ".lora_mid.weight", KOHYA_MODULES),
    "musubi, dotted": (".lora_down.weight", ".lora_up.weight", ".lora_mid.weight", VIDEO),
    "OneTrainer": (
        *(".lora_down.weight", ".lora_up.weight", None),
        {"lora_transformer_single_transformer_blocks_0_attn_to_q": (12, 16), "lora_te2_encoder_block_0_wi": (9, 8)},
    ),
    "diffusers": (".lora_A.weight", ".lora_B.weight", None, COMPONENTS),
    "ai-toolkit": (".lora_A.weight", ".lora_B.weight", None, VIDEO),
    "PEFT's default": (".lora_A.default.weight", ".lora_B.default.weight", None, COMPONENTS),
    "Mochi": (".lora_A", ".lora_B", None, {"blocks.0.attn.qkv": (12, 16)}),
    "early diffusers": (".lora.down.weight", ".lora.up.weight", None, UNET),
    "attention processors": ("_lora.down.weight", "_lora.up.weight", None, UNET),
    "text encoders of diffusers": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", None, UNET),
}


def save_image(file, family, rank, *, alpha=None, dtype=torch.float32, mid=False, seed=0, modules=None, header=None):
    """A file of random factors; {module: delta [M, N], float64}. alpha: of all modules, None: none is written."""
    down, up, middle, own = FAMILIES[family]
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors, deltas = {}, {}
    for name, (rows, columns, *kernel) in (modules or own).items():
        ones = [1] * len(kernel)
        factored = mid and math.prod(kernel) > 1
        A = random(rank, columns, *(ones if factored else kernel))
        B = random(rows, rank, *ones)
        tensors |= {name + down: A, name + up: B}
        wide = A.double()
        if factored:
            tensors[name + middle] = M = random(rank, rank, *kernel)
            wide = torch.tensordot(M.double(), A.double().flatten(1), dims=([1], [0])).movedim(-1, 1)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
        deltas[name] = (1.0 if alpha is None else alpha / rank) * B.double().flatten(1) @ wide.flatten(1)
    save_file(tensors, file, header)
    return deltas


# The ends of keys that ComfyUI looks for, in its order: of B, of A, of a mid.
COMFY = (
    (".lora_up.weight", ".lora_down.weight", ".lora_mid.weight"),
    ("_lora.up.weight", "_lora.down.weight", None),
    (".lora_B.weight", ".lora_A.weight", None),
    (".lora.up.weight", ".lora.down.weight", None),
    (".lora_B", ".lora_A", None),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight", None),
    (".lora_B.default.weight", ".lora_A.default.weight", None),
)
# How the stems begin under which ComfyUI knows the layers of models and text encoders.
COMFY_STEMS = re.compile(
    r"lora_(unet|te|te1|te2|te3|prior_unet|prior_te|transformer)_|lycoris_|(unet|transformer|text_encoder|text_encoder_2"
    r"|text_encoders|diffusion_model|base_model\.model)\.|blocks\."
)


def read_by_comfy(file, modules):
    """{module: delta, float64} as ComfyUI makes them of a file, for a model with these modules.

    Fails where ComfyUI would warn "lora key not loaded", or knows no such stem.
    """
    tensors = load_file(file)
    used, deltas = set(), {}
    for name in modules:
        assert COMFY_STEMS.match(name), name
        alpha = tensors.get(f"{name}.alpha")
        used.add(f"{name}.alpha")
        for up, down, middle in COMFY:
            if name + up not in tensors:
                continue
            B, A = tensors[name + up].double(), tensors[name + down].double()
            used |= {name + up, name + down}
            scale = 1.0 if alpha is None else alpha.item() / A.shape[0]
            if middle is not None and name + middle in tensors:
                used.add(name + middle)
                A = torch.einsum("pq...,qi->pi...", tensors[name + middle].double(), A.flatten(1))
            deltas[name] = scale * B.flatten(1) @ A.flatten(1)
            break
    assert tensors.keys() <= used, tensors.keys() - used
    return deltas


def hashes(file):
    """(sshs_model_hash, sshs_legacy_hash) of a file, as tools compute them that index files."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    legacy = hashlib.sha256(data[0x100000 : 0x100000 + 0x10000]).hexdigest()
    return hashlib.sha256(data[start:]).hexdigest(), legacy[:8]


def header_of(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()
