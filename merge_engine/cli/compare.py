"""merge-engine compare: how adapters conflict, before they are merged."""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merge_engine.cli.options import add_command, given_options
from merge_engine.cli.parser import show, split_list
from merge_engine.errors import OutputError, RecipeError

COMPARE_EXAMPLES = """\
examples:
  merge-engine compare sql chat ads
  merge-engine compare sql user/chat --density 0.1 --json figures.json --html report.html
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands, "compare", run, COMPARE_EXAMPLES, "show how adapters conflict, before they are merged"
    )
    parser.add_argument("adapters", nargs="+", help="adapter folders, .safetensors files or hub ids, two or more")
    parser.add_argument(
        "--density",
        type=split_list,
        metavar="D...",
        help="share of elements that the trim keeps: one number, one for each adapter, or PATTERN=NUMBER by module; "
        "default: 0.2",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every module")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots (needs matplotlib)")
    parser.add_argument("--overwrite", action="store_true", default=None, help="replace existing files")


def run(options: argparse.Namespace) -> None:
    from merge_engine.compare.interference import interference
    from merge_engine.files.text import write_text

    given = given_options(options)
    files = {kind: given.pop(kind) for kind in ("json", "html") if kind in given}
    overwrite = given.pop("overwrite", False)
    for path in files.values():
        if path.exists() and not overwrite:
            raise OutputError(f"{path} already exists; pass --overwrite to replace it")
    if "html" in files and find_spec("matplotlib") is None:
        raise RecipeError("html: needs matplotlib; wanted: pip install 'merge-engine[report]'")
    result = interference(**given)
    show(result.table())
    if "json" in files:
        write_text(files["json"], json.dumps(result.as_dict(), allow_nan=False) + "\n")
    if "html" in files:
        from merge_engine.compare.page import render

        write_text(files["html"], render(result))
