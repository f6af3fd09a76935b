"""The merge-engine command. Exit codes: 0 done, 1 unexpected failure, 2 a mistake of the user's, told in one line."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merge_engine import __version__
from merge_engine.errors import MergeError, RecipeError

MERGE_EXAMPLES = """\
examples:
  merge-engine merge sql chat ads -o merged --method ties --density 0.2 --weights 2 1 1
  merge-engine merge user/sql user/chat -o merged --method linear --rank 16
  merge-engine merge --into llama sql chat -o merged --method ties --shard-size 2GB
  merge-engine merge recipe.yaml

recipe.yaml holds the same names as the options:
  adapters: [sql, chat, ads]
  output: merged
  method: ties
  density: {".*q_proj": 0.3, ".*": 0.2}
  weights: [2, 1, 1]
"""
MODELS_EXAMPLES = """\
examples:
  merge-engine merge-models --base llama llama-chat llama-code -o merged --method ties --density 0.2
  merge-engine merge-models --base llama llama-chat sql-adapter -o merged --method linear --dry-run
  torchrun --nproc-per-node 2 -m merge_engine merge-models --base llama llama-chat llama-code -o merged
"""
INFO_EXAMPLES = """\
examples:
  merge-engine info sql
  merge-engine info --system
"""
DEMO_EXAMPLES = """\
example:
  merge-engine demo
