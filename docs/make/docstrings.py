"""Docstrings in the form of this project, for mkdocstrings: lines of the form "name: text" are a list."""

import re
from typing import Any

import griffe

_ENTRY = re.compile(r"^(?P<names>[A-Za-z_]\w*(?:, \w+)*): (?P<text>\S.*)$")


def as_markdown(text: str) -> str:
    """The docstring with every line that begins "name: " as an entry of a list."""
    lines: list[str] = []
    for line in text.splitlines():
        found = _ENTRY.match(line)
        if found:
            if lines and lines[-1] and not lines[-1].startswith(("- ", " ")):
                lines.append("")  # a list begins after an empty line
            line = f"- **{found['names']}**: {found['text']}"
        elif lines and line and not line.startswith(" ") and lines[-1].startswith(("- ", " ")):
            lines.append("")  # and ends before one
        lines.append(line)
    return "\n".join(lines)


class ProjectDocstrings(griffe.Extension):
    """Rewrites each docstring once, when its object is made."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
