"""merge-engine demo: merge the bundled adapters and measure each result."""

import argparse
from typing import Any

from merge_engine.cli.options import add_command
from merge_engine.demo import SETS

DEMO_EXAMPLES = """\
example:
  merge-engine demo
  merge-engine demo --set unknown
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands, "demo", run, DEMO_EXAMPLES, "merge the bundled adapters and measure each result (needs peft)"
    )
    parser.add_argument(
        "--set",
        choices=SETS,
        default=SETS[0],
        help="adapters of six tasks that the base half-knows, or of four that are unknown to it; default: half-known",
    )


def run(options: argparse.Namespace) -> None:
    from merge_engine.demo.run import run as run_demo

    run_demo(print, options.set)
