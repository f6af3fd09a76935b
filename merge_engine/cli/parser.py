"""How a command line is read: lists that end by themselves, and mistakes reported in one line."""

import argparse
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

from merge_engine.errors import printable

LISTS = ("--weights", "--density", "--gain", "--sweep")  # options that take several values
_END = "\n"  # between values that were joined; no value holds it
_INVALID = re.compile(r"argument (?P<flag>[^:]+): (?P<text>.*)", re.DOTALL)


def show(text: str) -> None:
    """Print a table or a text, with what a terminal would obey escaped."""
    print("\n".join(map(printable, text.split("\n"))))


class Printable(logging.Formatter):
    """Warnings that are logged, each on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """The text of a warning."""
        return printable(super().format(record))


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that reports a mistake in one line, says what was meant, and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        """Print one line to stderr and exit with code 2."""
        found = _INVALID.fullmatch(message)
        if found:
            message = f"{found['flag'].split('/')[-1]}: {found['text']}"
        print(printable(f"merge-engine: error: {message}; see {self.prog} --help"), file=sys.stderr)
        raise SystemExit(2)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The options; an unknown one is an error that names those which are spelt like it."""
        joined = list(join_lists(sys.argv[1:] if args is None else args))
        options, unknown = self.parse_known_args(joined, namespace)
        if unknown:
            parser = _parser_of(self, options)
            flag = unknown[0].partition("=")[0]
            known = [each for each in parser._option_string_actions if each.startswith("--")]
            what = "is no option" if flag.startswith("-") else "was not expected here"
            parser.error(f"{flag} {what}{meant(flag, known)}")
        return options

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(each) for each in action.choices]
            wanted = f"wanted {', '.join(choices)}, got {value}{meant(str(value), choices)}"
            raise argparse.ArgumentError(action, wanted)


def meant(word: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" for the known word that is spelt most like this one, or nothing."""
    import difflib  # takes a tenth of the time of --help

    near = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def split_list(text: str) -> list[str]:
    """The values of a list option, as `join_lists` joined them; 2,1 are two numbers."""
    values: list[str] = []
    for value in text.split(_END):
        parts = value.split(",")
        values += parts if all(map(_is_number, parts)) else [value]
    return values


def join_lists(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments with the values of each list option joined into one, so that adapters may follow them.

    A list ends before the first argument that is neither a number, nor numbers with commas, nor of the form a=b.
    """
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        flag, equals, value = argument.partition("=")
        if argument == "--":
            yield argument
            yield from waiting
            return
        if flag not in LISTS or not (equals or waiting):
            yield argument
            continue
        values = [value if equals else waiting.pop(0)]
        while waiting and _is_value(waiting[0]):
            values.append(waiting.pop(0))
        yield f"{flag}={_END.join(values)}"


def _is_value(text: str) -> bool:
    if text.startswith("--"):
        return False
    return "=" in text or all(map(_is_number, text.split(",")))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parser_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> argparse.ArgumentParser:
    """The parser of the command that was given."""
    found: argparse.ArgumentParser = getattr(options, "parser", parser)
    return found
