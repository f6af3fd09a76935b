"""A merge that was kept in memory: written to a folder, given to PEFT or to a server, and shown in a notebook."""

import json
import shutil
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import Tensor

from merge_engine.engine.output import check_output, family_of, finish_writer, output_bytes, place_of, writer_of
from merge_engine.errors import MergeError, OutputError, RecipeError
from merge_engine.formats.families import PEFT
from merge_engine.formats.peft_config import ADAPTER_CONFIG
from merge_engine.formats.peft_tensors import WEIGHTS_FILE

if TYPE_CHECKING:
    from merge_engine.engine.output import Merged

LOWEST = 5  # modules that a notebook shows


def save(merged: "Merged", path: Path, overwrite: bool) -> None:
    """Write the bytes that a merge with this output writes; of a merge that was written, a copy of its folder."""
    check_output(merged.plan, path)
    inputs = merged.plan.inputs
    if merged.path is None:
        with place_of(path, overwrite, output_bytes(merged.plan), inputs) as folder:
            writer = writer_of(merged.plan, folder, path)
            try:
                for name, (A, B, _) in merged.modules.items():
                    writer.add(name, A, B)
                finish_writer(writer, merged)
            except BaseException:
                writer.abandon()
                raise
        return
    if merged.path.is_dir() == (path.suffix == ".safetensors"):
        raise OutputError(f"{path}: wanted a path of the same form as {merged.path}, where the merge was written")
    with place_of(path, overwrite, output_bytes(merged.plan), [*inputs, merged.path]) as folder:
        if merged.path.is_dir():
            shutil.copytree(merged.path, folder, dirs_exist_ok=True)
        else:
            shutil.copyfile(merged.path, folder / path.name)


def as_tensors(merged: "Merged") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(adapter_config.json as a table, {PEFT's key: tensor}), as `save` writes them.

    Raises OutputError for adapters of a family that is not PEFT's.
    """
    from safetensors.torch import load_file

    if family_of(merged.plan) != PEFT:
        raise OutputError(f"tensors: wanted adapters of PEFT's, got {family_of(merged.plan)}; save() writes theirs")
    if merged.path is None:
        with TemporaryDirectory(prefix="merge-engine-") as folder:
            save(merged, Path(folder, "merged"), overwrite=False)
            return _config(Path(folder, "merged")), _own(load_file(Path(folder, "merged", WEIGHTS_FILE)))
    return _config(merged.path), _own(load_file(merged.path / WEIGHTS_FILE))


def apply_to(merged: "Merged", model: Any, name: str) -> None:
    """Add the merge to a PeftModel as an adapter of this name, and make it the active one.

    Raises RecipeError for a model without PEFT, a name that it has, and modules that it lacks; it is as before then.
    """
    from peft import LoraConfig, PeftModel
    from peft.utils import set_peft_model_state_dict

    if not isinstance(model, PeftModel):
        raise RecipeError(f"apply_to: wanted a PeftModel, got {type(model).__name__}")
    if name in model.peft_config:
        raise RecipeError(f"apply_to: wanted a new name for the adapter, the model has {name!r}")
    config, tensors = as_tensors(merged)
    active = model.active_adapter
    try:
        model.add_adapter(name, LoraConfig(**config))
        loaded: Any = set_peft_model_state_dict(model, tensors, adapter_name=name)
        lacking = [key for key in loaded.missing_keys if f".{name}." in key and "lora_" in key]
        if loaded.unexpected_keys or lacking:
            key = (loaded.unexpected_keys or lacking)[0]
            raise RecipeError(f"apply_to: the model and the merge do not have the same modules: {key}")
        model.set_adapter(name)
    except Exception as error:
        if name in model.peft_config:
            model.delete_adapter(name)
            model.set_adapter(active)
        if isinstance(error, MergeError):
            raise
        raise RecipeError(f"apply_to: PEFT does not take it: {' '.join(str(error).split())}") from error


def html(merged: "Merged") -> str:
    """What a notebook shows: the recipe, the inputs, and what the cut kept."""
    plan = merged.plan
    weights = [f"{adapter.name} * {weight:g}" for adapter, weight in zip(plan.adapters, plan.weights, strict=True)]
    lowest = sorted(merged.energy.items(), key=lambda item: item[1])[:LOWEST]
    rows = [
        ("method", plan.recipe.method),
        ("adapters", ", ".join(weights)),
        ("modules", str(len(merged.ranks))),
        ("rank", f"up to {merged.rank}"),
        ("kept energy", f"{merged.total_energy:.4f}"),
        ("at", "in memory; save(path) writes it" if merged.path is None else str(merged.path)),
    ]
    rows += [(f"kept in {name}", f"{energy:.4f}") for name, energy in lowest if energy < 0.9995]
    cells = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(value)}</td></tr>'
        for name, value in rows
    )
    return f"<table><caption>Merged adapter</caption>{cells}</table>"


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return config


def _own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies that do not depend on a file that may go."""
    return {key: tensor.clone() for key, tensor in tensors.items()}
