"""What an evaluation printed or wrote, as {metric: number}: JSON, ``name: X`` lines, a table or file of lm-eval's.

Nothing is guessed: an output that could be read in two ways is an error, which shows it.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from merge_engine.errors import MergeError

SCORE = "score"  # the metric of an output that names none
RESULTS = "results*.json"  # what lm-eval writes
Metrics = dict[str, float]

_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # colours
_NUMBER = r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|inf(?:inity)?)"
_LONE = re.compile(rf"(?i)\s*({_NUMBER})\s*%?\s*")
_NAMED = re.compile(rf"(?i)\s*([\w][\w ./,@-]*?)\s*[:=]\s*({_NUMBER})\s*%?\s*")
_INSIDE = re.compile(rf"(?i)(?<![\w.]){_NUMBER}(?!\w|\.\d)")
_SEPARATED = re.compile(r"(?<![\d.])[-+]?\d+(?:[.']\d+)*,\d[\d.,']*")  # 1,234.5: may be 1234.5 or two numbers
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")
_SHOWN = 160  # letters of an output in a message


def metrics_printed(printed: str) -> Metrics:
    """The metrics in what a program printed, by the first of these that is there:

    1. JSON on the last line, or as the whole output: a number, a table of them, or results of lm-eval;
    2. the table that lm-eval prints;
    3. lines ``name: X`` or ``name = X``, the last of which is the last line;
    4. a last line that is a number, or an output that has one number in all: the metric "score".

    Raises MergeError for an output without a number, with numbers that contradict each other, or with numbers such
    as 1,234.5, which may be one or two.
    """
    lines = [line.strip() for line in _ESCAPE.sub("", printed).splitlines() if line.strip()]
    for reader in (_from_json, _from_table, _from_lines):
        found = reader(lines)
        if found is not None:
            return found
    raise MergeError(f"evaluate: wanted a number on standard output, got {_shown(lines)}")


def metrics_matched(pattern: re.Pattern[str], printed: str) -> Metrics:
    """The numbers that the named groups of a regular expression match, anywhere in the output.

    Raises MergeError if it matches nowhere, what it matches is no number, or two matches of a name differ.
    """
    found: Metrics = {}
    printed = _ESCAPE.sub("", printed)
    for match in pattern.finditer(printed):
        for name, text in match.groupdict().items():
            if text is not None:
                whole = _around(printed, *match.span(name))
                if _THOUSANDS.fullmatch(whole) and whole != text:
                    raise MergeError(f"evaluate: pattern: {name}: {whole} may be one number or two, got {text!r} of it")
                _put(found, name, _number(text, f"evaluate: pattern: {name}"))
    if not found:
        raise MergeError(f"evaluate: wanted a match of {pattern.pattern!r}, got {_shown(printed.split(chr(10)))}")
    return found


def metrics_written(place: Path, since: float = 0.0) -> Metrics:
    """The metrics of a JSON file, or of the one ``results*.json`` below a folder; lm-eval's, or a table of numbers.

    since: files changed before this time, in seconds since 1970, do not count.
    Raises MergeError where there is no such file, or more than one.
    """
    files = [place] if place.is_file() else sorted(place.rglob(RESULTS))
    new = [file for file in files if file.stat().st_mtime >= since]
    if len(new) != 1:
        names = ", ".join(str(file.relative_to(place)) for file in new) or ("only older ones" if files else "none")
        raise MergeError(f"evaluate: wanted one new file of results at {place} ({RESULTS} in a folder), got {names}")
    try:
        data = json.loads(new[0].read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MergeError(f"evaluate: {new[0]} cannot be read: {error}") from error
    return metrics_of(data)


def metrics_of(value: Any) -> Metrics:
    """A number, or a table of numbers, whose tables are named ``outer/inner``; what is no number is left out.

    Results of lm-eval (a table "results" of tables) become ``task/metric``, or ``task/metric,filter`` where the filter
    is not "none". Raises MergeError where there is no number.
    """
    if isinstance(value, Mapping):
        results = value.get("results")
        found: Metrics = {}
        if isinstance(results, Mapping) and all(isinstance(each, Mapping) for each in results.values()):
            for name, number in _flat(results):
                _put(found, name.removesuffix(",none"), number)
        else:
            found.update(_flat(value))
        if found:
            return found
    elif _is_number(value):
        return {SCORE: float(value)}
    raise MergeError(f"evaluate: wanted a number or a table of numbers, got {_cut(repr(value))}")


def _from_json(lines: list[str]) -> Metrics | None:
    if not lines or not (lines[-1].startswith("{") or lines[-1].endswith("}")):
        return None
    starts = [len(lines) - 1, *(place for place in range(len(lines) - 1) if lines[place][0] == "{")]
    for start in starts:  # the last line, else a document over several lines up to the end
        try:
            data = json.loads("\n".join(lines[start:]))
        except ValueError:
            continue
        if isinstance(data, Mapping):
            return metrics_of(data)
    if lines[-1].startswith("{"):
        raise MergeError(f"evaluate: the last line looks like JSON and is not, got {_shown(lines)}")
    return None


def _from_table(lines: list[str]) -> Metrics | None:
    """The rows of ``|Tasks|Version|Filter|n-shot|Metric| |Value| |Stderr|``; an empty cell repeats the one above."""
    found: Metrics = {}
    header: list[str] = []
    above: dict[str, str] = {}
    for line in lines:
        if not line.startswith("|"):
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if "Metric" in cells and "Value" in cells:
            header, above = ["Task" if name in ("Tasks", "Groups", "Task") else name for name in cells], {}
        elif header and len(cells) == len(header) and not set(line) <= set("|-: "):
            row = dict(zip(header, cells, strict=True))
            row = {name: row.get(name) or above.get(name, "") for name in ("Task", "Filter", "Metric", "Value")}
            above = {name: row[name] for name in ("Task", "Filter")}
            task = re.sub(r"^\s*-+\s*", "", row["Task"])  # subtasks are set off by dashes
            end = "" if row["Filter"] in ("", "none") else f",{row['Filter']}"
            if _LONE.fullmatch(row["Value"]):
                _put(found, f"{task}/{row['Metric']}{end}", float(row["Value"]))
    return found or None


def _from_lines(lines: list[str]) -> Metrics | None:
    """``name: X`` lines up to the last line; a last line that is a number; or the only number of all lines."""
    named = [match for match in map(_NAMED.fullmatch, lines) if match]
    last = lines[-1] if lines else ""
    _check_clear(last)
    if _NAMED.fullmatch(last):
        found: Metrics = {}
        for match in named:
            _put(found, match[1].strip(), _number(match[2], f"evaluate: {match[1].strip()}"))
        return found
    scores = [match[2] for match in named if match[1].strip().lower() == SCORE]
    if lone := _LONE.fullmatch(last):
        if any(float(score) != float(lone[1]) for score in scores):
            raise MergeError(f"evaluate: wanted one score, got {scores[-1]} and {lone[1]}: {_shown(lines)}")
        return {SCORE: _number(lone[1], f"evaluate: {SCORE}")}
    numbers = [number for line in lines for number in _INSIDE.findall(line)]
    if len(numbers) > 1:
        wanted = 'wanted a last line "score: X", JSON, or a number'
        raise MergeError(f"evaluate: {wanted}, got {len(numbers)} numbers that could be it: {_shown(lines)}")
    for line in lines:
        _check_clear(line)
    return {SCORE: _number(numbers[0], f"evaluate: {SCORE}")} if numbers else None


def _around(text: str, start: int, end: int) -> str:
    """A part of a text with the digits, points and commas on both its sides."""
    while start and text[start - 1] in "0123456789.,":
        start -= 1
    while end < len(text) and text[end] in "0123456789.,":
        end += 1
    return text[start:end].rstrip(".,")


def _check_clear(line: str) -> None:
    """Raise MergeError for a line with a number such as 1,234.5."""
    unclear = _SEPARATED.search(line)
    if unclear:
        raise MergeError(
            f"evaluate: {unclear[0]} may be one number or two; wanted digits and a point, got {_cut(line)!r}"
        )


def _flat(table: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif _is_number(value):
            yield f"{prefix}{name}", float(value)


def _put(found: Metrics, name: str, value: float) -> None:
    """Add a metric. A second value that differs is kept as NaN: an error if somebody asks for it, else no column."""
    same = name not in found or found[name] == value
    found[name] = value if same else math.nan


def _number(text: str, subject: str) -> float:
    if not _LONE.fullmatch(text):
        raise MergeError(f"{subject}: wanted a number of digits and a point, got {text!r}")
    return float(text.strip().rstrip("%"))


def _is_number(value: Any) -> bool:
    """Numbers of Python's, NumPy's and torch's; not truth values, and not text."""
    if isinstance(value, bool | str | bytes) or type(value).__name__ in ("bool_", "bool"):
        return False
    convert: Callable[..., Any] | None = getattr(type(value), "__float__", None)
    if convert is None or getattr(value, "ndim", False):
        return False
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False
    return True


def _shown(lines: list[str]) -> str:
    """The end of an output, in one line of a message."""
    text = " / ".join(line.strip() for line in lines if line.strip())
    return repr(_cut(text)) if text else "none"


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else "..." + text[-_SHOWN:]
