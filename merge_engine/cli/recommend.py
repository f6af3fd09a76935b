"""merge-engine recommend: what to try first with some adapters, and why."""

import argparse
import json
from pathlib import Path
from typing import Any

from merge_engine.cli.options import add_command, given_options
from merge_engine.cli.parser import show
from merge_engine.errors import OutputError

RECOMMEND_EXAMPLES = """\
examples:
  merge-engine recommend sql chat ads
  merge-engine recommend sql user/chat --json recommendation.json
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    summary = "say which merges to try first, and why; nothing is evaluated"
    parser = add_command(commands, "recommend", run, RECOMMEND_EXAMPLES, summary)
    parser.add_argument("adapters", nargs="+", help="adapter folders or hub ids (user/repo), two or more")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same as JSON")
    parser.add_argument("--overwrite", action="store_true", default=None, help="replace an existing file")


def run(options: argparse.Namespace) -> None:
    from merge_engine.compare.recommend import recommend
    from merge_engine.files.text import write_text

    given = given_options(options)
    path, overwrite = given.get("json"), given.get("overwrite", False)
    if path is not None and path.exists() and not overwrite:
        raise OutputError(f"{path} already exists; pass --overwrite to replace it")
    found = recommend(given["adapters"])
    show(found.text())
    if path is not None:
        write_text(path, json.dumps(found.as_dict(), allow_nan=False, indent=2) + "\n")
