"""The merge-engine command. Exit codes: 0 done, 1 unexpected failure, 2 a mistake of the user's, told in one line.

A sweep in which some merges or scores failed ends with 1, what is interrupted with 130, and with 141 where nobody reads
what is printed any more.
"""

import argparse
import gc
import io
import json
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merge_engine import __version__
from merge_engine.errors import MergeError, OutputError, RecipeError

MERGE_EXAMPLES = """\
examples:
  merge-engine merge sql chat ads -o merged --method ties --density 0.2 --weights 2 1 1
  merge-engine merge user/sql user/chat -o merged --method linear --rank 16
  merge-engine merge --into llama sql chat -o merged --method ties --shard-size 2GB
  merge-engine merge recipe.yaml
  merge-engine merge mergekit.yml -o merged
  merge-engine merge sql chat -o swept --sweep method=ties,linear scale=0.5,1,2 weights=2:1,1:1 \\
      --evaluate "python score.py {path}"

recipe.yaml holds the same names as the options:
  adapters: [sql, chat, ads]
  output: merged
  method: ties
  density: {".*q_proj": 0.3, ".*": 0.2}
  weights: [2, 1, 1]
and for a sweep, or for several merges of the same adapters:
  sweep: {density: [0.1, 0.2], weights: [[2, 1, 1], [1, 1, 1]]}
  evaluate: python score.py {path}
or
  adapters: {sql: sql-adapter, chat: user/chat, ads: ads-adapter}
  merges:
    - {name: both, adapters: [sql, chat], method: linear}
    - {name: all, density: 0.1}
A recipe of mergekit's, which has a merge_method, is read as mergekit reads it, and makes a full model.
"""
MODELS_EXAMPLES = """\
examples:
  merge-engine merge-models --base llama llama-chat llama-code -o merged --method ties --density 0.2
  merge-engine merge-models --base llama llama-chat sql-adapter -o merged --method linear --dry-run
  merge-engine merge-models --base llama llama-chat llama-code -o merged --vocab union
  torchrun --nproc-per-node 2 -m merge_engine merge-models --base llama llama-chat llama-code -o merged
"""
INFO_EXAMPLES = """\
examples:
  merge-engine info sql
  merge-engine info --system
"""
COMPARE_EXAMPLES = """\
examples:
  merge-engine compare sql chat ads
  merge-engine compare sql user/chat --density 0.1 --json figures.json --html report.html
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
# Of the keys of a recipe file that are not the recipe's own.
_KINDS = {"output": str, "into": str, "evaluate": str, "backend": str, "vocab": str, "overwrite": bool, "dry_run": bool}


def command() -> int:
    """`main` in a process of its own, where garbage is hardly collected.

    To import torch and Numba makes millions of objects that stay; going through them again and again, and once more at
    the end, takes 0.7 s.
    """
    gc.set_threshold(1_000_000, 50, 50)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show
    code = main()
    gc.freeze()  # what is left goes with the process
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = _show_warning
            code: int | None = options.run(options)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("merge-engine: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return 141
    except OSError as error:
        print(f"merge-engine: error: {error}", file=sys.stderr)
        return 1
    except MergeError as error:
        rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        print(f"merge-engine: error: {rank}{error}", file=sys.stderr)
        return 2
    return code or 0


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
    merge.add_argument("--energy", type=float, help="the smallest rank, up to --rank, that keeps this share, as 0.9")
    _sweep_options(merge)

    models = _command(commands, "merge-models", _merge_models, MODELS_EXAMPLES, "merge full models of one base")
    models.add_argument("models", nargs="+", help="folders or hub ids of full models, and of adapters on the same base")
    models.add_argument("--base", required=True, help="the full model that they were trained from")
    _merge_options(models)

    info = _command(commands, "info", _info, INFO_EXAMPLES, "rank, scaling, size and norms of an adapter")
    info.add_argument("adapters", nargs="*", metavar="adapter", help="adapter folder or hub id")
    info.add_argument("--system", action="store_true", help="show which backend is used here, and why")

    compare = _command(commands, "compare", _compare, COMPARE_EXAMPLES, "show what fights, before adapters are merged")
    compare.add_argument("adapters", nargs="+", help="adapter folders or hub ids (user/repo), two or more")
    compare.add_argument(
        "--density",
        nargs="+",
        metavar="D",
        help="share kept by the trim: one number, one an adapter, or PATTERN=NUMBER by module; default: 0.2",
    )
    compare.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every module")
    compare.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots (needs matplotlib)")
    compare.add_argument("--overwrite", action="store_true", default=None, help="replace existing files")

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
    add("--vocab", choices=("base", "union"), help="of a full model: the base's tokens, or all inputs'; default: base")
    add("--shard-size", metavar="SIZE", help="of each weight file of a full model, as 2GB; default: 5GB")
    add("--dry-run", action="store_true", default=None, help="full models: show plan, sizes and time; write nothing")


def _sweep_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("several merges, each in a folder of its own below the output").add_argument
    add(
        "--sweep",
        nargs="+",
        metavar="FIELD=V,V",
        help="merge every combination, as density=0.1,0.2 scale=0.5,1; one number an input as weights=2:1:1,1:1:1",
    )
    add("--evaluate", metavar="COMMAND", help="score each: run this with {path} as its folder; the last number printed")
    add("--timeout", type=float, metavar="SECONDS", help="of one evaluation; default: none")
    add("--best", choices=("highest", "lowest"), help="which score is best; default: highest")
    add("--memory", metavar="SIZE", help="that the merges may take together; default: 4GB")


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


def _merge(options: argparse.Namespace) -> int | None:
    from merge_engine.engine import merge

    asked = _asked(options)
    recipe = _recipe_file(asked)
    if "merge_method" in recipe:
        _mergekit(asked)
        return None
    swept = asked.get("sweep", ())
    asked = {**{key: value for key, value in recipe.items() if key not in swept}, **asked}
    several = "sweep" in asked or "merges" in asked
    for key in ("merges", "sweep") if "into" in asked else () if several else ("evaluate", "timeout", "best", "memory"):
        if key in asked:
            wanted = "no --into" if "into" in asked else "--sweep with it"
            raise RecipeError(f"{key}: is of several merges into adapters; wanted {wanted}")
    if "into" in asked:
        _into(asked, asked.pop("into"), asked.pop("adapters"))
        return None
    for key in ("vocab", "shard_size", "dry_run"):
        if key in asked:
            raise RecipeError(f"{key}: is of merges into a full model; wanted --into BASE with it")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("ranks: adapters are merged into one by a single process; wanted --into BASE with several")
    adapters, output = asked.pop("adapters"), _output(asked)
    if several:
        return _several(adapters, output, asked)
    merged = merge(adapters, output, **asked)
    print(
        f"{output}: {len(adapters)} adapters, {len(merged.ranks)} modules, "
        f"rank up to {max(merged.ranks.values())}, kept energy {merged.total_energy:.4f}"
    )
    return None


def _several(adapters: Any, output: Any, asked: dict[str, Any]) -> int:
    """A sweep, or the merges of a recipe file: a table of them all; 1 where one failed."""
    from merge_engine import sweep, sweep_run

    axes, merges, text = asked.pop("sweep", None), asked.pop("merges", None), asked.pop("evaluate", None)
    for key in ("timeout", "best"):
        if key in asked and text is None:
            raise RecipeError(f"{key}: is of an evaluation; wanted --evaluate with it")
    if axes is not None and merges is not None:
        raise RecipeError("sweep: wanted a sweep or merges, got both")
    timeout, choose = asked.pop("timeout", None), asked.pop("best", "highest")
    evaluation = None if text is None else sweep_run.command(text, timeout)
    how = {key: asked.pop(key) for key in ("memory", "overwrite", "backend") if key in asked}
    if merges is None:
        trials = sweep.sweep_trials(axes, asked, len(adapters))
    else:
        adapters, trials = sweep.pool_trials(merges, adapters, asked)
    try:
        outcome = sweep_run.run(adapters, output, trials, evaluation=evaluation, choose=choose, **how)
    except KeyboardInterrupt:
        print(f"merge-engine: interrupted; the same command goes on with {output} from here", file=sys.stderr)
        return 130
    print(outcome.table())
    if outcome.failed:
        print(f"merge-engine: {len(outcome.failed)} of {len(trials)} failed; run again to try them:", file=sys.stderr)
        for row in outcome.failed:
            print(f"  {row.trial.name}: {row.error}", file=sys.stderr)
    return 1 if outcome.failed else 0


def _merge_models(options: argparse.Namespace) -> None:
    asked = _asked(options)
    _into(asked, asked.pop("base"), asked.pop("models"))


def _into(asked: dict[str, Any], base: str, inputs: list[str]) -> None:
    from merge_engine.into import merge_models

    output = _output(asked)
    _tell(merge_models(base, inputs, output, **asked), output)


def _mergekit(asked: dict[str, Any]) -> None:
    from merge_engine.mergekit_recipe import merge_recipe

    (file,), output = asked.pop("adapters"), _output(asked)
    for key in asked:
        if key not in ("seed", "shard_size", "overwrite", "dry_run", "backend"):
            raise RecipeError(f"{key}: wanted it in {file}, which is mergekit's; got it as an option")
    _tell(merge_recipe(file, output, **asked), output)


def _tell(merged: Any, output: Any) -> None:
    """Say what became of a full model, once however many ranks there are."""
    if int(os.environ.get("RANK", "0")) > 0:
        return
    inputs = len(merged.plan.adapters)
    what = f"{inputs} inputs, {merged.merged} tensors merged, {merged.copied} copied, {merged.nbytes / 1e9:.3g} GB"
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
    if "sweep" in given:
        from merge_engine.sweep import parse_axes

        given["sweep"] = parse_axes(given["sweep"])
    return given


def _output(asked: dict[str, Any]) -> Any:
    output = asked.pop("output", None)
    if output is None:
        raise RecipeError("output: wanted a folder to write to (-o OUT), got none")
    return output


def _recipe_file(given: dict[str, Any]) -> dict[str, Any]:
    """The keys of a recipe file, if one was given in place of adapters.

    `adapters` is taken out of `given` then, if the recipe is one of ours; mergekit's have a merge_method.
    """
    first = Path(given["adapters"][0])
    if first.suffix not in (".yaml", ".yml"):
        return {}
    if len(given["adapters"]) > 1:
        raise RecipeError(f"adapters: wanted one recipe file or adapters, got {first} and more")
    from merge_engine.recipe import read_yaml

    recipe = read_yaml(first)
    if isinstance(recipe, dict) and "merge_method" in recipe:
        return recipe
    adapters = recipe.get("adapters") if isinstance(recipe, dict) else None
    if not adapters or not isinstance(adapters, (list, dict) if "merges" in recipe else list):
        raise RecipeError(f"{first}: wanted a table of keys with a list of adapters")
    for each in adapters.values() if isinstance(adapters, dict) else adapters:
        if not isinstance(each, str):
            raise RecipeError(f"{first}: adapters: wanted folders or hub ids, got {each!r}")
    for key, kind in _KINDS.items():
        if not isinstance(recipe.get(key, kind()), kind):
            wanted = "true or false" if kind is bool else "a text"
            raise RecipeError(f"{first}: {key}: wanted {wanted}, got {recipe[key]!r}")
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
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"wanted auto or a whole number, got {text!r}")
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


def _compare(options: argparse.Namespace) -> None:
    from merge_engine.compare import interference

    asked = _asked(options)
    files = {kind: asked.pop(kind) for kind in ("json", "html") if kind in asked}
    overwrite = asked.pop("overwrite", False)
    for path in files.values():
        if path.exists() and not overwrite:
            raise OutputError(f"{path} exists already; --overwrite replaces it")
    if "html" in files and find_spec("matplotlib") is None:
        raise RecipeError("html: needs matplotlib; wanted: pip install 'merge-engine[report]'")
    result = interference(**asked)
    print(result.table())
    if "json" in files:
        _write(files["json"], json.dumps(result.as_dict(), allow_nan=False) + "\n")
    if "html" in files:
        from merge_engine.compare_report import render

        _write(files["html"], render(result))


def _write(path: Path, text: str) -> None:
    """A file that appears whole or not at all."""
    from merge_engine.stream import writing

    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)


def _demo(options: argparse.Namespace) -> None:
    from merge_engine.demo.run import run

    run(print)


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    print(f"merge-engine: warning: {message}", file=sys.stderr)
