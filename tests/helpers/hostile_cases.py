"""Hostile inputs by hand: of each kind those that are known to have done harm, and their neighbours."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hostile_toys import (
    INFO,
    INTO,
    MERGE,
    MODELS,
    RECIPE,
    UNION,
    as_bin,
    as_shards,
    change_json,
    join_header,
    split_header,
    write_json,
)
from hostile_values import (
    BAD_TENSORS,
    BASE_FIELDS,
    DOCUMENTS,
    ENVIRONMENTS,
    FIELDS,
    HEADERS,
    JSON_FILES,
    JSON_TEXTS,
    KEYS,
    PATHS,
    PATTERNS,
    RECIPE_FIELDS,
    STEM,
    TOKENIZER_FIELDS,
    VALUES,
)
from safetensors.torch import load_file

Change = Callable[[Path], Any]  # changes the toys in a folder


class Case(NamedTuple):
    """A change of the toys and a command, which succeeds, fails, or does one of both (None)."""

    name: str
    change: Change
    words: Sequence[str]
    succeeds: bool | None = None
    environment: tuple[tuple[str, str], ...] = ()


def all_cases() -> list[Case]:
    """Every case by hand."""
    made = [*_json(), *_headers(), *_tensors(), *_texts(), *_recipes(), *_places()]
    assert len({case.name for case in made}) == len(made)
    return made


def _json() -> Iterator[Case]:
    for field in FIELDS:
        for number, value in enumerate(VALUES):
            change = partial(_changed, "a/adapter_config.json", {field: value})
            yield Case(f"{field} {number}", change, INFO if number % 2 else MERGE)
    for field in BASE_FIELDS:
        for number, value in enumerate(VALUES):
            yield Case(
                f"base {field} {number}",
                partial(_changed, "base/config.json", {field: value}),
                (INTO, UNION)[number % 2],
            )
    for field in TOKENIZER_FIELDS:
        for number, value in enumerate(VALUES):
            yield Case(f"tokenizer {field} {number}", partial(_changed, "model/tokenizer.json", {field: value}), UNION)
    for number, value in enumerate(VALUES):
        for field in ("added_tokens_decoder", "additional_special_tokens", "chat_template"):
            change = partial(_changed, "base/tokenizer_config.json", {field: value})
            yield Case(f"tokenizer_config {field} {number}", change, (UNION, MODELS)[number % 2])
    for file, words in JSON_FILES.items():
        for number, text in enumerate(JSON_TEXTS):
            yield Case(f"{file} {number}", partial(_replaced, file, text), words)


def _changed(file: str, fields: dict[str, Any], folder: Path) -> None:
    change_json(folder / file, **fields)


def _replaced(file: str, text: bytes, folder: Path) -> None:
    if file.endswith("index.json"):
        as_shards((folder / file).parent, Path(file).name.partition(".")[0])
    (folder / file).write_bytes(text)


def _headers() -> Iterator[Case]:
    for name, fields in HEADERS.items():
        for words in (INFO, INTO):
            yield Case(f"header {name} {words[0]}", partial(_with_entry, fields), words)
    for key in KEYS:
        yield Case(f"key {key[:40]!r}", partial(_with_key, key), MERGE, None if "lm_head" in key else False)
    yield Case("many keys", _with_many_keys, INFO)
    for number, length in enumerate((0, 1, 7, 2**31, 2**63, 2**64 - 1, 10**8 + 1)):
        yield Case(f"length {number}", partial(_with_length, length), INFO, False)
    for number, text in enumerate(JSON_TEXTS):
        yield Case(f"header text {number}", partial(_with_header, text), MERGE, False)


def _with_entry(fields: dict[str, Any], folder: Path) -> None:
    """One more tensor, saved whole, whose entry has these fields."""
    file = folder / "a/adapter_model.safetensors"
    header, data = split_header(file)
    entries = json.loads(header)
    end = len(data)
    entry = {"dtype": "F32", "shape": [], "data_offsets": [0, 4], **fields}
    if isinstance(entry["data_offsets"], list) and all(isinstance(each, int) for each in entry["data_offsets"]):
        entry["data_offsets"] = [end + each for each in entry["data_offsets"]]
    entries[f"{STEM}lm_head.weight"] = entry
    join_header(file, json.dumps(entries).encode(), data + bytes(4 if entry["data_offsets"] == [end, end + 4] else 0))


def _with_key(key: str, folder: Path) -> None:
    file = folder / "a/adapter_model.safetensors"
    header, data = split_header(file)
    entries = json.loads(header)
    entries[key] = {"dtype": "F32", "shape": [1, 1], "data_offsets": [len(data), len(data) + 4]}
    join_header(file, json.dumps(entries).encode(), data + bytes(4))


def _with_many_keys(folder: Path) -> None:
    entries = {f"{STEM}m.{n}.lora_{s}.weight": {"dtype": "F32", "shape": [2, 2]} for n in range(20_000) for s in "AB"}
    for number, entry in enumerate(entries.values()):
        entry["data_offsets"] = [16 * number, 16 * number + 16]
    join_header(folder / "a/adapter_model.safetensors", json.dumps(entries).encode(), bytes(16 * len(entries)))


def _with_length(length: int, folder: Path) -> None:
    file = folder / "a/adapter_model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])


def _with_header(header: bytes, folder: Path) -> None:
    file = folder / "a/adapter_model.safetensors"
    join_header(file, header, split_header(file)[1])


def _tensors() -> Iterator[Case]:
    for name, value in BAD_TENSORS.items():
        for words in (INFO, MERGE):
            succeeds = None if name == "conj" else False
            yield Case(f"bin {name} {words[0]}", partial(_bins, value), words, succeeds)
    for name, dtype in (("bool", torch.bool), ("int64", torch.int64), ("complex64", torch.complex64)):
        yield Case(f"factors {name}", partial(_factors_as, lambda x, dtype=dtype: x.to(dtype)), MERGE, False)
    for number in (float("nan"), float("inf"), 3e38):
        yield Case(f"factors {number}", partial(_factors_as, lambda x, number=number: x * 0 + number), MERGE, False)
    yield Case("empty factors", partial(_factors_as, lambda x: x[:0]), MERGE, False)
    for index in (2**24, 2**40, 2**63, -1, 5, 100_000, True, 1.5, "1", None):
        yield Case(f"a token at {index!r}", partial(_token_at, index), UNION)
        yield Case(f"a token of a model at {index!r}", partial(_token_at, index), MODELS)


def _bins(value: Callable[[], Any], folder: Path) -> None:
    for name in "ab":
        as_bin(folder / name, **{"lm_head.weight": value()})


def _factors_as(change: Callable[[torch.Tensor], torch.Tensor], folder: Path) -> None:
    from hostile_toys import save_tensors

    file = folder / "a/adapter_model.safetensors"
    save_tensors(file, {key: change(tensor) for key, tensor in load_file(file).items()})


def _token_at(index: Any, folder: Path) -> None:
    whole = json.loads((folder / "model/tokenizer.json").read_text())
    whole["added_tokens"][-1]["id"] = index
    write_json(folder / "model/tokenizer.json", whole)


def _texts() -> Iterator[Case]:
    for number, pattern in enumerate(PATTERNS):
        change = partial(
            _changed, "a/adapter_config.json", {"rank_pattern": {pattern: 2}, "alpha_pattern": {pattern: 3}}
        )
        yield Case(f"pattern {number}", change, MERGE)
        recipe = json.dumps({"adapters": ["a", "b"], "density": {pattern: 0.5}})
        yield Case(f"density pattern {number}", partial(_recipe, recipe), RECIPE)
        recipe = json.dumps({"adapters": ["a", "b"], "block_weights": {"a": {pattern: 0.5}}})
        yield Case(f"weights pattern {number}", partial(_recipe, recipe), RECIPE)
    for number, text in enumerate(DOCUMENTS):
        yield Case(f"document {number}", partial(_recipe, text), RECIPE, False)
        yield Case(f"document beside adapters {number}", partial(_recipe, f"adapters: [a, b]\n{text}\n"), RECIPE)
        yield Case(f"document of mergekit {number}", partial(_recipe, f"merge_method: linear\n{text}\n"), RECIPE, False)


def _recipe(text: str, folder: Path) -> None:
    (folder / "recipe.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")


def _recipes() -> Iterator[Case]:
    for field in RECIPE_FIELDS:
        for number, value in enumerate(VALUES):
            if not (isinstance(value, dict) and "\udc80" in value.values()):
                recipe = json.dumps({"adapters": ["a", "b"], field: value})
                yield Case(f"recipe {field} {number}", partial(_recipe, recipe), RECIPE)


def _places() -> Iterator[Case]:
    for number, environment in enumerate(ENVIRONMENTS):
        yield Case(f"environment {number}", _nothing, INTO, False, tuple(environment.items()))
    for number, path in enumerate(PATHS):
        yield Case(f"info path {number}", _nothing, ("info", path), False)
        yield Case(f"merge path {number}", _nothing, ("merge", "a", path, "-o", "out"), False)
        yield Case(f"into path {number}", _nothing, ("merge", "--into", path, "a", "-o", "out"), False)
        if number not in (0, 5, 9, 10):  # are fine as the names of outputs
            yield Case(f"output path {number}", _nothing, ("merge", "a", "b", "-o", path), False)
    for name in ("a/adapter_config.json", "a/adapter_model.safetensors", "base/config.json", "base/tokenizer.json"):
        for what, change in list(_STRANGE.items())[:-1]:
            words = MERGE if name.startswith("a/") else UNION
            yield Case(f"{what} {name}", partial(change, name), words, False)
    yield Case("a link out of a base", partial(_link_out, "base/tokenizer_config.json"), INTO, False)
    for name in (".out.partial", "out", "a/adapter_x", "a/tokenizer.json"):
        for what, change in _STRANGE.items():
            if (what, name) != ("broken link", "out"):  # the result goes where the link leads
                yield Case(f"{what} at {name}", partial(change, name), INTO)


def _nothing(folder: Path) -> None:
    """Leave the toys as they are."""


def _gone(path: Path) -> Path:
    path.unlink(missing_ok=True)
    return path


def _fifo(name: str, folder: Path) -> None:
    os.mkfifo(_gone(folder / name))


def _folder(name: str, folder: Path) -> None:
    _gone(folder / name).mkdir()
    (folder / name / "theirs").write_text("x")


def _link(name: str, folder: Path) -> None:
    _gone(folder / name).symlink_to(folder / "nowhere")


def _loop(name: str, folder: Path) -> None:
    _gone(folder / name).symlink_to(folder / name)


def _link_out(name: str, folder: Path) -> None:
    (folder / "home").mkdir()
    (folder / "home" / "secret").write_text("{}")
    target = folder / "home" / "secret" if name.startswith("base") else folder / "home"
    _gone(folder / name).symlink_to(target)


_STRANGE = {"fifo": _fifo, "folder": _folder, "broken link": _link, "loop": _loop, "link": _link_out}
