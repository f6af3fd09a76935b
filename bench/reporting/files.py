"""A report on disk: tidy rows as CSV, and everything as JSON."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bench.harness.row import Row


@dataclass(frozen=True)
class Report:
    """about: machine, versions, commit, date. skipped, failed: {workload: the reason}."""

    about: dict[str, Any]
    rows: list[Row]
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def write(report: Report, folder: Path, name: str) -> None:
    """Write folder/name.csv and folder/name.json, each whole or not at all. Every CSV line repeats `about`."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = [*report.about, *(each.name for each in fields(Row))]
    write_csv(folder / f"{name}.csv", columns, [report.about | asdict(row) for row in report.rows])
    _replaced(folder / f"{name}.json", lambda path: path.write_text(json.dumps(asdict(report), indent=1) + "\n"))


def write_csv(path: Path, columns: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file with these columns, whole or not at all; its folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def write_it(part: Path) -> None:
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)

    _replaced(path, write_it)


def _replaced(path: Path, make: Callable[[Path], object]) -> None:
    part = path.with_name(f".{path.name}.part")
    make(part)
    os.replace(part, path)


def read(path: Path) -> Report:
    """A report from its JSON file."""
    found = json.loads(path.read_text())
    return Report(**found | {"rows": [Row(**row) for row in found["rows"]]})


def read_csv(path: Path) -> list[Row]:
    """The rows of a CSV file: numbers are numbers, and an empty or missing cell is None where the field allows it."""
    with path.open(newline="") as file:
        return [
            Row(**{each.name: _parsed(line[each.name], each.type) for each in fields(Row) if each.name in line})
            for line in csv.DictReader(file)
        ]


def _parsed(text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if kind in (int, float):
        return kind(text)
    return None if text == "" else (int if kind == int | None else float)(text)
