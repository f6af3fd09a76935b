"""A merge into a base model, checked before anything is written: inputs, targets, and the layout of the output."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from merge_engine.engine.plan import Plan, make_plan
from merge_engine.errors import MergeError, ModelError, RecipeError
from merge_engine.files.locate import SINGLE, SilenceError, is_hub_id
from merge_engine.files.shards import Layout, lay_out
from merge_engine.files.weights import StoredTensor
from merge_engine.formats.adapter import Adapter
from merge_engine.formats.checkpoint import FLOATS, Checkpoint, open_checkpoint
from merge_engine.formats.open import open_adapter
from merge_engine.models.experts import Pieces, as_the_base_has_them, divided, pieces_of_experts
from merge_engine.models.finetuned import Finetuned, added_rows, open_finetuned
from merge_engine.models.saved import check_tokens, saved_tensors, saved_vocabulary
from merge_engine.models.targets import Target, targets_of_adapters, targets_of_models
from merge_engine.models.tuned import Places, TokenModules, needs_its_base, token_modules, tuned
from merge_engine.models.vocabulary import Union, unite
from merge_engine.rules.guesses import describe
from merge_engine.rules.methods import METHODS
from merge_engine.rules.recipe import DTYPES, Recipe

Input = Adapter | Checkpoint


@dataclass(frozen=True)
class IntoJob:
    """A plan bound to its base and to the layout of its output."""

    base: Checkpoint
    plan: Plan
    targets: dict[str, Target]  # by module
    saved: dict[str, StoredTensor]  # layers that adapters hold whole, by key of the base
    layout: Layout
    shard_size: int
    union: Union | None = None  # of the vocabularies
    places: Places = field(default_factory=dict)  # of rows of trained tokens, by key

    @cached_property
    def module_of(self) -> dict[str, str]:
        """{key: the module that is merged into it}; twins of a key are written with it."""
        names = {target.stored.key: name for name, target in self.targets.items()}
        twins = {key: names[first] for key, first in self.base.twins.items() if first in names}
        return names | twins | {key: module for key, (module, _) in self.places.items()}

    def source(self, key: str) -> StoredTensor:
        """The tensor that is copied to a key into which no module is merged."""
        return self.saved.get(key, self.base.tensors[key])

    def pieces(self, key: str, merged: Tensor | None) -> Iterable[Tensor]:
        """The pieces to write to a key, in order: a copy; or the merged tensor, and after it the rows of added tokens.

        Added tokens first take the place of the base's padding, inside of the merged tensor.
        """
        if merged is None:
            return self.source(key).pieces()
        if key in self.places:
            _, place = self.places[key]
            return [merged[place : place + 1]]
        if self.union is None or not self.union.added or key not in self.union.keys:
            return [merged]
        models = [source for source in self.plan.adapters if isinstance(source, Finetuned)]
        added = added_rows(models, self.base.twins.get(key, key))
        inside = self.union.base_rows - self.union.first
        merged[self.union.first :][: len(added)] = added[:inside].to(merged.dtype)
        return [merged, added[inside:]]

    def keys_of(self, module: str) -> list[str]:
        """The key that a module is merged into, and its twins; of trained tokens the keys of all rows."""
        rows = [key for key, (name, _) in self.places.items() if name == module]
        if rows:
            return rows
        key = self.targets[module].stored.key
        return [key, *(twin for twin, first in self.base.twins.items() if first == key)]


def open_input(source: str | Path) -> Input:
    """The adapter, if the folder has an adapter_config.json, else the full model."""
    if not isinstance(source, str | Path):
        raise ModelError(f"wanted a folder or a hub id user/repo, got {describe(source)}")
    folder = Path(os.path.expanduser(source))
    if str(source).endswith(SINGLE):
        return open_adapter(source)
    if not os.path.exists(folder) and not is_hub_id(str(source)):
        wanted = "a folder with adapter_config.json or config.json, or a hub id user/repo"
        raise ModelError(f"{source} does not exist, wanted {wanted}")
    if not os.path.exists(folder):  # a hub id, which does not say what it is
        try:
            return open_adapter(source)
        except MergeError as failure:
            if isinstance(failure.__cause__, SilenceError):  # asking again would take as long
                raise
            return open_checkpoint(source)
    return open_adapter(source) if os.path.isfile(folder / "adapter_config.json") else open_checkpoint(source)


def make_job(
    base: Checkpoint, inputs: Sequence[Input], recipe: Recipe, shard_size: int, vocab: str = "base"
) -> IntoJob:
    """Check that the inputs fit the base and the recipe, and lay out the tensors of the output."""
    if vocab not in ("base", "union"):
        raise RecipeError(f"vocab: wanted base or union, got {vocab!r}")
    whole = base
    base, inputs, pieces = _with_experts(base, inputs)
    tokens = _tokens(base, inputs, vocab)
    base, pieces = divided(base, tokens.pieces), {**pieces, **tokens.pieces}
    adapters = [each for each in inputs if isinstance(each, Adapter)]
    held = {}  # of adapters, as models of their own
    if vocab == "union":
        held = {each: model for each in adapters if (model := saved_vocabulary(base, each)) is not None}
    found = [each if isinstance(each, Checkpoint) else held.get(each) for each in inputs]
    models = [model for model in found if model is not None]
    if recipe.rank != "auto" or recipe.energy is not None:
        raise RecipeError("rank: a merge into a base model is not cut to a rank; wanted neither rank nor energy")
    if recipe.ranks != "one":
        raise RecipeError("ranks: a merge into a base model has no ranks; wanted none, got own")
    if models:
        what = "is a full model" if models[0] in inputs else "holds its vocabulary whole"
        _check_dense(recipe, f"{models[0].name} {what}")
    beside = [each for each in adapters if needs_its_base(each)]
    if beside:
        what = "DoRA" if beside[0].magnitudes else "trained tokens"
        _check_dense(recipe, f"{beside[0].name} is known beside its base only ({what})")
    if METHODS[recipe.method].kind == "stacked":  # stacked factors multiply out to the sum of the deltas
        recipe = replace(recipe, space="delta")
    targets = targets_of_models(base, models, targets_of_adapters(base, adapters))
    targets |= {module.name: module.target for module in tokens.modules}
    described = {name: module for adapter in adapters for name, module in adapter.modules.items()}
    union = unite(base, models) if vocab == "union" else None

    def bind(each: Input) -> Adapter | Finetuned:
        if isinstance(each, Checkpoint):
            return open_finetuned(each, base, targets, described, union)
        if each in beside and each not in held:
            return tuned(each, targets, tokens.modules)
        return open_finetuned(held[each], base, targets, described, union, each) if each in held else each

    bound = [bind(each) for each in inputs]
    plain = [each for each in adapters if each not in held]
    if union is not None:
        check_tokens(base, plain, targets, union)
    saved = saved_tensors(base, plain, recipe.saved)
    plan = make_plan(bound, recipe)
    for key in {target.stored.key for target in targets.values()} & saved.keys():
        raise ModelError(f"{key} is both merged and saved whole by an adapter; such layers cannot be merged")
    dtype = DTYPES[recipe.dtype] if recipe.dtype else None
    shapes = {
        key: (
            dtype if dtype and stored.dtype in FLOATS else stored.dtype,
            (union.rows, *stored.shape[1:]) if union is not None and key in union.keys else stored.shape,
        )
        for key, stored in whole.tensors.items()
    }
    layout = lay_out(shapes, shard_size).divided(pieces)
    return IntoJob(base, plan, targets, saved, layout, shard_size, union, tokens.places)


def _with_experts(base: Checkpoint, inputs: Sequence[Input]) -> tuple[Checkpoint, list[Input], Pieces]:
    """Base and inputs with a tensor, or a pair, for each adapted expert; and the pieces of the base's tensors."""
    own = [as_the_base_has_them(each, base) if isinstance(each, Adapter) else each for each in inputs]
    pieces = pieces_of_experts(base, [each for each in own if isinstance(each, Adapter)])
    if not pieces:
        return base, own, pieces
    return (
        divided(base, pieces),
        [divided(each, pieces) if isinstance(each, Checkpoint) else each for each in own],
        pieces,
    )


def _tokens(base: Checkpoint, inputs: Sequence[Input], vocab: str) -> TokenModules:
    """The trained tokens of the adapters: rows of the base, by index."""
    found = token_modules(base, [each for each in inputs if isinstance(each, Adapter)])
    models = [each for each in inputs if isinstance(each, Checkpoint)]
    if found.modules and (models or vocab == "union"):
        owner = found.modules[0].adapters[0].name
        got = models[0].name if models else "vocab union"
        raise ModelError(f"{owner} has trained tokens; wanted adapters only beside it, and vocab base, got {got}")
    return found


def _check_dense(recipe: Recipe, who: str) -> None:
    """Refuse what takes factors, of a merge in which one input has none."""
    if METHODS[recipe.method].kind != "elementwise":
        known = ", ".join(name for name, row in METHODS.items() if row.kind == "elementwise")
        raise RecipeError(f"method: {who} and has no factors; wanted one of {known}, got {recipe.method}")
    if recipe.space != "delta":
        raise RecipeError(f"space: {who} and has no factors; wanted delta, got {recipe.space}")
    if recipe.balance is not None:
        raise RecipeError(f"balance: {who} and has no factors; wanted none, got {recipe.balance}")