"""
CHOICES = {
    "method": ("linear", "cat", "magnitude_prune", "ties", "dare_linear", "dare_ties"),
    "space": ("delta", "factors"),
    "election": ("total", "frequency"),
    "scope": ("tensor", "model"),
    "trim_ties": ("exact", "keep"),
    "convention": ("peft", "mergekit", "paper"),
    "dtype": ("float32", "float16", "bfloat16"),
    "backend": ("auto", "triton", "torch"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = _show_warning
            options.run(options)
    except MergeError as error:
        rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        print(f"merge-engine: error: {rank}{error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="merge-engine", description="Merge many LoRA adapters into one, fast, exactly and in little memory."
    )
    parser.add_argument("--version", action="version", version=f"merge-engine {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    merge = _command(commands, "merge", _merge, MERGE_EXAMPLES, "merge adapters into one, or into a base model")
    merge.add_argument("adapters", nargs="+", help="adapter folders or hub ids (user/repo), or one recipe.yaml")
    merge.add_argument("--into", metavar="BASE", help="write a full model: this one with the adapters merged into it")
    _merge_options(merge)
    merge.add_argument("--space", choices=CHOICES["space"], help="merge B @ A, or A and B apart; default: delta")
    merge.add_argument("--rank", type=_rank, help="of the result: a number, or auto (sum of the ranks); default: auto")
    merge.add_argument("--energy", type=float, help="instead of --rank: keep this share of the delta's energy, as 0.99")

    models = _command(commands, "merge-models", _merge_models, MODELS_EXAMPLES, "merge full models of one base")
    models.add_argument("models", nargs="+", help="folders or hub ids of full models, and of adapters on the same base")
    models.add_argument("--base", required=True, help="the full model that they were trained from")
    _merge_options(models)

    info = _command(commands, "info", _info, INFO_EXAMPLES, "rank, scaling, size and norms of an adapter")
    info.add_argument("adapters", nargs="*", metavar="adapter", help="adapter folder or hub id")
    info.add_argument("--system", action="store_true", help="show which backend is used here, and why")

    _command(commands, "demo", _demo, DEMO_EXAMPLES, "merge the bundled adapters and measure each result (needs peft)")
    return parser


def _merge_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-o", "--output", type=Path, help="folder to write")
    add("--overwrite", action="store_true", default=None, help="replace an existing output")
    add("--method", choices=CHOICES["method"], help="default: ties")
    add("--weights", nargs="+", type=float, metavar="W", help="one an input; default: 1 each")
    add(
        "--density",
        nargs="+",
        metavar="D",
        help="share kept by a trim or a drop: one number, one an input, or PATTERN=NUMBER by module; default: 0.2",
    )
    add("--scale", type=float, help="multiplies the result (lambda); default: 1")
    add("--election", choices=CHOICES["election"], help="how signs are elected; default: total")
    add("--scope", choices=CHOICES["scope"], help="one trim threshold a tensor, or one a model")
    add("--trim-ties", choices=CHOICES["trim_ties"], help="equal magnitudes at the threshold")
    add("--convention", choices=CHOICES["convention"], help="whose arithmetic; default: peft")
    add("--seed", type=int, help="of the random drops; default: 0")
    add("--backend", choices=CHOICES["backend"], help="who computes; default: auto")
    add("--dtype", choices=CHOICES["dtype"], help="of what is written; default: the inputs' own, or the base's")
    add("--shard-size", metavar="SIZE", help="of each weight file of a full model, as 2GB; default: 5GB")
    add("--dry-run", action="store_true", default=None, help="full models: show plan, sizes and time; write nothing")


def _command(commands: Any, name: str, run: Any, examples: str, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _merge(options: argparse.Namespace) -> None:
    from merge_engine.engine import merge

    asked = _asked(options)
    asked = {**_recipe_file(asked), **asked}
    if "into" in asked:
        return _into(asked, asked.pop("into"), asked.pop("adapters"))
    for key in ("shard_size", "dry_run"):
        if key in asked:
            raise RecipeError(f"{key}: is of merges into a full model; wanted --into BASE with it")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("ranks: adapters are merged into one by a single process; wanted --into BASE with several")
    adapters, output = asked.pop("adapters"), _output(asked)
    merged = merge(adapters, output, **asked)
    ranks = sorted({module.rank for module in merged.plan.modules})
    print(
        f"{output}: {len(adapters)} adapters, {len(merged.plan.modules)} modules, "
        f"rank up to {ranks[-1]}, kept energy {merged.total_energy:.4f}"
    )


def _merge_models(options: argparse.Namespace) -> None:
    asked = _asked(options)
    _into(asked, asked.pop("base"), asked.pop("models"))


def _into(asked: dict[str, Any], base: str, inputs: list[str]) -> None:
    from merge_engine.into import merge_models

    output = _output(asked)
    merged = merge_models(base, inputs, output, **asked)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    what = f"{len(inputs)} inputs, {merged.merged} tensors merged, {merged.copied} copied, {merged.nbytes / 1e9:.3g} GB"
    if merged.path is None:
        shards = len(merged.shards)
        print(f"{output}: would be {what} in {shards} file{'s' * (shards > 1)}, in about {merged.seconds:.1f} s")
        for name, nbytes in merged.shards.items():
            print(f"  {name}  {nbytes / 1e6:.1f} MB")
    else:
        resumed = f", {merged.resumed} tensors found finished" if merged.resumed else ""
        print(f"{output}: {what}, {merged.seconds:.1f} s{resumed}")


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """What was given on the command line, by the names of the recipe."""
    given = {key: value for key, value in vars(options).items() if value is not None and key != "run"}
    if "density" in given:
        given["density"] = _density(given["density"])
    return given


def _output(asked: dict[str, Any]) -> Any:
    output = asked.pop("output", None)
    if output is None:
        raise RecipeError("output: wanted a folder to write to (-o OUT), got none")
    return output


def _recipe_file(given: dict[str, Any]) -> dict[str, Any]:
    """The keys of a recipe file, if one was given in place of adapters; `adapters` is taken out of `given` then."""
    first = Path(given["adapters"][0])
    if first.suffix not in (".yaml", ".yml"):
        return {}
    if len(given["adapters"]) > 1:
        raise RecipeError(f"adapters: wanted one recipe file or adapters, got {first} and more")
    import yaml

    try:
        recipe = yaml.safe_load(first.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{first}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict) or not isinstance(recipe.get("adapters"), list) or not recipe["adapters"]:
        raise RecipeError(f"{first}: wanted a table of keys with a list of adapters")
    del given["adapters"]
    return recipe


def _density(texts: Sequence[str]) -> Any:
    """0.2 -> 0.2; 0.2 0.3 -> [0.2, 0.3]; .*q_proj=0.3 .*=0.2 -> a table."""
    pairs = [text.rpartition("=") for text in texts]
    try:
        numbers = [float(number) for _, _, number in pairs]
    except ValueError:
        raise RecipeError(f"density: wanted numbers or PATTERN=NUMBER, got {' '.join(texts)}") from None
    if all(equals for _, equals, _ in pairs):
        return {pattern: number for (pattern, _, _), number in zip(pairs, numbers, strict=True)}
    if any(equals for _, equals, _ in pairs):
        raise RecipeError(f"density: wanted numbers or PATTERN=NUMBER, not both, got {' '.join(texts)}")
    return numbers[0] if len(numbers) == 1 else numbers


def _rank(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _info(options: argparse.Namespace) -> None:
    from merge_engine.adapter import open_adapter
    from merge_engine.lowrank import product_norm
    from merge_engine.ops import system

    if options.system:
        print(system())
    elif not options.adapters:
        raise RecipeError("info: wanted an adapter or --system, got neither")
    for source in options.adapters:
        adapter = open_adapter(source)
        adapter.check_finite()
        ranks = sorted({module.rank for module in adapter.modules.values()})
        print(f"{adapter.name}: {adapter.path}")
        print(f"  base model  {adapter.base_model}")
        print(f"  modules     {len(adapter.modules)}, rank {', '.join(map(str, ranks))}")
        print(f"  size        {adapter.size_bytes / 1e6:.2f} MB")
        if adapter.extras:
            print(f"  beside them {', '.join(adapter.extras)}")
        width = max(map(len, adapter.modules))
        print(f"  {'module':{width}}  {'kind':9}  {'delta':>15}  rank  scaling  norm of delta")
        for module in adapter.modules.values():
            A, B = adapter.factors(module.name)
            shape = f"{module.rows} x {module.columns}"
            norm = abs(module.scaling) * product_norm(A, B)
            print(
                f"  {module.name:{width}}  {module.kind:9}  {shape:>15}  {module.rank:4}  "
                f"{module.scaling:7.4g}  {norm:.4g}"
            )


def _demo(options: argparse.Namespace) -> None:
    from merge_engine.demo.run import run

    run(print)


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    print(f"merge-engine: warning: {message}", file=sys.stderr)
