"""mergekit's YAML, parsed: every key is understood, or refused by its file and name.

Models are named as ``path``, ``path@revision`` or ``path+lora``. The setting of a parameter is a value, a gradient (a
list of values over the layers), or a list of tables {filter, value}, of which the first counts whose filter is a part
of the tensor's name. Checks that need the models are in `mergekit.recipe`.

Source: mergekit 0.1.5 (https://github.com/arcee-ai/mergekit), its documentation and its behaviour.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from merge_engine.errors import RecipeError
from merge_engine.files.text import read_yaml
from merge_engine.formats.adapter import Adapter
from merge_engine.formats.checkpoint import Checkpoint, open_checkpoint
from merge_engine.formats.open import open_adapter
from merge_engine.rules.recipe import DTYPES


class MergekitMethod(NamedTuple):
    """One row of the table of mergekit's methods.

    ours: the name of our method. normalize, rescale: mergekit's defaults. parameters: those that have an effect.
    """

    ours: str
    normalize: bool
    rescale: bool
    parameters: tuple[str, ...]


MERGEKIT_METHODS = {
    "linear": MergekitMethod("linear", True, False, ("weight", "normalize")),
    "task_arithmetic": MergekitMethod("linear", False, False, ("weight", "normalize", "lambda")),
    "ties": MergekitMethod("ties", True, False, ("weight", "density", "normalize", "lambda", "rescale")),
    "dare_linear": MergekitMethod("dare_linear", False, True, ("weight", "density", "normalize", "lambda", "rescale")),
    "dare_ties": MergekitMethod("dare_ties", False, True, ("weight", "density", "normalize", "lambda", "rescale")),
}
NUMBERS = ("weight", "density", "lambda")
SWITCHES = ("normalize", "rescale", "int8_mask")
OF_A_MODEL = ("weight", "density")
INERT = "int8_mask"  # the dtype of mergekit's masks, which changes no result


class Clause(NamedTuple):
    """A parameter's value, or gradient over the layers, in the tensors whose name contains the filter."""

    filter: str | None  # None and "*" are for every tensor
    values: tuple[float | bool, ...]

    def at(self, depth: float) -> float | bool | None:
        """The value at a depth from 0 (first layer) to 1 (last): interpolated; for switches the lower neighbour."""
        if not self.values:
            return None
        place = depth * (len(self.values) - 1)
        low = int(place)
        high, share = min(low + 1, len(self.values) - 1), place - low
        if isinstance(self.values[0], bool):
            return self.values[low]
        return (1 - share) * self.values[low] + share * self.values[high]


Parameters = Mapping[str, Sequence[Clause]]


@dataclass(frozen=True)
class Reference:
    """A model by name, as mergekit writes it: ``path`` or ``path@revision``, and ``+lora`` after it for an adapter."""

    path: str
    revision: str | None = None
    lora: "Reference | None" = None

    def __str__(self) -> str:
        name = self.path if self.revision is None else f"{self.path}@{self.revision}"
        return name if self.lora is None else f"{name}+{self.lora}"

    @property
    def place(self) -> tuple[str, str | None]:
        """The same for all names of one full model."""
        folder = Path(self.path).expanduser()
        return (str(folder.resolve()) if folder.exists() else self.path), self.revision

    def open(self) -> Adapter | Checkpoint:
        """Open the adapter if there is one, else the full model."""
        if self.lora is not None:
            return open_adapter(self.lora.path, revision=self.lora.revision)
        return open_checkpoint(self.path, revision=self.revision)


@dataclass(frozen=True)
class Entry:
    """One model of the recipe with its own parameters; differs: False where it is the base itself."""

    reference: Reference
    parameters: Parameters
    differs: bool = True


@dataclass(frozen=True)
class MergekitRecipe:
    """A recipe as it was written, with every key checked; see `read_recipe`."""

    file: str
    method: str
    base: Reference  # the full model that the others are seen as changes of
    entries: tuple[Entry, ...]  # each has a weight
    scopes: tuple[Parameters, ...]  # searched for a parameter after the entry's own
    layers: tuple[int, int] | None  # the range in slices
    dtype: str | None
    vocab: str | None  # "base", "union", or None: rows of embeddings are taken as they are

    @property
    def inputs(self) -> list[Entry]:
        """The entries that are merged into the base."""
        return [entry for entry in self.entries if entry.differs]


def read_recipe(recipe: str | Path | Mapping[str, Any]) -> MergekitRecipe:
    """A recipe of mergekit's, from its file or its parsed YAML. Raises RecipeError, which names file and key."""
    if isinstance(recipe, Mapping):
        return _Reader("recipe").recipe(recipe)
    return _Reader(str(recipe)).recipe(read_yaml(Path(recipe)))


