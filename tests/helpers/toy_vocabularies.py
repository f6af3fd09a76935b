"""Models of nothing but embedding, head, the head's bias and a norm, with tokenizers; and small Llamas."""

import json
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

import merge_engine

WORDS = ["<unk>", "to", "be", "or", "not"]
WIDTH = 3


def report_of(folder):
    return json.loads((folder / "merge_report.json").read_text())


def eighths(generator, *shape):
    return torch.randint(-40, 41, shape, generator=generator) / 8


KEYS = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")


def entry(index, token, special=True):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special, "special": special}
    return {"id": index, "content": token, **flags}


def write_tokenizer(folder, tokens, **model):
    """tokens: {token: index}; those in angle brackets are added ones."""
    words = {token: index for token, index in tokens.items() if not token.startswith("<")}
    added = [entry(index, token) for token, index in tokens.items() if token.startswith("<")]
    model = {"type": "WordLevel", "unk_token": "<unk>", "vocab": words, **model}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": model}))


def save_toy(folder, tokens, rows, seed=0, dtype=torch.float32, **config):
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(zip(KEYS, [(rows, WIDTH), (rows, WIDTH), (rows,)], strict=True)) | {"model.norm.weight": (WIDTH,)}
    folder.mkdir()
    tensors = {key: eighths(generator, *shape).to(dtype) for key, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"vocab_size": rows, "tie_word_embeddings": False, **config}))
    write_tokenizer(folder, tokens)
    return folder


def numbered(*tokens):
    return {token: index for index, token in enumerate(tokens)}


def trimmed(task, density):
    """The k largest magnitudes, of equal ones those with the lowest index."""
    flat = task.flatten()
    order = torch.sort(-flat.abs(), stable=True).indices[: int(density * flat.numel())]
    return torch.zeros_like(flat).index_copy(0, order, flat[order]).reshape(task.shape)


def ties(tasks, weights, density):
    kept = torch.stack([trimmed(task, density) for task in tasks])
    sign = torch.where(kept.sum(0) >= 0, 1.0, -1.0)
    agree = kept * sign > 0
    shape = (-1, *[1] * (kept.ndim - 1))
    return (torch.tensor(weights).double().reshape(shape) * kept * agree).sum(0) / agree.sum(0).clamp_min(1)


def save_toys(folder):
    """A base with a row of padding, and three models: two with a token of their own in its place, one without."""
    base = save_toy(folder / "base", numbered("to", "be", "or"), 4)
    models = [
        save_toy(folder / "chat", numbered("to", "be", "or", "<a>"), 4, seed=1),
        save_toy(folder / "code", numbered("to", "be", "or", "<b>", "<a>"), 6, seed=2),
        save_toy(folder / "math", numbered("to", "be", "or"), 3, seed=3),
    ]
    return base, models


def union_folder(toys, **options):
    base, models = toys
    merge_engine.merge_models(base, models, base.parent / "out", vocab="union", **options)
    return base.parent / "out"


def rewrite(folder, name, **changes):
    file = folder / name
    value = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**value, **changes}))


def make_tokenizer(kind, added=(), order=None):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "WordLevel":
        words = [WORDS[i] for i in order] if order else WORDS
        tokenizer = Tokenizer(models.WordLevel(numbered(*words), unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.BpeTrainer(vocab_size=24, special_tokens=["<unk>"], show_progress=False)
        tokenizer.train_from_iterator(["to be or not to be", "bento robot not"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    for token in added:
        fast.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    return fast


def save_llama(folder, tokenizer, seed, *, tied=False, rows=None, shards=None):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=rows or len(tokenizer), tie_word_embeddings=tied, **sizes)
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(eighths(generator, *weight.shape))
    model.save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    tokenizer.save_pretrained(folder)
    return folder


def opened(folder):
    """What transformers makes of a folder: tokenizer, model, and rows of embedding and head by token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    layers = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    rows = {name: {t: layer.weight[i] for t, i in tokenizer.get_vocab().items()} for name, layer in layers.items()}
    return SimpleNamespace(tokenizer=tokenizer, model=model, **rows)
