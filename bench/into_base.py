"""Adapters into a base model, from disk to disk, against mergekit-yaml: python -m bench.into_base

A Llama of about 130 M parameters in bfloat16, and three rank-16 adapters of every linear layer, all random: what
they hold does not change the work. Every run is a whole process, timed from its start to its end; the rivals take
turns, and the median counts. mergekit (LGPL, called and never copied) is optional: say how it is started (--mergekit),
or have `mergekit-yaml` on the path. Before each of its runs its cache of materialised adapters is removed. The error of
both is measured against the same merge in float32.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from bench.agreement import Disagreement
from bench.inputs import SCALING, llama, make_adapter
from bench.measure import Clock, Contestant, Sample, interleaved, spread, whole_process

LAYERS, HIDDEN, MLP, HEADS, VOCABULARY = 12, 768, 2048, 12, 32000
SHAPES = llama(HIDDEN, HIDDEN, MLP)
METHODS: dict[str, dict[str, Any]] = {"ties": {"density": 0.2}, "dare_ties": {"density": 0.2}}
TARGETS = {"ties": 10, "dare_ties": 6}
PROGRAM = "MERGEKIT_YAML"  # the environment variable with the command that starts mergekit-yaml


def make_base(folder: Path, seed: int = 0, layers: int = LAYERS) -> None:
    """A Llama folder without a tokenizer: bfloat16, untied, one safetensors file."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    tensors = {"model.embed_tokens.weight": normal(VOCABULARY, HIDDEN), "lm_head.weight": normal(VOCABULARY, HIDDEN)}
    for layer in range(layers):
        for name, shape in SHAPES.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = normal(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    config |= {"hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": layers, "rms_norm_eps": 1e-6}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": VOCABULARY}
    config |= {"tie_word_embeddings": False, "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def make_inputs(folder: Path, layers: int = LAYERS) -> tuple[Path, list[Path]]:
    """(base, three adapters) in a new folder, where outputs have a place too."""
    base, adapters = folder / "base", [folder / each for each in "abc"]
    make_base(base, layers=layers)
    for seed, adapter in enumerate(adapters, 1):
        make_adapter(adapter, seed, layers, SHAPES, base)
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


RIVALS = {"ours": run_ours, "mergekit": run_mergekit}


def check(base: Path, adapters: list[Path], method: str, output: Path) -> None:
    """Raise Disagreement unless one module of the output is base + merged delta by `reference`, rounded to bfloat16.

    float32 products are summed in another order, so an element near the threshold or with a vote near 0 may differ:
    one in ten thousand; the others by one rounding to bfloat16.
    """
    import torch
    from safetensors import safe_open

    from merge_engine import reference, rng
    from merge_engine.rule import make_rule

    def tensors(folder: Path, *names: str) -> list[torch.Tensor]:
        (file,) = folder.glob("*.safetensors")
        with safe_open(file, "pt") as opened:
            return [opened.get_tensor(name) for name in names]

    module = "model.layers.0.self_attn.q_proj"
    sides = [f"base_model.model.{module}.lora_{side}.weight" for side in "AB"]
    rule, density = make_rule(method), METHODS[method]["density"]
    deltas = {number: reference.delta(*tensors(folder, *sides), SCALING) for number, folder in enumerate(adapters)}
    rows, columns = map(range, deltas[0].shape)
    place = {"seed": 0, "stream": rng.stream_id(module, "delta"), "rows": rows, "columns": columns}
    masks = {"": {number: rng.keep_mask(density, adapter=number, **place) for number in deltas}}
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


def du(folder: Path) -> float:
    """MB of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.into_base", description=__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--mergekit", help="the command that starts mergekit-yaml; default: the one on the path")
    parser.add_argument("--skip-mergekit", action="store_true")
    parser.add_argument("--ranks", action="store_true", help="also two ranks of one thread against one")
    options = parser.parse_args()
    if options.mergekit:
        os.environ[PROGRAM] = options.mergekit
    rivals = ["ours"]
    if not options.skip_mergekit:
        if mergekit():
            rivals.append("mergekit")
        else:
            print("mergekit: not installed")
    with tempfile.TemporaryDirectory() as name:
        base, adapters = make_inputs(Path(name, "inputs"), options.layers)
        bare = whole_process([sys.executable, "-c", "import torch"]).peak_mib or 0.0
        print(f"an interpreter with torch: {bare:.0f} MiB; load {os.getloadavg()[0]:.1f} before the start")
        for method in options.methods:
            contestants = {rival: _contestant(rival, base, adapters, method) for rival in rivals}
            taken = interleaved(contestants, Clock(), seconds=0, least=options.runs, most=options.runs)
            middle = {rival: spread([sample.seconds for sample in samples]) for rival, samples in taken.items()}
            peaks = {rival: max(sample.peak_mib or 0.0 for sample in samples) for rival, samples in taken.items()}
            for rival, (median, low, high, _) in middle.items():
                print(
                    f"{method}: {rival} {median:.2f} s ({low:.2f} to {high:.2f}), {peaks[rival]:.0f} MiB, of these "
                    f"{peaks[rival] - bare:.0f} above torch; {du(output_of(base, rival)):.0f} MB of output"
                )
            if "mergekit" in middle:
                times = middle["mergekit"].median / middle["ours"].median
                print(f"{method}: {times:.1f}x as fast as mergekit (wanted {TARGETS[method]}x)")
            if method == "ties":
                compare_errors(base, adapters, "mergekit" in middle)
        if options.ranks:
            compare_ranks(base, adapters, options.runs)


def _contestant(rival: str, base: Path, adapters: list[Path], method: str) -> Contestant:
    return Contestant(lambda: RIVALS[rival](base, adapters, method), own_clock=True)


def compare_errors(base: Path, adapters: list[Path], with_mergekit: bool) -> None:
    """How far each bfloat16 result is from the float32 merge, and how many elements are not that merge rounded once."""
    from safetensors.torch import load_file

    truth, once = base.with_name("truth"), base.with_name("once")
    whole_process(ours(base, adapters, truth, "ties", "--convention", "mergekit", "--dtype", "float32"))
    whole_process(ours(base, adapters, once, "ties", "--convention", "mergekit"))
    exact, before = load_file(truth / "model.safetensors"), load_file(base / "model.safetensors")
    rivals = {"ours": once} | ({"mergekit": output_of(base, "mergekit")} if with_mergekit else {})
    for rival, folder in rivals.items():
        got = {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
        error = delta = other = count = 0.0
        for key in (key for key in exact if "_proj" in key):
            error += float((got[key].double() - exact[key].double()).square().sum())
            delta += float((exact[key].double() - before[key].double()).square().sum())
            other += float((got[key] != exact[key].to(got[key].dtype)).sum())
            count += exact[key].numel()
        print(
            f"  error of {rival} against float32: {(error / delta) ** 0.5:.3%} of the delta's norm, "
            f"{other / count:.2%} of the elements are not the float32 result rounded once"
        )


def compare_ranks(base: Path, adapters: list[Path], runs: int) -> None:
    """Two ranks of one thread against one rank of one thread, by the time that the merge itself reports."""
    output = output_of(base, "ours")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(ranks: int) -> Sample:
        shutil.rmtree(output, ignore_errors=True)
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "merge_engine"]
        command = [sys.executable, *start, *ours(base, adapters, output, "dare_ties")[3:]]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return Sample(float(done.stdout.strip().splitlines()[-1].split(", ")[-1].removesuffix(" s")), None)

    contestants = {ranks: Contestant(partial(run, ranks), own_clock=True) for ranks in (1, 2)}
    taken = interleaved(contestants, Clock(), seconds=0, least=runs, most=runs)
    one, two = (spread([sample.seconds for sample in samples]).median for samples in taken.values())
    print(f"dare_ties, one thread a rank: 1 rank {one:.2f} s, 2 ranks {two:.2f} s, {one / two:.2f}x (wanted 1.6x)")


if __name__ == "__main__":
    main()
