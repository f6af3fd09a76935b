"""merge-engine merge: adapters into one, into a base model, many times over, or as a mergekit recipe says."""

import argparse
import os
import sys
from typing import Any

from merge_engine.cli.merge_models import tell, write_model
from merge_engine.cli.options import (
    add_command,
    asked_for,
    merge_options,
    methods_text,
    parse_rank,
    recipe_file,
    sweep_options,
    take_output,
)
from merge_engine.errors import RecipeError
from merge_engine.rules.choices import CHOICES, KINDS

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


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands, "merge", run, MERGE_EXAMPLES + methods_text(KINDS), "merge adapters into one, or into a base model"
    )
    parser.add_argument("adapters", nargs="+", help="adapter folders or hub ids (user/repo), or one recipe.yaml")
    parser.add_argument("--into", metavar="BASE", help="write a full model: this one with the adapters merged into it")
    merge_options(parser)
    parser.add_argument(
        "--space",
        choices=CHOICES["space"],
        help="what is merged: the deltas B @ A, A and B apart, or small matrices in common spaces; default: delta",
    )
    parser.add_argument(
        "--rank", type=parse_rank, help="of the result: a number, or auto (sum of the ranks); default: auto"
    )
    parser.add_argument("--energy", type=float, help="the smallest rank, up to --rank, that keeps this share, as 0.9")
    sweep_options(parser)


def run(options: argparse.Namespace) -> int | None:
    from merge_engine.engine.merge import merge

    asked = asked_for(options)
    recipe = recipe_file(asked)
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
        write_model(asked, asked.pop("into"), asked.pop("adapters"))
        return None
    for key in ("vocab", "shard_size", "dry_run"):
        if key in asked:
            raise RecipeError(f"{key}: is of merges into a full model; wanted --into BASE with it")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("ranks: adapters are merged into one by a single process; wanted --into BASE with several")
    adapters, output = asked.pop("adapters"), take_output(asked)
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
    from merge_engine.sweep.run import run as run_sweep
    from merge_engine.sweep.score import command
    from merge_engine.sweep.trials import pool_trials, sweep_trials

    axes, merges, text = asked.pop("sweep", None), asked.pop("merges", None), asked.pop("evaluate", None)
    for key in ("timeout", "best"):
        if key in asked and text is None:
            raise RecipeError(f"{key}: is of an evaluation; wanted --evaluate with it")
    if axes is not None and merges is not None:
        raise RecipeError("sweep: wanted a sweep or merges, got both")
    timeout, choose = asked.pop("timeout", None), asked.pop("best", "highest")
    evaluation = None if text is None else command(text, timeout)
    how = {key: asked.pop(key) for key in ("memory", "overwrite", "backend") if key in asked}
    if merges is None:
        trials = sweep_trials(axes, asked, len(adapters))
    else:
        adapters, trials = pool_trials(merges, adapters, asked)
    try:
        outcome = run_sweep(adapters, output, trials, evaluation=evaluation, choose=choose, **how)
    except KeyboardInterrupt:
        print(f"merge-engine: interrupted; the same command goes on with {output} from here", file=sys.stderr)
        return 130
    print(outcome.table())
    if outcome.failed:
        print(f"merge-engine: {len(outcome.failed)} of {len(trials)} failed; run again to try them:", file=sys.stderr)
        for row in outcome.failed:
            print(f"  {row.trial.name}: {row.error}", file=sys.stderr)
    return 1 if outcome.failed else 0


def _mergekit(asked: dict[str, Any]) -> None:
    from merge_engine.mergekit.recipe import merge_recipe

    (file,), output = asked.pop("adapters"), take_output(asked)
    for key in asked:
        if key not in ("seed", "shard_size", "overwrite", "dry_run", "backend"):
            raise RecipeError(f"{key}: wanted it in {file}, which is mergekit's; got it as an option")
    tell(merge_recipe(file, output, **asked), output)
