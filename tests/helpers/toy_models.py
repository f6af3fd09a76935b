"""A full model of a few small tensors, and adapters on it, as files."""

import json

import torch
from lora_files import save_factors
from safetensors.torch import load_file, save_file

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


def weights_of(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def bytes_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load_header(path):
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
