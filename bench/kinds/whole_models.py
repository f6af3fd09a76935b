"""Kind whole_models: full models merged tensor by tensor: `merge-engine merge recipe.yml` against mergekit-yaml.

Bfloat16 Llamas: a base, and models that were tuned from it. Every run is a whole process, timed from its start to its
end; both get the same recipe. mergekit is optional, as in kind base.
"""

import shutil
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.harness.agreement import Disagreement
from bench.harness.disk import make_base, scratch_folder
from bench.harness.inputs import MODELS
from bench.harness.kind import Entry, Kind, Results
from bench.harness.measure import Contestant, Sample
from bench.harness.processes import whole_process
from bench.harness.workloads import Workload
from bench.kinds.base import MODULE, mergekit_program

OPTIONS: dict[str, dict[str, Any]] = {  # by method
    "slerp": {"t": 0.5},
    "della": {"weight": 0.5, "density": 0.5, "epsilon": 0.1},
    "model_stock": {},
    "sce": {"select_topk": 0.5},
}
RANDOM = ("della",)
APART = 2.0**-7  # mergekit computes in bfloat16, and rounds a few times


@lru_cache
def _models(work: Workload) -> tuple[Path, list[Path]]:
    """(the base, the models tuned from it: a fiftieth of its size away)."""
    folder = scratch_folder() / f"whole-{work.model}-{work.layers}"
    base, tuned = folder / "base", [folder / str(number) for number in range(work.adapters)]
    if not base.exists():
        make_base(base, work.layers, MODELS[work.model])
    for seed, model in enumerate(tuned, 1):
        if not model.exists():
            generator, tensors = torch.Generator().manual_seed(seed), load_file(base / "model.safetensors")
            for key, tensor in tensors.items():
                tensors[key] = (tensor.float() + 4e-4 * torch.randn(tensor.shape, generator=generator)).bfloat16()
            model.mkdir()
            save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
            shutil.copy(base / "config.json", model)
    return base, tuned


def _contestant(command: Callable[[Path, Path], list[str]], name: str, work: Workload, device: str) -> Contestant:
    base, tuned = _models(work)
    models = [{"model": str(model)} for model in tuned]
    recipe = {"merge_method": work.method, "base_model": str(base), "models": models, "dtype": "bfloat16"}
    file, output = base.with_name(f"{work.method}.yml"), base.with_name(f"{name} output")
    file.write_text(yaml.safe_dump(recipe | {"parameters": OPTIONS[work.method]}))

    def run() -> Sample:
        shutil.rmtree(output, ignore_errors=True)
        return whole_process(command(file, output))._replace(result=output)

    return Contestant(run, own_clock=True)


def _ours(recipe: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "merge_engine", "merge", str(recipe), "-o", str(output)]


def _mergekit(recipe: Path, output: Path) -> list[str]:
    return [*mergekit_program(), str(recipe), str(output), "--no-copy-tokenizer", "--no-write-model-card"]


def _check(work: Workload, results: Results, device: str) -> Mapping[str, float] | None:
    base, tuned = _models(work)
    name = f"{MODULE}.weight"
    if work.method in TEXTBOOK:
        under, *models = (_read(folder, name).double() for folder in (base, *tuned))
        _compare(work, "the textbook", name, _read(results["merge-engine"], name), TEXTBOOK[work.method](under, models))
    if work.method not in RANDOM and len(results) > 1:
        with safe_open(results["mergekit-yaml"] / "model.safetensors", "pt") as opened:
            for key in opened.keys():
                _compare(work, "mergekit", key, _read(results["merge-engine"], key), opened.get_tensor(key))
    return None


def _compare(work: Workload, whose: str, key: str, ours: Tensor, theirs: Tensor) -> None:
    apart = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    if not apart <= APART:
        raise Disagreement(f"{work.name}: {key} is {apart:.1e} off {whose}, wanted up to {APART:.1e}")


def _slerp(base: Tensor, models: list[Tensor]) -> Tensor:
    """Half of the way on the arc."""
    (model,) = models
    angle = torch.arccos((base * model).sum() / base.norm() / model.norm())
    return torch.sin(angle / 2) / torch.sin(angle) * (base + model)


def _stock(base: Tensor, models: list[Tensor]) -> Tensor:
    """t mean(x) + (1 - t) base, t = 2 c / (1 + c), c the cosine between two changes."""
    one, two = (model - base for model in models)
    c = (one * two).sum() / one.norm() / two.norm()
    return base + 2 * c / (1 + c) * (one + two) / 2


TEXTBOOK: dict[str, Callable[[Tensor, list[Tensor]], Tensor]] = {"slerp": _slerp, "model_stock": _stock}


def _read(folder: Path, name: str) -> Tensor:
    with safe_open(folder / "model.safetensors", "pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
        return tensor


KIND = Kind(
    {
        "merge-engine": Entry(partial(_contestant, _ours, "ours"), seconds=3.5),
        "mergekit-yaml": Entry(partial(_contestant, _mergekit, "mergekit"), seconds=20, on_request=True),
    },
    _check,
    checking=0,
    baseline=("mergekit-yaml",),
    forks=False,
    has_rates=False,
    least=5,
)
