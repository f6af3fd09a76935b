"""merge-engine search: the recipe with the best score, by Optuna."""

import argparse
import sys
from pathlib import Path
from typing import Any

from merge_engine.cli.options import (
    OF_EVALUATION,
    add_command,
    evaluation_options,
    given_options,
    take_evaluation,
    take_output,
)
from merge_engine.cli.parser import show
from merge_engine.errors import RecipeError, printable

SEARCH_EXAMPLES = """\
examples:
  merge-engine search sql chat ads -o found --evaluate "python score.py {path}" --trials 60
  merge-engine search sql chat ads -o found --evaluate "python score.py {path}" --metric '*/acc' --combine worst \\
      --vary method=tsv,ties gain=0.5..2 weights=0.5..2 density=0.1..0.9 --fixed rank=16

The first trials are sober defaults (linear, tsv and actmat with scale auto), the next ones are Optuna's. The same
command goes on where it stopped; several processes with it share the trials. In OUT: best (the best merge), recipe.yaml
(repeats it), trials.csv, plots, and study.db (optuna-dashboard sqlite:///OUT/study.db).
Choose by one sample and report on another: the best score of many is too good by chance.
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(commands, "search", run, SEARCH_EXAMPLES, "search for the recipe with the best score")
    add = parser.add_argument
    add("adapters", nargs="+", help="adapter folders or hub ids (user/repo)")
    add("-o", "--output", type=Path, help="folder of the search")
    evaluation_options(add)
    add("--trials", type=int, default=60, metavar="N", help="finished trials, earlier runs counted; default: 60")
    add(
        "--vary",
        nargs="+",
        metavar="FIELD=...",
        help="what is searched: FIELD=LOW..HIGH or FIELD=VALUE,VALUE; weights are one for each adapter; "
        "default: method, weights, gain, ridge and density",
    )
    add("--fixed", nargs="+", metavar="FIELD=VALUE", help="what all trials have, as rank=16")
    add(
        "--groups",
        type=_groups,
        default=1,
        metavar="N",
        help="groups of layers with weights of their own, or kinds: a gain for each kind of module; default: 1",
    )
    add("--sampler", choices=("tpe", "cmaes", "random"), default="tpe", help="Optuna's sampler; default: tpe")
    add("--seed", type=int, default=0, help="seed of the sampler; default: 0")
    add("--memory", metavar="SIZE", default="4GB", help="limit for this process; default: 4GB")
    add("--backend", choices=("auto", "torch", "triton"), help="triton (GPU), torch (CPU) or auto; default: auto")


def _groups(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def run(options: argparse.Namespace) -> int:
    from merge_engine.searches.run import run as run_search
    from merge_engine.searches.space import parse_space
    from merge_engine.sweeps.trials import parse_axes

    given = given_options(options)
    if "evaluate" not in given:
        raise RecipeError("evaluate: wanted a command that scores a merge (--evaluate), got none")
    evaluation = take_evaluation({key: given.pop(key) for key in ("evaluate", *OF_EVALUATION) if key in given})
    adapters, output = given.pop("adapters"), take_output(given)
    space = parse_space(given.pop("vary")) if "vary" in given else None
    fixed = {}
    for field, values in parse_axes(given.pop("fixed", [])).items():
        if len(values) > 1:
            raise RecipeError(f"fixed: {field}: wanted one value, got {len(values)}; wanted several in --vary")
        fixed[field] = values[0]
    try:
        found = run_search(adapters, evaluation, output, space=space, fixed=fixed, **given)
    except KeyboardInterrupt:
        print(f"merge-engine: interrupted; run the same command again to go on with {output}", file=sys.stderr)
        return 130
    show(found.table())
    print(found.where())
    for trial in found.failed:
        print(printable(f"merge-engine: trial {trial.number} failed: {trial.error}"), file=sys.stderr)
    return 1 if found.failed else 0
