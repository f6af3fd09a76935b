"""Adapters into a base model, from disk to disk, against mergekit-yaml, and by one rank and by two.

A Llama in bfloat16, and three rank-16 adapters of every linear layer, all random: what they hold does not change the
work. Every run is a whole process, timed from its start to its end. mergekit (LGPL, called and never copied) is
optional: MERGEKIT_YAML says how it is started, or `mergekit-yaml` is on the path. Before each of its runs its cache of
materialised adapters is removed.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from bench.agreement import Disagreement
from bench.inputs import SCALING, Shapes, make_adapter
from bench.measure import Sample, whole_process
from merge_engine.cpu.mask import keep_mask
from merge_engine.rules import reference
from merge_engine.rules.philox import stream_id

VOCABULARY, HEAD = 32000, 64  # tokens; columns of one attention head
METHODS: dict[str, dict[str, Any]] = {"ties": {"density": 0.2}, "dare_ties": {"density": 0.2}}
_BLOCK = 16 << 20  # bytes read or written at once
PROGRAM = "MERGEKIT_YAML"  # the environment variable with the command that starts mergekit-yaml


def make_base(folder: Path, layers: int, shapes: Shapes, seed: int = 0) -> None:
    """A Llama folder without a tokenizer: bfloat16, untied, one safetensors file."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    keys, hidden = shapes["self_attn.k_proj"]

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    tensors = {"model.embed_tokens.weight": normal(VOCABULARY, hidden), "lm_head.weight": normal(VOCABULARY, hidden)}
    for layer in range(layers):
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = normal(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    config |= {"hidden_size": hidden, "intermediate_size": shapes["mlp.gate_proj"][0], "num_hidden_layers": layers}
    config |= {"num_attention_heads": hidden // HEAD, "num_key_value_heads": keys // HEAD, "vocab_size": VOCABULARY}
    config |= {"tie_word_embeddings": False, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def make_inputs(folder: Path, layers: int, shapes: Shapes) -> tuple[Path, list[Path]]:
    """(base, three adapters) in a new folder, where outputs have a place too."""
    base, adapters = folder / "base", [folder / each for each in "abc"]
    make_base(base, layers, shapes)
    for seed, adapter in enumerate(adapters, 1):
        make_adapter(adapter, seed, layers, shapes, base)
    return base, adapters


def mergekit() -> list[str]:
    """The command that starts mergekit-yaml: as MERGEKIT_YAML says, or from the path; empty without one."""
    return shlex.split(os.environ.get(PROGRAM) or shutil.which("mergekit-yaml") or "")


def output_of(base: Path, rival: str) -> Path:
    return base.with_name(f"{rival} output")


def run_ours(base: Path, adapters: list[Path], method: str) -> Sample:
    """A whole process, from its start to its end; its output stays for a check."""
    output = output_of(base, "ours")
    shutil.rmtree(output, ignore_errors=True)
    return whole_process(ours(base, adapters, output, method))._replace(result=output)


def run_mergekit(base: Path, adapters: list[Path], method: str) -> Sample:
    """The same by mergekit, whose cache of materialised adapters is removed before."""
    program, output = mergekit(), output_of(base, "mergekit")
    if not program:
        raise RuntimeError(f"mergekit: wanted its command in {PROGRAM} or mergekit-yaml on the path, got neither")
    for leftover in (output, base.with_name("cache")):
        shutil.rmtree(leftover, ignore_errors=True)
    return whole_process(mergekits(program, base, adapters, output, method))._replace(result=output)


def run_ranks(ranks: int, base: Path, adapters: list[Path], method: str) -> Sample:
    """The same by so many processes of one thread each, by the time that the merge itself reports; with a digest.

    They may use every core: of a single one, too, the threads that read and write have a core of their own. Any number
    of them writes in the same empty place. As much memory as they take was in use a moment before, untimed: a virtual
    machine may have handed what was free to its host, and to get 4 GB back takes it as long as the merge, on all cores.
    """
    output = output_of(base, "ranks")
    shutil.rmtree(output, ignore_errors=True)
    output_and_processes = 2 * sum(file.stat().st_size for file in base.iterdir())
    _touch_memory(base.with_name("touched"), output_and_processes)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *start, *ours(base, adapters, output, method)[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-2000:]}")
    seconds = float(done.stdout.strip().splitlines()[-1].split(", ")[-1].removesuffix(" s"))
    return Sample(seconds, (output, digest(output)))


def _touch_memory(file: Path, size: int) -> None:
    """Write a file of zeros, and remove it."""
    block = bytes(_BLOCK)
    with file.open("wb", buffering=0) as opened:
        for _ in range(-(-size // len(block))):
            opened.write(block)
    file.unlink()


def digest(folder: Path) -> str:
    """Of all tensor files below a folder, with their names."""
    found, block = xxh3_128(), bytearray(_BLOCK)
    for file in sorted(folder.glob("*.safetensors")):
        found.update(file.name.encode())
        with file.open("rb", buffering=0) as opened:
            while read := opened.readinto(block):
                found.update(memoryview(block)[:read])
    return found.hexdigest()


def check(base: Path, adapters: list[Path], method: str, output: Path) -> None:
    """Raise Disagreement unless one module of the output is base + merged delta by `reference`, rounded to bfloat16.

    float32 products are summed in another order, so an element near the threshold or with a vote near 0 may differ:
    one in ten thousand; the others by one rounding to bfloat16.
    """
    import torch
    from safetensors import safe_open

    pass  # REMOVED
    from merge_engine.rules.rule import make_rule

    def tensors(folder: Path, *names: str) -> list[torch.Tensor]:
        (file,) = folder.glob("*.safetensors")
        with safe_open(file, "pt") as opened:
            return [opened.get_tensor(name) for name in names]

    module = "model.layers.0.self_attn.q_proj"
    sides = [f"base_model.model.{module}.lora_{side}.weight" for side in "AB"]
    rule, density = make_rule(method), METHODS[method]["density"]
    deltas = {number: reference.delta(*tensors(folder, *sides), SCALING) for number, folder in enumerate(adapters)}
    rows, columns = map(range, deltas[0].shape)
    place = {"seed": 0, "stream": stream_id(module, "delta"), "rows": rows, "columns": columns}
    masks = {"": {number: keep_mask(density, adapter=number, **place) for number in deltas}}
    ones, densities = [1.0] * len(adapters), {"": [density] * len(adapters)}
    merged = reference.merge_model({"": deltas}, ones, densities, rule, masks=masks)[""]
    ((under,), (got,)) = (tensors(folder, f"{module}.weight") for folder in (base, output))
    wanted = under.double() + merged.double()
    off = int(((got.double() - wanted).abs() > 2.0**-8 * wanted.abs() + 1e-12).sum())
    if off > 1e-4 * wanted.numel():
        raise Disagreement(f"{method} into a base: {off} of {wanted.numel()} elements of {module} are off")


def ours(base: Path, adapters: list[Path], output: Path, method: str, *extra: str) -> list[str]:
    """The command that merges them here."""
    options = [text for key, value in METHODS[method].items() for text in (f"--{key}", str(value))]
    arguments = ["merge", "--into", str(base), *map(str, adapters), "-o", str(output), "--method", method]
    return [sys.executable, "-m", "merge_engine", *arguments, *options, *extra]


def mergekits(program: list[str], base: Path, adapters: list[Path], output: Path, method: str) -> list[str]:
    """The command that merges them with mergekit, in float32 where it lets one ask for it."""
    import yaml

    parameters = {"weight": 1.0, **METHODS[method]}
    recipe = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": f"{base}+{adapter}", "parameters": parameters} for adapter in adapters],
        "parameters": {"normalize": True},
        "dtype": "bfloat16",
    }
    file = base.with_name(f"{method}.yaml")
    file.write_text(yaml.safe_dump(recipe))
    options = ["--lora-merge-cache", str(base.with_name("cache")), "--no-copy-tokenizer", "--no-write-model-card"]
    return [*program, str(file), str(output), *options]


def excess(base: Path, adapters: list[Path], results: Mapping[str, Path]) -> dict[str, float]:
    """By how much the error of each result, of `ties` and weights of 1, exceeds that of the exact sum rounded once.

    The exact sum is a float32 merge by mergekit's convention, of which that with these weights is no other. Errors are
    norms over all merged tensors: 0 is a result that was rounded once, 1 is twice as far off.
    """
    from safetensors.torch import load_file

    truth = output_of(base, "float32")
    shutil.rmtree(truth, ignore_errors=True)
    whole_process(ours(base, adapters, truth, "ties", "--convention", "mergekit", "--dtype", "float32"))
    exact = {key: tensor for key, tensor in load_file(truth / "model.safetensors").items() if "_proj" in key}

    def squares(folder: Path) -> float:
        got = {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
        return sum(float((got[key].double() - tensor.double()).square().sum()) for key, tensor in exact.items())

    best = sum(float((tensor.bfloat16().double() - tensor.double()).square().sum()) for tensor in exact.values())
    return {name: (squares(folder) / best) ** 0.5 - 1 for name, folder in results.items()}
