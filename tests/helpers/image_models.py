"""Pipelines of diffusers with tiny random models, LoRAs in their layers, and what diffusers makes of a file."""

import logging
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what torch and others think of each other's versions
    import diffusers
    from transformers.integrations import peft as loading

# transformers 5 asks for a PEFT that is not out yet, though it uses nothing of it here.
loading.MIN_PEFT_VERSION = min(loading.MIN_PEFT_VERSION, "0.19.0")
DATA = Path(__file__).parent.parent / "data" / "image_loras"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def unet(**config):
    torch.manual_seed(0)
    blocks = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    sizes = {"sample_size": 8, "cross_attention_dim": 8, "attention_head_dim": 4, "norm_num_groups": 4}
    return diffusers.UNet2DConditionModel(**{**blocks, **sizes, **config})


def clip(kind=CLIPTextModel):
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "projection_dim": 8, "num_attention_heads": 2}
    sizes |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return kind(CLIPTextConfig(**sizes, num_hidden_layers=1, vocab_size=50, max_position_embeddings=8))


def flux_transformer():
    torch.manual_seed(0)
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 8)}
    depth = {"num_layers": 1, "num_single_layers": 1}
    widths = {"in_channels": 4, "joint_attention_dim": 8, "pooled_projection_dim": 8}
    return diffusers.FluxTransformer2DModel(patch_size=1, guidance_embeds=False, **heads, **depth, **widths)


def stable_diffusion():
    parts = dict.fromkeys(["vae", "tokenizer", "safety_checker", "feature_extractor"])
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    return diffusers.StableDiffusionPipeline(
        unet=unet(), text_encoder=clip(), scheduler=scheduler, requires_safety_checker=False, **parts
    )


def stable_diffusion_xl():
    blocks = {
        "block_out_channels": (4, 8, 16),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 1),
        "use_linear_projection": True,
    }
    model, scheduler = unet(**blocks), diffusers.EulerDiscreteScheduler()
    encoders = {"text_encoder": clip(), "text_encoder_2": clip(CLIPTextModelWithProjection)}
    parts = dict.fromkeys(["vae", "tokenizer", "tokenizer_2"])
    return diffusers.StableDiffusionXLPipeline(unet=model, scheduler=scheduler, **encoders, **parts)


def flux():
    parts = dict.fromkeys(["vae", "tokenizer", "text_encoder_2", "tokenizer_2"])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.FluxPipeline(transformer=flux_transformer(), scheduler=scheduler, text_encoder=clip(), **parts)


def wan():
    torch.manual_seed(0)
    widths = {"in_channels": 4, "out_channels": 4, "text_dim": 8, "freq_dim": 8, "ffn_dim": 24}
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, num_layers=2, **widths
    )
    parts = dict.fromkeys(["vae", "tokenizer", "text_encoder"])
    return diffusers.WanPipeline(transformer=model, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **parts)


def adapt(model, rank, alpha, targets, seed):
    """Random LoRA factors in the layers of a model whose names end with one of the targets."""
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False))


def deltas(pipeline, component):
    """{module: delta [M, N], float64} of the one LoRA that a component of the pipeline holds, with its scaling."""
    found = {}
    for name, layer in getattr(pipeline, component).named_modules():
        if isinstance(layer, LoraLayer):
            ((adapter, scaling),) = layer.scaling.items()
            A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            found[name] = scaling * B.detach().double().flatten(1) @ A.detach().double().flatten(1)
    return found


@contextmanager
def no_warning():
    """Fails where diffusers logs a warning, or anything warns."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "peft", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    # A file need not have layers of each model of the pipeline.
    assert not [text for text in records if "No LoRA keys associated" not in text], records


def loaded(make, file, components):
    """{component: deltas} that diffusers makes of a file, in a pipeline of its own; no warning may come of it."""
    pipeline = make()
    with no_warning():
        pipeline.load_lora_weights(str(file))
    return {component: deltas(pipeline, component) for component in components}
