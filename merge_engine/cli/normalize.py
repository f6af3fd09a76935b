"""merge-engine normalize: an adapter at one rank, with scaling 1 and no patterns, as servers load it."""

import argparse
from pathlib import Path
from typing import Any

from merge_engine.cli.options import add_command, given_options, take_output
from merge_engine.rules.choices import CHOICES

NORMALIZE_EXAMPLES = """\
examples:
  merge-engine normalize sql -o sql-for-servers
  merge-engine normalize user/chat -o chat --dtype float32
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands,
        "normalize",
        run,
        NORMALIZE_EXAMPLES,
        "write an adapter at one rank and scaling 1, as servers want it",
    )
    parser.add_argument("adapter", help="adapter folder or hub id (user/repo)")
    parser.add_argument("-o", "--output", type=Path, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", default=None, help="replace an existing output")
    parser.add_argument("--dtype", choices=CHOICES["dtype"], help="dtype of the output; default: that of the adapter")


def run(options: argparse.Namespace) -> None:
    from merge_engine.formats.normalize import normalize
    from merge_engine.formats.servers import vllm_option

    given = given_options(options)
    written = normalize(given.pop("adapter"), take_output(given), **given)
    print(f"{written}; {vllm_option(written.rank)}")
