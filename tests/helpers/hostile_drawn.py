"""Inputs that are damaged at random, the same for the same seed."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile_cases import Case
from hostile_toys import INFO, INTO, MERGE, RECIPE, UNION, as_shards, join_header, split_header
from hostile_values import BASE_FIELDS, DOCUMENTS, FIELDS, JSON_FILES, KEYS, PATTERNS, RECIPE_FIELDS, VALUES

Draw = random.Random
NAMES = ("result", "replaced", "removed", ".merge-engine", "theirs", "result/.journal.0", "result/.journal.1")
NAMES += ("result/model.safetensors", "result/config.json", "result/theirs")
LINES = (
    "5",
    "null",
    '{"merge": {}}',
    '{"merge": 5}',
    '{"tensor": "lm_head.weight", "xxh3": "0"}',
    "[" * 2000,
    "\x1b",
    "{",
)


def drawn_case(seed: int, number: int) -> Case:
    """The case of a number."""
    draw = Draw(f"{seed} {number}")
    kind = draw.choice(list(KINDS))
    change, words = KINDS[kind](draw)
    return Case(f"drawn {seed} {number} {kind}", change, words)


def _header(draw: Draw) -> tuple[Callable[[Path], Any], Any]:
    name = draw.choice(("a/adapter_model.safetensors", "base/model.safetensors", "b/adapter_model.safetensors"))
    state = draw.getrandbits(64)

    def change(folder: Path) -> None:
        again = Draw(state)
        header, data = split_header(folder / name)
        if again.random() < 0.5:
            header = json.dumps(spoilt(again, json.loads(header))).encode("utf-8", "surrogatepass")
        else:
            header = damaged(again, header)
        join_header(folder / name, header, data if again.random() < 0.8 else damaged(again, data))

    return change, draw.choice((INFO, MERGE, INTO) if name.startswith("a") else (MERGE, INTO))


def _json(draw: Draw) -> tuple[Callable[[Path], Any], Any]:
    name, state = draw.choice(list(JSON_FILES)), draw.getrandbits(64)

    def change(folder: Path) -> None:
        again, file = Draw(state), folder / name
        if name.endswith("index.json"):
            as_shards(file.parent, Path(name).name.partition(".")[0])
        value = json.loads(file.read_text()) if file.exists() else {"x": 1}
        fields = FIELDS if "adapter" in name else BASE_FIELDS
        if isinstance(value, dict) and again.random() < 0.5:
            value[again.choice(fields)] = again.choice(VALUES)
        text = json.dumps(spoilt(again, value)).encode("utf-8", "surrogatepass")
        file.write_bytes(damaged(again, text) if again.random() < 0.3 else text)

    return change, JSON_FILES[name]


def _yaml(draw: Draw) -> tuple[Callable[[Path], Any], Any]:
    recipe: dict[str, Any] = {"adapters": ["a", "b"], "method": draw.choice(("ties", "linear", "dare_ties", "tsv"))}
    for _ in range(draw.randint(0, 3)):
        recipe[draw.choice([field for field in RECIPE_FIELDS if field not in ("evaluate", "output")])] = draw.choice(
            VALUES
        )
    if draw.random() < 0.3:
        recipe["density"] = {draw.choice(PATTERNS): draw.choice((0.5, 1, "x")), ".*": 0.3}
    text = json.dumps(spoilt(draw, recipe) if draw.random() < 0.5 else recipe)
    if draw.random() < 0.5:
        text = damaged(draw, text.encode("utf-8", "surrogatepass")).decode("latin1")
    if draw.random() < 0.3:
        text = f"adapters: [a, b]\n{draw.choice(DOCUMENTS)}\n{draw.choice(DOCUMENTS)}\n"
    return lambda folder: (folder / "recipe.yaml").write_text(text, encoding="utf-8", errors="surrogatepass"), RECIPE


def _working(draw: Draw) -> tuple[Callable[[Path], Any], Any]:
    chosen = [(name, draw.choice(("file", "folder", "link", "lines"))) for name in NAMES if draw.random() < 0.4]
    lines = "\n".join(draw.choice(LINES) for _ in range(draw.randint(0, 5)))

    def change(folder: Path) -> None:
        root = folder / ".out.partial"
        for name, what in [("", "folder"), *chosen]:
            path = root / name
            if path.parent != root and name and not path.parent.is_dir():
                continue
            if what == "folder":
                path.mkdir(exist_ok=True)
            elif what == "link":
                (folder / "home").mkdir(exist_ok=True)
                (folder / "home" / "mine").write_text("mine")
                path.symlink_to(folder / "home")
            else:
                path.write_text(lines if what == "lines" else "x")

    return change, INTO if draw.random() < 0.7 else MERGE


def _resumed(draw: Draw) -> tuple[Callable[[Path], Any], Any]:
    """What an earlier run left is damaged: see `fuzz.leave_unfinished`."""
    state = draw.getrandbits(64)

    def change(folder: Path) -> None:
        from fuzz import leave_unfinished

        again = Draw(state)
        leave_unfinished(folder, again.randint(0, 4))
        files = sorted(file for file in (folder / ".out.partial" / "result").rglob("*") if file.is_file())
        for file in again.sample(files, min(len(files), again.randint(1, 2))):
            file.write_bytes(damaged(again, file.read_bytes()))

    return change, INTO


def _weights(draw: Draw) -> tuple[Callable[[Path], Any], Any]:
    name, state = draw.choice(("a/adapter_model.safetensors", "base/model.safetensors")), draw.getrandbits(64)

    def change(folder: Path) -> None:
        (folder / name).write_bytes(damaged(Draw(state), (folder / name).read_bytes()))

    return change, draw.choice((MERGE, INTO)) if name.startswith("a") else UNION


KINDS = {"header": _header, "json": _json, "yaml": _yaml, "working": _working, "resumed": _resumed, "weights": _weights}


def damaged(draw: Draw, data: bytes) -> bytes:
    """Bytes with up to 4 bits flipped, pieces cut out, doubled, or put in."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        if not data:
            return bytes(data)
        at, length = draw.randrange(len(data)), draw.randint(1, 8)
        way = draw.randrange(6)
        if way == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif way == 1:
            del data[at : at + length]
        elif way == 2:
            data[at:at] = data[at : at + length]
        elif way == 3:
            data[at:at] = draw.choice(
                (b'"', b"{", b"[", b"\0", b"\x1b", b"\xff", b",", b":", b"1e999", b"null", b"-", b"9" * 30)
            )
        elif way == 4:
            del data[at:]
        else:
            data[at] = draw.randrange(256)
    return bytes(data)


def spoilt(draw: Draw, value: Any) -> Any:
    """A JSON value with one or two of its parts replaced, left out, or under another name."""
    for _ in range(draw.randint(1, 2)):
        value = _spoilt_once(draw, value)
    return value


def _spoilt_once(draw: Draw, value: Any) -> Any:
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        way = draw.random()
        if way < 0.1:
            return {other: each for other, each in value.items() if other != key}
        if way < 0.2:
            return {draw.choice(KEYS) if other == key else other: each for other, each in value.items()}
        return {**value, key: _spoilt_once(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], _spoilt_once(draw, value[at]), *value[at + 1 :]]
    if isinstance(value, int) and abs(value) < 2**64 and draw.random() < 0.5:
        return draw.choice((value + 1, -value, value * 2, value << 40, float(value), str(value)))
    return draw.choice(VALUES)
