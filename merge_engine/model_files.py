"""What a full model's folder holds beside its weights: configuration, tokenizer, model card and report."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from merge_engine.adapter_writer import versions
from merge_engine.checkpoint import CONFIG_FILE, Checkpoint
from merge_engine.plan import Plan
from merge_engine.shards import INDEX_FILE, Layout
from merge_engine.stream import writing

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def write_companions(folder: Path, base: Checkpoint, plan: Plan, layout: Layout, backend: str) -> None:
    """Copy what belongs to the base, and write index, config.json, README.md and merge_report.json."""
    for name, file in base.companions().items():
        with writing(folder / name):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name)
    recipe = plan.recipe.as_dict()
    recipe["weights"] = list(plan.recipe.weights_for([source.name for source in plan.adapters]))
    report = {
        "base": base.source,
        "inputs": [source.source for source in plan.adapters],
        "modules": len(plan.modules),
        "backend": backend,
        "recipe": recipe,
        "versions": versions(),
    }
    texts = {
        CONFIG_FILE: _config(base, plan.recipe.dtype),
        INDEX_FILE: layout.index(),
        "README.md": model_card(base, plan, recipe),
        "merge_report.json": json.dumps(report, indent=2) + "\n",
    }
    for name, text in texts.items():
        if text is not None:
            with writing(folder / name):
                (folder / name).write_text(text, encoding="utf-8")


def _config(base: Checkpoint, dtype: str | None) -> str:
    """The base's own text, or with the dtype that was asked for."""
    if dtype is None:
        return (base.path / CONFIG_FILE).read_text(encoding="utf-8")
    config = dict(base.config)
    for key in [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]:
        config[key] = dtype
    return json.dumps(config, indent=2) + "\n"


def model_card(base: Checkpoint, plan: Plan, recipe: dict[str, Any]) -> str:
    """The README.md of a merged model: front matter for the hub, what was merged into what, and how."""
    import yaml

    front: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "merge-engine"]}
    if _HUB_ID.fullmatch(base.source):  # the hub takes no local path here
        front = {"base_model": base.source, **front}
    weights = plan.recipe.weights_for([source.name for source in plan.adapters])
    rows = [
        f"| {source.source.replace('|', chr(92) + '|')} | {weight} |"
        for source, weight in zip(plan.adapters, weights, strict=True)
    ]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).strip(),
            "---",
            "",
            "# Merged model",
            "",
            f"Made by merge-engine: `{base.source}` with these merged into it:",
            "",
            "| input | weight |",
            "| --- | --- |",
            *rows,
            "",
            "## Recipe",
            "",
            "```yaml",
            yaml.safe_dump(recipe, sort_keys=False).strip(),
            "```",
            "",
        ]
    )
