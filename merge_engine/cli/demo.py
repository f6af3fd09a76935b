"""merge-engine demo: merge the bundled adapters and measure each result."""

import argparse
from typing import Any

from merge_engine.cli.options import add_command

DEMO_EXAMPLES = """\
example:
  merge-engine demo
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    add_command(commands, "demo", run, DEMO_EXAMPLES, "merge the bundled adapters and measure each result (needs peft)")


def run(options: argparse.Namespace) -> None:
    from merge_engine.demo.run import run as run_demo

    run_demo(print)
