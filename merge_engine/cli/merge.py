"""merge-engine merge: adapters into one adapter or into a base model, many merges at once, or a mergekit recipe."""

import argparse
import sys
from typing import Any

from merge_engine.cli.merge_models import say_model, say_pushed, write_model
from merge_engine.cli.options import (
    OF_EVALUATION,
    add_command,
    given_options,
    merge_options,
    methods_text,
    overwrite_as_flag,
    parse_rank,
    recipe_file,
    refuse,
    sweep_options,
    take_evaluation,
    take_output,
    take_push,
)
from merge_engine.cli.postponed import postpone
from merge_engine.cli.result import Result, result_of
from merge_engine.errors import RecipeError, printable, some
from merge_engine.rules.choices import CHOICES, KINDS

MERGE_EXAMPLES = """\
examples:
  merge-engine merge sql chat ads -o merged --method ties --density 0.2 --weights 2 1 1
  merge-engine merge user/sql user/chat -o merged --method linear --rank 16
  merge-engine merge a.safetensors b.safetensors -o ab.safetensors --weights 1 0.8 'a:down_blocks.*=0.5'
  merge-engine merge --into llama sql chat -o merged --method ties --shard-size 2GB
  merge-engine merge recipe.yaml
  merge-engine merge mergekit.yml -o merged
  merge-engine merge sql chat -o swept --sweep method=ties,linear scale=0.5,1,2 weights=2:1,1:1 \\
      --evaluate "python score.py {path}"

The keys of recipe.yaml are the names of the options:
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
A file with a merge_method is a recipe of mergekit's. It is read as mergekit reads it, and makes a full model.
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands, "merge", run, MERGE_EXAMPLES + methods_text(KINDS), "merge adapters into one, or into a base model"
    )
    parser.add_argument(
        "adapters",
        nargs="+",
        help="adapter folders, .safetensors files or hub ids (user/repo, user/repo:file), or one recipe.yaml",
    )
    parser.add_argument("--into", metavar="BASE", help="write a full model: BASE with the adapters merged into it")
    merge_options(parser)
    parser.add_argument(
        "--space",
        choices=CHOICES["space"],
        help="what is merged: the deltas B @ A, A and B apart, or small matrices in common spaces; default: delta",
    )
    parser.add_argument(
        "--rank", type=parse_rank, help="rank of the result: a number, or auto (the sum of the ranks); default: auto"
    )
    parser.add_argument(
        "--energy",
        type=float,
        help="use the smallest rank, up to --rank, that keeps this share of the energy, as 0.9; 1: all but rounding",
    )
    parser.add_argument(
        "--ranks",
        choices=CHOICES["ranks"],
        help="of what is written: one for all modules, filled up with zeros, as servers want it, or each its own; "
        "default: one",
    )
    sweep_options(parser)


def run(options: argparse.Namespace) -> int | None:
    given = given_options(options)
    recipe = recipe_file(given)
    if "merge_method" in recipe:
        with result_of(given) as result:
            _mergekit(given, result)
        return None
    swept = given.get("sweep", ())
    given = {**{key: value for key, value in recipe.items() if key not in swept}, **given}
    with result_of(given) as result:
        return _merged(given, result)


def _merged(given: dict[str, Any], result: Result) -> int | None:
    """Carry out the options; what they came to goes to the result. The exit code is 1 if one of several failed."""
    from merge_engine.engine.merge import merge
    from merge_engine.runtime.processes import asked_for

    several = next((key for key in ("sweep", "merges") if key in given), None)
    if several and "into" in given:
        raise RecipeError(f"{several}: makes adapters, not full models; wanted no --into with it")
    if several and "push" in given:
        raise RecipeError(f"{several}: makes several adapters; wanted no --push with it")
    if not several:
        refuse(given, ("evaluate", *OF_EVALUATION, "memory"), "a sweep", "--sweep")
    if "into" in given:
        write_model(given, given.pop("into"), given.pop("adapters"), result)
        return None
    refuse(given, ("vocab", "shard_size", "dry_run"), "full models", "--into BASE")
    if asked_for().world > 1:
        raise RecipeError("ranks: a single process merges adapters into one; wanted --into BASE with several processes")
    adapters, output = given.pop("adapters"), take_output(given)
    if several:
        return _several(adapters, output, given, result)
    repo = take_push(given)
    merged = merge(adapters, output, **given)
    servers = "" if merged.server_note is None else f"; {merged.server_note}"
    result.say(
        f"{output}: {some(len(adapters), 'adapter')}, {some(len(merged.ranks), 'module')}, "
        f"rank up to {merged.rank}, kept energy {merged.total_energy:.4f}{servers}",
        output=output,
        adapters=len(adapters),
        modules=len(merged.ranks),
        rank=merged.rank,
        kept_energy=merged.total_energy,
        max_lora_rank=merged.max_lora_rank,
    )
    say_pushed(merged, repo, result)
    return None


def _several(adapters: Any, output: Any, given: dict[str, Any], result: Result) -> int:
    """A sweep, or the merges of a recipe file; prints a table of all. The exit code is 1 if one failed."""
    from merge_engine.sweeps.run import run as run_sweep
    from merge_engine.sweeps.trials import pool_trials, sweep_trials

    axes, merges = given.pop("sweep", None), given.pop("merges", None)
    if axes is not None and merges is not None:
        raise RecipeError("sweep: wanted a sweep or merges, got both")
    evaluation = take_evaluation(given)
    options = {key: given.pop(key) for key in ("memory", "overwrite", "backend") if key in given}
    if merges is None:
        trials = sweep_trials(axes, given, len(adapters))
    else:
        adapters, trials = pool_trials(merges, adapters, given)
    try:
        outcome = run_sweep(adapters, output, trials, evaluation=evaluation, **options)
    except KeyboardInterrupt:
        print(f"merge-engine: interrupted; run the same command again to go on with {output}", file=sys.stderr)
        return 130
    rows = [
        {
            "name": row.trial.name,
            "output": row.folder,
            "kept_energy": row.kept_energy,
            "seconds": row.seconds,
            "score": row.score,
            "metrics": row.metrics,
            "error": row.error or None,
        }
        for row in outcome.rows
    ]
    result.say(outcome.table(), output=output, merges=rows)
    if outcome.failed:
        print(
            f"merge-engine: {len(outcome.failed)} of {len(trials)} failed; run the command again to retry them:",
            file=sys.stderr,
        )
        for row in outcome.failed:
            print(printable(f"  {row.trial.name}: {overwrite_as_flag(row.error)}"), file=sys.stderr)
    return 1 if outcome.failed else 0


def _mergekit(given: dict[str, Any], result: Result) -> None:
    postpone()
    from merge_engine.mergekit.recipe import merge_recipe

    (file,), output, repo = given.pop("adapters"), take_output(given), take_push(given)
    for key in given:
        if key not in ("seed", "shard_size", "overwrite", "dry_run", "backend"):
            raise RecipeError(f"{key}: wanted it in {file}, a recipe of mergekit's; got it as an option")
    merged = merge_recipe(file, output, **given)
    say_model(merged, output, result)
    say_pushed(merged, repo, result)
