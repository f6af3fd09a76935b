"""mergekit's YAML, parsed: every key is understood, or named in an error or a warning.

Models are named as ``path``, ``path@revision`` or ``path+lora``. The setting of a parameter is a value, a gradient (a
list of values over the layers), or a list of tables {filter, value}, of which the first counts whose filter is a part
of the tensor's name. Checks that need the models are in `mergekit.layers`.

Source: mergekit 0.1.5 (https://github.com/arcee-ai/mergekit), its documentation and its behaviour.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merge_engine.errors import RecipeError
from merge_engine.into.whole_job import check_count
from merge_engine.mergekit.reader import Parameters, Reader, Reference, nearest
from merge_engine.mergekit.tokens import TokenizerSpec, tokenizer_spec
from merge_engine.rules.methods import METHODS
from merge_engine.rules.recipe import DTYPES
from merge_engine.rules.whole_methods import WHOLE_METHODS, models_wanted

_KEYS = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "modules",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "name",
)
_MOE = "a recipe of mergekit-moe, which builds a mixture of experts; use mergekit-moe, merge-engine does not build them"
# What other programs of mergekit's read, by the key that shows it, and what to use.
_OTHERS = {
    "gate_mode": _MOE,
    "experts": _MOE,
    "genome": "a recipe of mergekit-evolve; use merge-engine search, or give the recipe of one merge",
    "layer_slices": "a recipe of bakllama; use merge_method: passthrough, with slices",
}
# Methods that mergekit does not have (any more), by name, and what does the same or is nearest.
_GONE = {
    "task_anysize": "task_arithmetic, for models of one size",
    "dare": "dare_ties or dare_linear",
    "ties_dare": "dare_ties",
    "slerp_ties": "slerp or ties",
    "della_ties": "della, which elects signs",
    "lerp": "linear",
    "average": "linear",
    "frankenmerge": "passthrough, with slices",
    "moe": "mergekit-moe: mixtures of experts are not built here",
}
# What to do where a method does not take so many models.
_FOR_FEWER = {"model_stock": "slerp takes two", "nuslerp": "slerp takes the base as one of two"}
_FOR_MORE = {
    "passthrough": "to stack layers of several models, give each a slice of its own",
    "slerp": "multislerp and karcher take more",
    "nuslerp": "multislerp and karcher take more",
    "nearswap": "merge two, and the result with the next",
    "arcee_fusion": "merge two, and the result with the next",
}


@dataclass(frozen=True)
class Entry:
    """One model of a slice with its own parameters; layers: [start, stop), None: all."""

    reference: Reference
    parameters: Parameters
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Slice:
    """Layers of the output: the same number of each entry's; base: None where there is none."""

    where: str
    entries: tuple[Entry, ...]
    parameters: Parameters
    base: Reference | None

    @property
    def others(self) -> list[Entry]:
        """The entries besides the base."""
        return [entry for entry in self.entries if entry.reference != self.base]


@dataclass(frozen=True)
class MergekitRecipe:
    """A recipe as it was written, with every key checked; see `read_recipe`."""

    file: str
    method: str
    base: Reference | None
    slices: tuple[Slice, ...]
    scopes: tuple[Parameters, ...]  # searched for a parameter after an entry's own and its slice's
    dtype: str | None
    tokenizer: TokenizerSpec | None
    template: str | None  # of chats
    written: Mapping[str, Any]

    @property
    def sliced(self) -> bool:
        """Whether layers are named, so that the output's may be others than the models'."""
        return self.slices[0].entries[0].layers is not None

    @property
    def references(self) -> list[Reference]:
        """Every model, the base first, then in order."""
        found = [] if self.base is None else [self.base]
        found += [each for part in self.slices for each in ([part.base] if part.base else [])]
        found += [entry.reference for part in self.slices for entry in part.entries]
        return list(dict.fromkeys(found))


def read_recipe(recipe: Any, file: str = "recipe") -> MergekitRecipe:
    """A recipe of mergekit's, from its parsed YAML. Raises RecipeError, which names file and key."""
    return _Recipe(file).read(recipe)


