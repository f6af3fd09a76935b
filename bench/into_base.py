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
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LAYERS, HIDDEN, MLP, HEADS, VOCABULARY, RANK = 12, 768, 2048, 12, 32000, 16
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
METHODS: dict[str, dict[str, Any]] = {"ties": {"density": 0.2}, "dare_ties": {"density": 0.2}}
TARGETS = {"ties": 10, "dare_ties": 6}


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


def make_adapter(folder: Path, seed: int, base: Path, layers: int = LAYERS) -> None:
    """An adapter folder as PEFT writes it: A ~ N(0, 1/in), B ~ N(0, 0.01^2), float32, alpha = 2 r."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in SHAPES.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) / columns**0.5
            tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.01
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
    config |= {"target_modules": sorted({name.split(".")[1] for name in SHAPES}), "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


# A child's peak starts at that of its parent when it forks: a small process in between starts the one that counts.
LAUNCHER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
seconds = time.perf_counter() - start
print(json.dumps([os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss * 1024 / 1e6, usage.ru_utime]))
"""


def timed(command: list[str]) -> tuple[float, float]:
    """(seconds, peak resident MB) of a whole process."""
    done = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, *command], capture_output=True, text=True, check=True)
    code, seconds, peak, _ = json.loads(done.stdout)
    if code:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-2000:]}")
    return seconds, peak


def ours(base: Path, adapters: list[Path], output: Path, method: str, *extra: str) -> list[str]:
    """The command that merges them here."""
    options = [text for key, value in METHODS[method].items() for text in (f"--{key}", str(value))]
    arguments = ["merge", "--into", str(base), *map(str, adapters), "-o", str(output), "--method", method]
    return [sys.executable, "-m", "merge_engine", *arguments, *options, *extra]


def mergekits(program: list[str], base: Path, adapters: list[Path], scratch: Path, method: str) -> list[str]:
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
    file = scratch / f"{method}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    options = ["--lora-merge-cache", str(scratch / "cache"), "--no-copy-tokenizer", "--no-write-model-card"]
    return [*program, str(file), str(scratch / f"mergekit-{method}"), *options]


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
    program = shlex.split(options.mergekit or shutil.which("mergekit-yaml") or "")
    if not program:
        print("mergekit: not installed")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        base, adapters = scratch / "base", [scratch / each for each in "abc"]
        make_base(base, layers=options.layers)
        for seed, folder in enumerate(adapters, 1):
            make_adapter(folder, seed, base, layers=options.layers)
        _, bare = timed([sys.executable, "-c", "import torch"])
        print(f"an interpreter with torch: {bare:.0f} MB; load {os.getloadavg()[0]:.1f} before the start")
        for method in options.methods:
            seconds: dict[str, list[float]] = {"ours": [], "mergekit": []}
            peaks = {"ours": 0.0, "mergekit": 0.0}
            for _ in range(options.runs):
                rivals = [("ours", ours(base, adapters, scratch / "out", method))]
                if program and not options.skip_mergekit:
                    rivals.append(("mergekit", mergekits(program, base, adapters, scratch, method)))
                for rival, command in rivals:
                    for leftover in ("out", "cache", f"mergekit-{method}"):
                        shutil.rmtree(scratch / leftover, ignore_errors=True)
                    before = du(scratch)
                    took, peak = timed(command)
                    seconds[rival].append(took)
                    peaks[rival] = max(peaks[rival], peak)
                    written = du(scratch) - before
                    size = du(scratch / ("out" if rival == "ours" else f"mergekit-{method}"))
                    print(f"  {method} {rival}: {took:.2f} s, {peak:.0f} MB, wrote {written:.0f} MB for {size:.0f}")
            middle = {rival: statistics.median(times) for rival, times in seconds.items() if times}
            line = f"{method}: ours {middle['ours']:.2f} s, {peaks['ours'] - bare:.0f} MB above torch"
            if "mergekit" in middle:
                line += f"; mergekit {middle['mergekit']:.2f} s, {middle['mergekit'] / middle['ours']:.1f}x "
                line += f"(wanted {TARGETS[method]}x), {peaks['mergekit']:.0f} MB"
            print(line)
            if method == "ties":
                compare_errors(base, adapters, scratch, "mergekit" in middle)
        if options.ranks:
            compare_ranks(base, adapters, scratch, options.runs)


def compare_errors(base: Path, adapters: list[Path], scratch: Path, with_mergekit: bool) -> None:
    """How far each bfloat16 result is from the float32 merge, and how many elements are not that merge rounded once."""
    from safetensors.torch import load_file

    truth = scratch / "truth"
    timed(ours(base, adapters, truth, "ties", "--convention", "mergekit", "--dtype", "float32"))
    timed(ours(base, adapters, scratch / "once", "ties", "--convention", "mergekit"))
    exact, before = load_file(truth / "model.safetensors"), load_file(base / "model.safetensors")
    rivals = {"ours": scratch / "once"} | ({"mergekit": scratch / "mergekit-ties"} if with_mergekit else {})
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


def compare_ranks(base: Path, adapters: list[Path], scratch: Path, runs: int) -> None:
    """Two ranks of one thread against one rank of one thread, by the time that the merge itself reports."""
    took: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(runs):
        for ranks in took:
            shutil.rmtree(scratch / "out", ignore_errors=True)
            start = [
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(ranks),
                "-m",
                "merge_engine",
            ]
            command = [sys.executable, *start, *ours(base, adapters, scratch / "out", "dare_ties")[3:]]
            done = subprocess.run(
                command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
            )
            took[ranks].append(float(done.stdout.strip().splitlines()[-1].split(", ")[-1].removesuffix(" s")))
    one, two = statistics.median(took[1]), statistics.median(took[2])
    print(f"dare_ties, one thread a rank: 1 rank {one:.2f} s, 2 ranks {two:.2f} s, {one / two:.2f}x (wanted 1.6x)")


if __name__ == "__main__":
    main()
