"""Makes tests/data/image_loras: run it as a script, with diffusers installed.

Two LoRAs each of a tiny UNet with its text encoder and of a tiny Flux transformer, trained by PEFT for some steps on
random targets, and saved by diffusers' own save_lora_weights.
"""

import torch
from image_models import ATTENTION, DATA, clip, diffusers, flux_transformer, unet
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

STEPS = 20
SPECS = {  # name: (rank, alpha, dtype)
    "one": (4, 2, torch.float32),
    "two": (3, 6, torch.bfloat16),
}


def train(model, config, step, seed):
    """The LoRA's tensors and configuration, after some steps of AdamW on the loss that `step` returns."""
    torch.manual_seed(seed)
    model.requires_grad_(False)
    model.add_adapter(config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = step(model)
        loss.backward()
        optimizer.step()
    return get_peft_model_state_dict(model), model.peft_config["default"].to_dict()


def unet_loss(model):
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)
    return (model(sample, torch.tensor([3, 7]), text).sample - sample.flip(1)).square().mean()


def clip_loss(model):
    return (model(torch.randint(0, 50, (2, 6))).last_hidden_state - 1).square().mean()


def flux_loss(model):
    image, text = torch.randn(1, 9, 4), torch.randn(1, 5, 8)
    ids = {"img_ids": torch.rand(9, 3), "txt_ids": torch.zeros(5, 3)}
    given = {"pooled_projections": torch.randn(1, 8), "timestep": torch.rand(1), **ids}
    return (model(image, encoder_hidden_states=text, **given).sample - image.flip(1)).square().mean()


def main():
    DATA.mkdir(parents=True, exist_ok=True)
    for seed, (name, (rank, alpha, dtype)) in enumerate(SPECS.items()):
        sizes = {"r": rank, "lora_alpha": alpha}
        text_parts = LoraConfig(**sizes, target_modules=["q_proj", "v_proj", "fc1"])
        text, text_config = train(clip(), text_parts, clip_loss, seed)
        parts = LoraConfig(**sizes, target_modules=[*ATTENTION, "proj_in", "conv1", "ff.net.2"])
        tensors, config = train(unet(), parts, unet_loss, seed)
        diffusers.StableDiffusionPipeline.save_lora_weights(
            DATA,
            weight_name=f"unet_{name}.safetensors",
            unet_lora_layers={key: tensor.to(dtype) for key, tensor in tensors.items()},
            unet_lora_adapter_metadata=config,
            text_encoder_lora_layers={key: tensor.to(dtype) for key, tensor in text.items()},
            text_encoder_lora_adapter_metadata=text_config,
        )
        parts = LoraConfig(**sizes, target_modules=[*ATTENTION, "add_q_proj", "ff.net.2", "proj_mlp", "proj_out"])
        tensors, config = train(flux_transformer(), parts, flux_loss, seed)
        diffusers.FluxPipeline.save_lora_weights(
            DATA,
            weight_name=f"flux_{name}.safetensors",
            transformer_lora_layers={key: tensor.to(dtype) for key, tensor in tensors.items()},
            transformer_lora_adapter_metadata=config,
            text_encoder_lora_layers={key: tensor.to(dtype) for key, tensor in text.items()},
            text_encoder_lora_adapter_metadata=text_config,
        )


if __name__ == "__main__":
    main()