class _Recipe(Reader):
    def read(self, value: Any) -> MergekitRecipe:
        for key, why in _OTHERS.items():
            if isinstance(value, Mapping) and key in value:
                raise RecipeError(f"{self.file}: {key}: {why}")
        found = self.table("", value, _KEYS)
        method = self.method(found.get("merge_method"))
        base = self.reference("base_model", found["base_model"]) if "base_model" in found else None
        given = [key for key in ("models", "slices", "modules") if found.get(key)]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise RecipeError(f"{self.file}: wanted one of models, slices and modules, got {got}")
        scopes = [self.parameters("parameters", found, method)]
        where, holder = "", found
        if given == ["modules"]:
            where, holder = self.module(found["modules"])
            scopes.insert(0, self.parameters(f"{where}parameters", holder, method))
        read = self.models if "models" in holder else self.slices
        slices = read(where, holder, method, base)
        for part in slices:
            self.check(method, part)
        spec = tokenizer_spec(self, found)
        template = found.get("chat_template")
        if template is not None and not isinstance(template, str):
            raise self.error("chat_template", "auto, a name or a template", template)
        dtype = self.dtype(found)
        return MergekitRecipe(self.file, method, base, slices, tuple(scopes), dtype, spec, template, value)

    def method(self, name: Any) -> str:
        if isinstance(name, str) and name in WHOLE_METHODS:
            return name
        known = ", ".join(WHOLE_METHODS)
        if isinstance(name, str):
            if name in _GONE:
                raise RecipeError(f"{self.file}: merge_method: {name} is not there; use {_GONE[name]}")
            if name in METHODS:
                use = f"use merge-engine merge --method {name}"
                raise RecipeError(f"{self.file}: merge_method: {name} is no method of mergekit's; for adapters {use}")
            plain = name.strip().lower().replace("-", "_")
            alike = nearest(plain, WHOLE_METHODS)
            alike += [each for each in WHOLE_METHODS if len(plain) > 3 and plain in each]
            if alike:
                raise RecipeError(f"{self.file}: merge_method: {name} is not known; did you mean {alike[0]}?")
        raise self.error("merge_method", f"one of {known}", name)

    def module(self, value: Any) -> tuple[str, dict[str, Any]]:
        """The only module."""
        if not isinstance(value, Mapping) or len(value) != 1:
            wanted = "one module; for models of several parts (as text and vision) give models in place of modules"
            raise self.error("modules", wanted, list(value) if isinstance(value, Mapping) else value)
        (name, held), where = next(iter(value.items())), f"modules.{next(iter(value))}."
        found = self.table(where[:-1], held, ("models", "slices", "parameters"))
        if bool(found.get("models")) == bool(found.get("slices")):
            raise RecipeError(f"{self.file}: modules.{name}: wanted either models or slices")
        return where, found

    def models(self, where: str, holder: Mapping[str, Any], method: str, base: Reference | None) -> tuple[Slice, ...]:
        """All layers of all models, and of the base, which is added where it is not among them."""
        entries = []
        for place, each in self.items(f"{where}models", holder["models"]):
            found = self.input(place, each, ("model", "parameters"))
            entries.append(self.entry(place, found, method))
        if base is not None and all(entry.reference != base for entry in entries):
            row = WHOLE_METHODS[method]
            if row.most == len(entries):
                names = [str(entry.reference) for entry in entries]
                use = f"set base_model to {' or '.join(names)}" if row.base == "needed" else "remove base_model"
                wanted, got = f"{method} takes {models_wanted(method)}", f"{', '.join(names)} and the base {base}"
                raise RecipeError(f"{self.file}: {where}models: {wanted}, got {got}; {use}")
            entries.append(Entry(base, {}))
        return (Slice(f"{where}models", tuple(entries), {}, base),)

    def slices(self, where: str, holder: Mapping[str, Any], method: str, base: Reference | None) -> tuple[Slice, ...]:
        """Slices of layers, one after the other."""
        slices = []
        for place, each in self.items(f"{where}slices", holder["slices"]):
            part = self.table(place, each, ("sources", "base_model", "parameters"))
            entries = []
            for source, one in self.items(f"{place}.sources", part.get("sources"), " of models with a layer_range"):
                found = self.input(source, one, ("model", "parameters", "layer_range"))
                entry = self.entry(source, found, method)
                entries.append(replace(entry, layers=self.layers(f"{source}.layer_range", found.get("layer_range"))))
            counts = {entry.layers[1] - entry.layers[0] for entry in entries if entry.layers}
            if len(counts) > 1:
                raise RecipeError(f"{self.file}: {place}: wanted as many layers of each source, got {sorted(counts)}")
            own = self.reference(f"{place}.base_model", part["base_model"]) if "base_model" in part else base
            parameters = self.parameters(f"{place}.parameters", part, method)
            slices.append(Slice(place, tuple(entries), parameters, own))
        return tuple(slices)

    def input(self, where: str, value: Any, keys: Sequence[str]) -> dict[str, Any]:
        """The table of one model."""
        if isinstance(value, str):
            raise self.error(where, f"a table with model: {value}", value)
        return self.table(where, value, keys)

    def entry(self, where: str, found: Mapping[str, Any], method: str) -> Entry:
        reference = self.reference(f"{where}.model", found.get("model"))
        return Entry(reference, self.parameters(f"{where}.parameters", found, method, of_model=True))

    def layers(self, where: str, value: Any) -> tuple[int, int]:
        if not isinstance(value, list | tuple) or len(value) != 2 or not all(type(each) is int for each in value):
            raise self.error(where, "two whole numbers, as [0, 32]", value)
        if not 0 <= value[0] < value[1]:
            raise self.error(where, "a first layer and a later end", value)
        return value[0], value[1]

    def check(self, method: str, part: Slice) -> None:
        """What a method asks of the models of a slice, as mergekit checks it."""
        names = [entry.reference for entry in part.entries]
        for name in names:
            if names.count(name) > 1:
                use = "remove one entry"
                if part.entries[0].layers is not None:
                    use = "for other layers, link its folder under another name"
                raise RecipeError(f"{self.file}: {part.where}: {name} is there twice, wanted each model once; {use}")
        base = None if WHOLE_METHODS[method].base == "none" else part.base
        if base is not None and base not in names:
            use = f"set base_model to {' or '.join(map(str, names))}"
            use = use if WHOLE_METHODS[method].most == len(names) else f"add it, or {use}"
            raise RecipeError(f"{self.file}: {part.where}: wanted {base} among the sources, the base model; {use}")
        try:
            check_count(method, len(names) - (base is not None), base is not None, part.where)
        except RecipeError as error:
            raise RecipeError(f"{self.file}: {error}; {self.way_out(method, part)}") from error
        if base is not None and names == [base]:
            raise RecipeError(f"{self.file}: {part.where}: wanted at least one model besides {base}, got none")
        for entry in part.entries:
            if entry.reference == base and set(entry.parameters) - {"int8_mask"}:
                self.warn(f"the parameters of {entry.reference}", f"{method} has none for the base model", "have")

    def way_out(self, method: str, part: Slice) -> str:
        """What to do where a method does not take the models of a slice."""
        row, names = WHOLE_METHODS[method], [str(entry.reference) for entry in part.entries]
        if row.base == "needed" and part.base is None:
            one = " or ".join(names) if row.most == len(names) else "the model that the others were trained from"
            return f"set base_model to {one}"
        few = len(names) < row.least or len(part.others) < row.others[0]
        return (_FOR_FEWER if few else _FOR_MORE).get(method, "name one more")

    def dtype(self, found: Mapping[str, Any]) -> str | None:
        """The dtype of the output: out_dtype, else dtype."""
        names = {key: found[key] for key in ("dtype", "out_dtype") if key in found}
        for key, name in names.items():
            if not isinstance(name, str) or name.removeprefix("torch.") not in DTYPES:
                raise self.error(key, f"one of {', '.join(DTYPES)}", name)
        name = names.get("out_dtype", names.get("dtype"))
        return None if name is None else name.removeprefix("torch.")
