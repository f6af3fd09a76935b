"""merge-engine merge-models: full models of one base, and adapters on it, into one."""

import argparse
import os
from typing import Any

from merge_engine.cli.options import add_command, asked_for, merge_options, methods_text, take_output

MODELS_EXAMPLES = """\
examples:
  merge-engine merge-models --base llama llama-chat llama-code -o merged --method ties --density 0.2
  merge-engine merge-models --base llama llama-chat sql-adapter -o merged --method linear --dry-run
  merge-engine merge-models --base llama llama-chat llama-code -o merged --vocab union
  torchrun --nproc-per-node 2 -m merge_engine merge-models --base llama llama-chat llama-code -o merged
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands, "merge-models", run, MODELS_EXAMPLES + methods_text(["elementwise"]), "merge full models of one base"
    )
    parser.add_argument("models", nargs="+", help="folders or hub ids of full models, and of adapters on the same base")
    parser.add_argument("--base", required=True, help="the full model that they were trained from")
    merge_options(parser)


def run(options: argparse.Namespace) -> None:
    asked = asked_for(options)
    write_model(asked, asked.pop("base"), asked.pop("models"))


def write_model(asked: dict[str, Any], base: str, inputs: list[str]) -> None:
    from merge_engine.into.merge import merge_models

    output = take_output(asked)
    tell(merge_models(base, inputs, output, **asked), output)


def tell(merged: Any, output: Any) -> None:
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
