"""The result of a merge: kept in memory, or written to a folder that appears whole or not at all."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from merge_engine.engine.backend import Backend
from merge_engine.engine.cut import ENOUGH, ENOUGH_RANK, LOW, NUMERICAL_RANK, SMALLEST_ROW, Finished
from merge_engine.engine.plan import Plan
from merge_engine.errors import OutputError
from merge_engine.files.folder import output_path, place_file, place_folder
from merge_engine.files.locate import SINGLE
from merge_engine.formats.adapter import Adapter
from merge_engine.formats.families import MLX, PEFT, Family
from merge_engine.formats.mlx_writer import MlxWriter
from merge_engine.formats.peft_writer import AdapterWriter
from merge_engine.formats.push import push_output
from merge_engine.formats.servers import max_lora_rank, vllm_option, warn_of_servers
from merge_engine.formats.single_file_writer import SingleFileWriter
from merge_engine.lowrank.small_svd import LowRank
from merge_engine.models.finetuned import Finetuned
from merge_engine.rules.methods import METHODS

logger = logging.getLogger(__name__)
_SHARED = 1e-2  # rows that one A started from are nearer to each other than this


@dataclass(frozen=True)
class Merged:
    """A merged adapter: its factors if it was kept in memory, its folder if it was written.

    modules: {name: LowRank(A [k, N], B [M, k], energy)}, float32, delta = B @ A; empty if written to a folder.
    energy: {name: kept energy |B A|^2 / |merged delta|^2 of the cut to rank k}; 1.0 where nothing was cut.
    ranks: {name: k}.
    figures: {name: {figure: value}} of what else there is to say: the "scale" that scale="auto" came to,
        "numerical_rank" and "smallest_singular_value" of methods on cores (near 0: adapters are nearly parallel),
        "smallest_row_singular_value" of the spaces "knots" and "core" (near 0: adapters started from one A), and
        "rank_that_keeps_0.99" where the cut keeps less than 0.9 of the energy and the singular values are known.
    """

    plan: Plan = field(repr=False)
    path: Path | None
    energy: dict[str, float] = field(repr=False)
    total_energy: float
    modules: dict[str, LowRank] = field(default_factory=dict, repr=False)
    ranks: dict[str, int] = field(default_factory=dict, repr=False)
    figures: dict[str, dict[str, float]] = field(default_factory=dict, repr=False)
    backend: str = field(default="", repr=False)

    @property
    def rank(self) -> int:
        """The largest rank: with ``ranks="one"`` that of every module as it is written."""
        return max(self.ranks.values())

    @property
    def max_lora_rank(self) -> int | None:
        """The --max-lora-rank with which vLLM loads the result; None: it loads no adapter of so large a rank."""
        return max_lora_rank(self.rank)

    @property
    def server_note(self) -> str | None:
        """How vLLM loads the result, in a sentence; None of image models' files and MLX's, which it does not load."""
        return vllm_option(self.rank) if family_of(self.plan) == PEFT else None

    def push_to_hub(self, repo: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Send what was written to ``user/repo`` on the hub, with a card that loads it from there; the address.

        private: of a new repository; None: as the account has it. token: None: that of ``hf auth login``.
        Raises OutputError: the merge was kept in memory, or the hub does not take it.
        """
        return push_output(self.path, repo, private=private, token=token)

    def save(self, path: str | Path, *, overwrite: bool = False) -> "Merged":
        """Write a merge that was kept in memory: the same bytes as ``merge(..., path)``. Returns the written one.

        Raises OutputError as `merge` does.
        """
        from merge_engine.engine.in_hand import save

        place = output_path(path)
        save(self, place, overwrite)
        return replace(self, path=place, modules={})

    def as_tensors(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(adapter_config.json as a table, {key: tensor}) as they are written, for engines that load from memory.

        SGLang: ``engine.load_lora_adapter_from_tensors(name, tensors, config)``. The tensors are copies.
        Raises OutputError for adapters of image models and of MLX.
        """
        from merge_engine.engine.in_hand import as_tensors

        return as_tensors(self)

    def state_dict(self) -> dict[str, Tensor]:
        """{key: tensor} by PEFT's names, for ``set_peft_model_state_dict``; see `as_tensors`."""
        return self.as_tensors()[1]

    def apply_to(self, model: Any, name: str = "merged") -> None:
        """Add the merge to a PeftModel as an adapter of this name, and make it the active one; nothing is written.

        Raises RecipeError for a model without PEFT, a name that it has, or modules that it lacks.
        """
        from merge_engine.engine.in_hand import apply_to

        apply_to(self, model, name)

    def _repr_html_(self) -> str:
        from merge_engine.engine.in_hand import html

        return html(self)


class Output:
    """What a merge makes, module by module: kept, or written into a folder."""

    def __init__(self, plan: Plan, backend: Backend, path: Path | None, folder: Path | None) -> None:
        self.plan, self.backend, self.path = plan, backend, path
        self.writer = None if folder is None or path is None else writer_of(plan, folder, path)
        self.energy: dict[str, float] = {}
        self.ranks: dict[str, int] = {}
        self.figures: dict[str, dict[str, float]] = {}
        self.kept: dict[str, LowRank] = {}
        self.norms = _Norms()

    def add(self, name: str, result: Finished) -> None:
        """Take one module's factors, in any order."""
        A, B, energy = result.factors
        self.energy[name], self.ranks[name] = energy, len(A)
        self.figures[name] = dict(result.figures)
        self.norms.add(result)
        if self.writer is None:
            self.kept[name] = result.factors
        else:
            self.writer.add(name, A, B)

    def finish(self) -> None:
        """Complete the folder: every module is there. What the user ought to know is logged."""
        if self.writer is not None:
            finish_writer(self.writer, self.merged)
            warn_of_servers(self.path, self.writer.trouble_of_servers())
        subject = f"merge by {self.plan.recipe.method}" if self.path is None else str(self.path)
        _warn_of_a_cut(self, subject)
        warn_of_one_start(self.plan, self.figures, subject)

    def abandon(self) -> None:
        if self.writer is not None:
            self.writer.abandon()

    @property
    def merged(self) -> Merged:
        energy, modules = dict(sorted(self.energy.items())), dict(sorted(self.kept.items()))
        ranks = dict(sorted(self.ranks.items()))
        figures = dict(sorted(self.figures.items()))
        return Merged(self.plan, self.path, energy, self.norms.kept_energy, modules, ranks, figures, self.backend.name)


@contextmanager
def output_of(plan: Plan, backend: Backend, path: Path | None, overwrite: bool = False) -> Iterator[Output]:
    """The output of a plan: the folder appears when the block ends, and does not where it raises."""
    place: AbstractContextManager[Path | None] = nullcontext()
    if path is not None:
        check_output(plan, path)
        place = place_of(path, overwrite, output_bytes(plan), plan.inputs)
    with place as folder:
        output = Output(plan, backend, path, folder)
        try:
            yield output
            output.finish()
        except BaseException:
            output.abandon()
            raise


def place_of(path: Path, overwrite: bool, nbytes: int, inputs: Sequence[Path]) -> AbstractContextManager[Path]:
    """The working folder of an output, which is a folder or, with the suffix of safetensors, a file."""
    place = place_file if path.suffix == SINGLE else place_folder
    return place(path, overwrite, nbytes, inputs=inputs)


class _Norms:
    """Kept energy over all modules: sum |B A|^2 / sum |merged delta|^2, whatever one scale they all have."""

    def __init__(self) -> None:
        self.kept = self.total = 0.0

    def add(self, result: Finished) -> None:
        energy = result.factors.energy
        total = result.squared_norm / energy if energy > 0 else 0.0
        if result.norms and total > 0:  # scale="auto" gives each module this norm
            total = (sum(result.norms) / len(result.norms)) ** 2
        self.kept += energy * total
        self.total += total

    @property
    def kept_energy(self) -> float:
        return self.kept / self.total if self.total > 0 else 1.0


def _warn_of_a_cut(output: Output, subject: str) -> None:
    """One line for a merge that has lost more than a tenth of its energy, or a part of a flat spectrum."""
    method, figures = output.plan.recipe.method, output.figures
    kept = f"rank up to {max(output.ranks.values(), default=0)} keeps {output.norms.kept_energy:.2f} of the energy"
    whole = {name: own[NUMERICAL_RANK] for name, own in figures.items() if NUMERICAL_RANK in own}
    if METHODS[method].flat and any(output.ranks[name] < rank for name, rank in whole.items()):
        equal = f"all directions of {method} are equally strong, wanted rank {max(whole.values())}"
        logger.warning("%s: %s; %s", subject, kept, equal)
    elif output.norms.kept_energy < LOW:
        enough = [own[ENOUGH_RANK] for own in figures.values() if ENOUGH_RANK in own]
        more = f"rank {max(enough)} would keep {ENOUGH} in every module that is below {LOW}" if enough else ""
        logger.warning("%s: %s; %s", subject, kept, more or "a larger rank keeps more")


def warn_of_one_start(plan: Plan, figures: Mapping[str, Mapping[str, float]], subject: str) -> None:
    """One line where the common spaces of adapters that started from one A are merged in.

    Modules whose ranks add up to more than N do not count: rows depend on each other there, wherever they started.
    """
    near = []
    for module in plan.modules:
        ranks = sum(plan.adapters[number].modules[module.name].rank for number in module.adapters)
        if SMALLEST_ROW in figures.get(module.name, {}) and ranks <= module.columns:
            near.append(figures[module.name][SMALLEST_ROW] < _SHARED)
    if 2 * sum(near) > len(near):
        logger.warning(
            "%s: in %d of %d modules the adapters' A are nearly the same, as if trained from one initialisation; "
            "space='%s' was measured 3 to 6 points worse there, space='delta' is not affected",
            *(subject, sum(near), len(near), plan.recipe.space),
        )


def output_bytes(plan: Plan) -> int:
    """Bytes that the factors of the result take on the disk, at most: with one rank, twice while they are padded."""
    own = sum(module.rank * (module.rows + module.columns) for module in plan.modules)
    if plan.recipe.ranks == "one":
        rank = max(module.rank for module in plan.modules)
        one = rank * sum(module.rows + module.columns for module in plan.modules)
        own = one if one == own and plan.recipe.energy is None else own + one
    return own * plan.dtype.itemsize


def check_output(plan: Plan, path: Path) -> None:
    """Raise OutputError where adapters of the plan's family cannot be written to a path of this form."""
    family = family_of(plan)
    if path.suffix == SINGLE and not family.single:
        raise OutputError(f"{path} is a file, wanted a folder to write to: the adapters are {family}")
    if plan.recipe.ranks == "own" and not family.own_ranks:
        raise OutputError(f"{path}: {family} has one rank for all modules, wanted ranks='one'")


def family_of(plan: Plan) -> Family:
    """The family of the adapters of a plan."""
    return next((source.family for source in plan.adapters if isinstance(source, Adapter)), PEFT)


def writer_of(plan: Plan, folder: Path, path: Path) -> AdapterWriter:
    described = {module.name: plan.adapters[module.adapters[0]].modules[module.name] for module in plan.modules}
    adapters = [adapter for adapter in plan.adapters if not isinstance(adapter, Finetuned)]
    if family_of(plan).single:
        name = path.name if path.suffix == SINGLE else f"{os.path.realpath(path).rpartition(os.sep)[2]}{SINGLE}"
        return SingleFileWriter(folder, adapters, described, plan.dtype, plan.recipe.ranks, file_name=name)
    if family_of(plan) == MLX:
        return MlxWriter(folder, adapters, described, plan.dtype)
    return AdapterWriter(folder, adapters, described, plan.dtype, plan.recipe.ranks, plan.recipe.saved)


def finish_writer(writer: AdapterWriter, merged: Merged) -> None:
    """Complete the folder of a merge, with card, recipe and report."""
    plan = merged.plan
    recipe = plan.recipe.as_dict()
    recipe["weights"] = list(plan.weights)
    modules = {
        module.name: {
            "energy": merged.energy[module.name],
            "adapters": [plan.adapters[number].name for number in module.adapters],
            **merged.figures[module.name],
        }
        for module in plan.modules
    }
    adapters = [adapter.source for adapter in plan.adapters]
    report = {"energy": merged.total_energy, "backend": merged.backend, "adapters": adapters}
    writer.finish(recipe, {**report, "modules": modules})
