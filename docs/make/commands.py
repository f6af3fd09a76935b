"""The pages on the command line and on recipe files, made from the command's own parser."""

import argparse
from collections.abc import Iterator

from merge_engine.cli.main import make_parser
from merge_engine.cli.parser import LISTS
from merge_engine.rules.choices import CHOICES

LISTED_ELSEWHERE = ("help", "parser")


def parsers() -> dict[str, argparse.ArgumentParser]:
    """{command: its parser}, in the order of the help text."""
    (action,) = (each for each in make_parser()._actions if isinstance(each, argparse._SubParsersAction))
    return dict(action.choices)


def command_page() -> str:
    """Each command with its usage, its options and its examples."""
    lists = ", ".join(f"`{flag}`" for flag in LISTS)
    parts = [
        "# Command line",
        f"Made from the command's own parser. Lists ({lists}) may stand before the adapters and be written with "
        "spaces or commas. A mistake is one line on standard error, and exit code 2.",
    ]
    for name, parser in parsers().items():
        usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
        parts += [f"## merge-engine {name}", _cell(parser.description or ""), f"```text\n{_wrapped(usage)}\n```"]
        parts.append(_table(("argument", "what it is"), _rows(parser)))
        if parser.epilog:
            parts.append(f"```text\n{parser.epilog.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def recipe_page() -> str:
    """The keys of a recipe file: the options of `merge`, by the names that they have in YAML."""
    parser = parsers()["merge"]
    rows = [
        (f"`{action.dest}`", _text(action))
        for action in parser._actions
        if action.option_strings and action.dest not in LISTED_ELSEWHERE
    ]
    head = """# Recipe files

`merge-engine merge recipe.yaml` reads keys with the names of the command's options, `_` for `-`. An option that is
given beside the file wins. Unknown keys are an error that lists the known ones. Fields that have no option
(`module_weights`, `normalize` and others) are keys too: see [`Recipe`](api.md#merge_engine.Recipe).

```yaml
adapters: [sql, chat, user/ads]  # folders, .safetensors files or hub ids
output: merged
method: ties
density: {".*q_proj": 0.3, ".*": 0.2}
weights: [2, 1, 1]
```

A sweep: `sweep: {density: [0.1, 0.2], weights: [[2, 1, 1], [1, 1, 1]]}`, scored by `evaluate: python score.py {path}`.
Several merges of a pool of adapters: `adapters: {sql: path, chat: user/chat}` and `merges:`, a list of recipes with a
`name`. A file with `merge_method` is a [recipe of mergekit's](../models.md#mergekits-recipes).

## Keys
"""
    return f"{head}\n{_table(('key', 'what it is'), rows)}\n"


def _rows(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    for action in parser._actions:
        names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.dest}`"
        yield names, _text(action)


def _text(action: argparse.Action) -> str:
    return ": ".join(filter(None, (_cell(action.help or ""), _choices(action))))


def _choices(action: argparse.Action) -> str:
    known = action.choices if action.choices is not None else CHOICES.get(action.dest)
    return "" if known is None else ", ".join(f"`{choice}`" for choice in known)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _table(head: tuple[str, ...], rows: object) -> str:
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]  # type: ignore[attr-defined]
    return "\n".join(lines)


def _wrapped(usage: str, width: int = 100) -> str:
    import textwrap

    return textwrap.fill(usage, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
