"""The merge-engine command. Exit codes: 0 done, 1 unexpected failure, 2 a mistake of the user's, told in one line."""

import argparse
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
  merge-engine merge recipe.yaml

recipe.yaml holds the same names as the options:
  adapters: [sql, chat, ads]
  output: merged
  method: ties
  density: {".*q_proj": 0.3, ".*": 0.2}
  weights: [2, 1, 1]
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
        print(f"merge-engine: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="merge-engine", description="Merge many LoRA adapters into one, fast, exactly and in little memory."
    )
    parser.add_argument("--version", action="version", version=f"merge-engine {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    merge = _command(commands, "merge", _merge, MERGE_EXAMPLES, "merge adapters into one that PEFT loads")
    merge.add_argument("adapters", nargs="+", help="adapter folders or hub ids (user/repo), or one recipe.yaml")
    merge.add_argument("-o", "--output", type=Path, help="folder to write")
    merge.add_argument("--overwrite", action="store_true", default=None, help="replace an existing output")
    merge.add_argument("--method", choices=CHOICES["method"], help="default: ties")
    merge.add_argument("--weights", nargs="+", type=float, metavar="W", help="one an adapter; default: 1 each")
    merge.add_argument(
        "--density",
        nargs="+",
        metavar="D",
        help="share kept by a trim or a drop: one number, one an adapter, or PATTERN=NUMBER by module; default: 0.2",
    )
    merge.add_argument("--space", choices=CHOICES["space"], help="merge B @ A, or A and B apart; default: delta")
    merge.add_argument("--scale", type=float, help="multiplies the result (lambda); default: 1")
    merge.add_argument("--rank", type=_rank, help="of the result: a number, or auto (sum of the ranks); default: auto")
    merge.add_argument("--energy", type=float, help="instead of --rank: keep this share of the delta's energy, as 0.99")
    merge.add_argument("--election", choices=CHOICES["election"], help="how signs are elected; default: total")
    merge.add_argument("--scope", choices=CHOICES["scope"], help="one trim threshold a tensor, or one a model")
    merge.add_argument("--trim-ties", choices=CHOICES["trim_ties"], help="equal magnitudes at the threshold")
    merge.add_argument("--convention", choices=CHOICES["convention"], help="whose arithmetic; default: peft")
    merge.add_argument("--seed", type=int, help="of the random drops; default: 0")
    merge.add_argument("--backend", choices=CHOICES["backend"], help="who computes; default: auto")
    merge.add_argument("--dtype", choices=CHOICES["dtype"], help="of the written factors; default: the adapters' own")

    info = _command(commands, "info", _info, INFO_EXAMPLES, "rank, scaling, size and norms of an adapter")
    info.add_argument("adapters", nargs="*", metavar="adapter", help="adapter folder or hub id")
    info.add_argument("--system", action="store_true", help="show which backend is used here, and why")

    _command(commands, "demo", _demo, DEMO_EXAMPLES, "merge the bundled adapters and measure each result (needs peft)")
    return parser


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

    given = {key: value for key, value in vars(options).items() if value is not None and key != "run"}
    if "density" in given:
        given["density"] = _density(given["density"])
    asked = {**_recipe_file(given), **given}
    adapters, output = asked.pop("adapters"), asked.pop("output", None)
    if output is None:
        raise RecipeError("output: wanted a folder to write to (-o OUT), got none")
    merged = merge(adapters, output, **asked)
    ranks = sorted({module.rank for module in merged.plan.modules})
    print(
        f"{output}: {len(adapters)} adapters, {len(merged.plan.modules)} modules, "
        f"rank up to {ranks[-1]}, kept energy {merged.total_energy:.4f}"
    )


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
