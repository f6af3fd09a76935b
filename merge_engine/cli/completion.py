"""merge-engine completion: a script by which a shell completes commands, options, choices and file names."""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merge_engine.cli.options import add_command
from merge_engine.errors import RecipeError

COMPLETION_EXAMPLES = """\
in the start-up file of the shell:
  bash:  eval "$(merge-engine completion bash)"
  zsh:   eval "$(merge-engine completion zsh)"       # after compinit
  fish:  merge-engine completion fish | source
"""
_FILES = ("adapters", "adapter", "models", "base", "into", "results")  # arguments that are no Path, but may be a file


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands, "completion", run, COMPLETION_EXAMPLES, "print a script that completes the command line (needs shtab)"
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def run(options: argparse.Namespace) -> None:
    if find_spec("shtab") is None:
        raise RecipeError("completion: needs shtab; wanted: pip install 'merge-engine[completion]'")
    import shtab

    from merge_engine.cli.main import make_parser

    parser = make_parser()
    for command in _commands(parser):
        for action in command._actions:
            if action.type is Path or action.dest in _FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell=options.shell))


def _commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return list(commands.choices.values())
