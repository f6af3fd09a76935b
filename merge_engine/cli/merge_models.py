"""merge-engine merge-models: merge full models, and adapters on them, into one full model."""

import argparse
import os
from typing import Any

from merge_engine.cli.options import add_command, given_options, merge_options, methods_text, take_output, take_push
from merge_engine.cli.postponed import postpone
from merge_engine.cli.result import Result, result_of
from merge_engine.cli.whole_models import (
    check_convention,
    conventions_text,
    is_whole,
    merge_whole,
    whole_options,
    whole_text,
)
from merge_engine.errors import RecipeError, some
from merge_engine.rules.whole_methods import WHOLE_CONVENTIONS, WHOLE_METHODS

MODELS_EXAMPLES = """\
examples:
  merge-engine merge-models --base llama llama-chat llama-code -o merged --method ties --density 0.2
  merge-engine merge-models --base llama llama-chat sql-adapter -o merged --method linear --dry-run
  merge-engine merge-models --base llama llama-chat llama-code -o merged --vocab union
  merge-engine merge-models --method slerp --t 0.5 llama-chat llama-code -o merged
  merge-engine merge-models --method model_stock --base llama llama-chat llama-code -o merged
  torchrun --nproc-per-node 2 -m merge_engine merge-models --base llama llama-chat llama-code -o merged
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "merge-models",
        run,
        MODELS_EXAMPLES + methods_text(["elementwise"]) + whole_text(),
        "merge full models, and adapters on them, into one",
    )
    parser.add_argument("models", nargs="+", help="folders or hub ids of full models, and of adapters on the base")
    parser.add_argument("--base", help="the full model from which they were trained; some methods do without")
    merge_options(parser)
    whole_options(parser)
    for action in parser._actions:
        if action.dest in ("method", "convention"):
            more = WHOLE_METHODS if action.dest == "method" else WHOLE_CONVENTIONS
            action.choices = tuple(dict.fromkeys([*(action.choices or ()), *more]))
        if action.dest == "convention":
            action.help = conventions_text()


def run(options: argparse.Namespace) -> None:
    given = given_options(options)
    with result_of(given) as result:
        check_convention(given)
        if is_whole(given):
            postpone()
            output, repo = take_output(given), take_push(given)
            merged = merge_whole(given, output)
            say_model(merged, output, result)
            say_pushed(merged, repo, result)
            return
        if "base" not in given:
            raise RecipeError(f"base: {given.get('method', 'ties')} merges changes of one; wanted --base, got none")
        write_model(given, given.pop("base"), given.pop("models"), result)


def write_model(given: dict[str, Any], base: str, inputs: list[str], result: Result) -> None:
    """Merge changes of a base, and say what that came to."""
    from merge_engine.into.merge import merge_models

    output, repo = take_output(given), take_push(given)
    merged = merge_models(base, inputs, output, **given)
    say_model(merged, output, result)
    say_pushed(merged, repo, result)


def say_pushed(merged: Any, repo: str | None, result: Result) -> None:
    """Send a result to the hub, if it was asked for, and say its address; only rank 0 does."""
    if repo is not None and int(os.environ.get("RANK", "0")) == 0:
        address = merged.push_to_hub(repo)
        result.say(f"{merged.path}: pushed to {address}", pushed_to=address)


def say_model(merged: Any, output: Any, result: Result) -> None:
    """A line about a merged full model; only rank 0 says it."""
    from merge_engine.runtime.memory import size_text

    if int(os.environ.get("RANK", "0")) > 0:
        return
    tensors = f"{some(merged.merged, 'tensor')} merged, {merged.copied} copied"
    what = f"{some(merged.inputs, 'input')}, {tensors}, {size_text(merged.nbytes)}"
    if merged.path is None:
        shards = [f"  {name}  {size_text(nbytes)}" for name, nbytes in merged.shards.items()]
        size = f"{what} in {some(len(shards), 'file')}"
        text = "\n".join([f"{output}: would be {size}, in about {merged.seconds:.1f} s", *shards])
    else:
        resumed = f", {some(merged.resumed, 'tensor')} finished by an earlier run" if merged.resumed else ""
        text = f"{output}: {what}, {merged.seconds:.1f} s{resumed}"
    result.say(
        text,
        output=output,
        written=merged.path is not None,
        inputs=merged.inputs,
        merged=merged.merged,
        copied=merged.copied,
        resumed=merged.resumed,
        bytes=merged.nbytes,
        shards=merged.shards,
        seconds=merged.seconds,
    )