class _Reader:
    """Parses a recipe; an error names the place in the file."""

    def __init__(self, file: str) -> None:
        self.file = file

    def error(self, where: str, wanted: str, got: Any) -> RecipeError:
        return RecipeError(f"{self.file}: {where}: wanted {wanted}, got {got!r}")

    def table(self, where: str, value: Any, keys: Sequence[str]) -> dict[str, Any]:
        """A table that has no other keys than these; keys that are null are left out."""
        if not isinstance(value, Mapping):
            raise self.error(where, "a table of keys", value)
        for key in value:
            if key not in keys:
                subject = f"{self.file}: {where}" if where else self.file
                raise RecipeError(f"{subject}: {key} is not supported; wanted one of {', '.join(keys)}")
        return {key: value for key, value in value.items() if value is not None}

    def items(self, where: str, value: Any) -> Iterator[tuple[str, Any]]:
        """(its place, a member) for each member of a list."""
        if not isinstance(value, list) or not value:
            raise self.error(where, "a list", value)
        return ((f"{where}[{i}]", each) for i, each in enumerate(value))

    def recipe(self, value: Any) -> MergekitRecipe:
        keys = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype")
        found = self.table("", value, (*keys, "tokenizer_source", "tokenizer"))
        method = found.get("merge_method")
        if not isinstance(method, str) or method not in MERGEKIT_METHODS:
            raise self.error("merge_method", f"one of {', '.join(MERGEKIT_METHODS)}", method)
        if ("models" in found) == ("slices" in found):
            got = "both" if "models" in found else "neither"
            raise RecipeError(f"{self.file}: wanted either models or slices, got {got}")
        scopes = [self.parameters("parameters", found, method)]
        named = self.reference("base_model", found["base_model"]) if "base_model" in found else None
        layers = None
        if "models" in found:
            entries = [self.entry(where, each, method) for where, each in self.items("models", found["models"])]
            if named is not None and all(entry.reference != named for entry in entries):
                entries.append(Entry(named, {}))
        else:
            part = self.one_slice(found["slices"])
            scopes.insert(0, self.parameters("slices[0].parameters", part, method))
            named = self.reference("slices[0].base_model", part["base_model"]) if "base_model" in part else named
            sources = list(self.items("slices[0].sources", part.get("sources")))
            entries = [self.entry(where, each, method, "layer_range") for where, each in sources]
            layers = self.layer_range(sources)
            if named is not None and method != "linear" and all(entry.reference != named for entry in entries):
                raise RecipeError(f"{self.file}: slices[0].sources: wanted {named} among them, the base model")
        base = self.base(method, named, entries)
        entries = self.bound(method, base, entries)
        dtype, vocab = self.dtype(found), self.vocab(found, base)
        return MergekitRecipe(self.file, method, base, tuple(entries), tuple(scopes), layers, dtype, vocab)

    def entry(self, where: str, value: Any, method: str, *keys: str) -> Entry:
        """A model with its parameters."""
        found = self.table(where, value, ("model", "parameters", *keys))
        reference = self.reference(f"{where}.model", found.get("model"))
        return Entry(reference, self.parameters(f"{where}.parameters", found, method, OF_A_MODEL))

    def one_slice(self, value: Any) -> dict[str, Any]:
        """The keys of the slice. Only one slice, of all layers, is supported."""
        if not isinstance(value, list) or len(value) != 1:
            raise RecipeError(f"{self.file}: slices: wanted one slice of all layers; several are not supported")
        return self.table("slices[0]", value[0], ("sources", "base_model", "parameters"))

    def layer_range(self, sources: Sequence[tuple[str, Any]]) -> tuple[int, int]:
        """The layer_range that all sources of the slice share."""
        ranges = [source.get("layer_range") for _, source in sources]
        for (where, _), each in zip(sources, ranges, strict=True):
            if not isinstance(each, list) or len(each) != 2 or not all(type(number) is int for number in each):
                raise self.error(f"{where}.layer_range", "two whole numbers", each)
            if each != ranges[0]:
                raise self.error(f"{where}.layer_range", f"{ranges[0]} as in the other sources", each)
        return ranges[0][0], ranges[0][1]

    def base(self, method: str, named: Reference | None, entries: Sequence[Entry]) -> Reference:
        """The model that the others are seen as changes of; linear needs none, and takes one of its models."""
        if named is None and method == "linear":
            adapted = [entry.reference for entry in entries if entry.reference.lora]
            named = replace((adapted or [entries[0].reference])[0], lora=None)
        if named is None:
            raise RecipeError(f"{self.file}: base_model: {method} needs one, got none")
        if named.lora is not None:
            raise self.error("base_model", "a full model without an adapter", str(named))
        return named

    def bound(self, method: str, base: Reference, entries: Sequence[Entry]) -> list[Entry]:
        """The entries that have a weight: all of them for linear, all but the base for other methods."""
        bound = []
        for entry in entries:
            reference = entry.reference
            same = reference.place == base.place
            if reference.lora and not same:
                raise RecipeError(f"{self.file}: {reference}: wanted an adapter on the base model, {base}")
            if any(reference == other.reference for other in entries if other is not entry):
                raise RecipeError(f"{self.file}: {reference} is there twice, wanted each model once")
            if method == "linear":
                bound.append(replace(entry, differs=not same or reference.lora is not None))
            elif reference != base:
                bound.append(entry)
            elif entry.parameters:
                self.warn(f"the parameters of {reference}", f"{method} has none for the base model", "have")
        if not any(entry.differs for entry in bound):
            raise RecipeError(f"{self.file}: wanted at least one model besides {base}, got none")
        return bound

    def reference(self, where: str, value: Any) -> Reference:
        """``path``, ``path+lora``, each with ``@revision``, or the table {model: path, lora: path}."""
        if isinstance(value, Mapping):
            found = self.table(where, value, ("model", "lora"))
            model = self.path(f"{where}.model", found.get("model"))
            return replace(model, lora=self.path(f"{where}.lora", found["lora"]) if "lora" in found else None)
        if not isinstance(value, str) or value.count("+") > 1:
            raise self.error(where, "model or model+lora", value)
        full, _, lora = value.partition("+")
        return replace(self.path(where, full), lora=self.path(where, lora) if "+" in value else None)

    def path(self, where: str, value: Any) -> Reference:
        """``path``, ``path@revision``, or the table {path: path, revision: revision}."""
        if isinstance(value, str) and value.count("@") <= 1:
            path, at, revision = value.partition("@")
            value = {"path": path, "revision": revision} if at else {"path": path}
        if not isinstance(value, Mapping):
            raise self.error(where, "a path, or path@revision", value)
        found = self.table(where, value, ("path", "revision"))
        for text in ("path", *found):
            if not isinstance(found.get(text), str) or not found[text]:
                raise self.error(f"{where}.{text}", "a name", found.get(text))
        return Reference(found["path"], found.get("revision"))

    def parameters(
        self, where: str, holder: Mapping[str, Any], method: str, useful: Sequence[str] = (*NUMBERS, *SWITCHES)
    ) -> Parameters:
        """The parameters of a model, a slice or the recipe: {name: clauses, of which the first that fits counts}."""
        found = {}
        settings = holder.get("parameters", {})
        self.table(where, settings, (*NUMBERS, *SWITCHES))
        for name, setting in settings.items():
            found[name] = self.setting(f"{where}.{name}", name, setting)
            if name != INERT and name not in MERGEKIT_METHODS[method].parameters:
                self.warn(f"{where}.{name}", f"{method} does not use it")
            elif name not in useful and name != INERT:
                self.warn(f"{where}.{name}", "it applies to the whole merge, not to one model")
        return found

    def setting(self, where: str, name: str, value: Any) -> list[Clause]:
        """A value, a gradient, or a table {filter: text, value: either}, or a list of such tables."""
        if isinstance(value, Mapping):
            value = [value]
        if isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
            clauses = []
            for i, each in enumerate(value):
                found = self.table(f"{where}[{i}]", each, ("filter", "value"))
                if not isinstance(found.get("filter", ""), str):
                    raise self.error(f"{where}[{i}].filter", "a part of tensor names", found["filter"])
                values = self.values(f"{where}[{i}].value", name, found.get("value"))
                clauses.append(Clause(found.get("filter"), values))
            return clauses
        return [Clause(None, self.values(where, name, value))]

    def values(self, where: str, name: str, value: Any) -> tuple[float | bool, ...]:
        convert = self.number if name in NUMBERS else self.switch
        return tuple(convert(where, name, each) for each in (value if isinstance(value, list) else [value]))

    def number(self, where: str, name: str, value: Any) -> float:
        """A finite number; also as text, since YAML reads 1e-3 as text."""
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise self.error(where, "a number", value)
        if name == "density" and not 0 <= number <= 1:
            raise self.error(where, "a number from 0 to 1", value)
        return number

    def switch(self, where: str, name: str, value: Any) -> bool:
        if value not in (True, False):
            raise self.error(where, "true or false", value)
        return bool(value)

    def dtype(self, found: Mapping[str, Any]) -> str | None:
        """The dtype of the output: out_dtype, else dtype."""
        names = {key: found[key] for key in ("dtype", "out_dtype") if key in found}
        for key, name in names.items():
            if not isinstance(name, str) or name.removeprefix("torch.") not in DTYPES:
                raise self.error(key, f"one of {', '.join(DTYPES)}", name)
        name = names.get("out_dtype", names.get("dtype"))
        return None if name is None else name.removeprefix("torch.")

    def vocab(self, found: Mapping[str, Any], base: Reference) -> str | None:
        """The tokens of the output: "base" or "union"; None where the recipe does not say."""
        if "tokenizer" in found and "tokenizer_source" in found:
            raise RecipeError(f"{self.file}: wanted either tokenizer or tokenizer_source, got both")
        where, source = "tokenizer_source", found.get("tokenizer_source")
        if "tokenizer" in found:
            where = "tokenizer.source"
            source = self.table("tokenizer", found["tokenizer"], ("source",)).get("source", "union")
        if source in (None, "base", "union"):
            return source
        if self.reference(where, source) == base:
            return "base"
        raise self.error(where, f"base, union or {base}", source)

    def warn(self, subject: str, why: str, verb: str = "has") -> None:
        warnings.warn(f"{self.file}: {subject} {verb} no effect: {why}", stacklevel=2)
