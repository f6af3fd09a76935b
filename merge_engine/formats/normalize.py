"""One adapter, written so that every reader loads it: one rank, scaling 1, and no patterns.

``B' = [s B, 0]`` and ``A' = [A; 0]``, so that ``B' A' = s B A``: what alpha, rsLoRA, alpha_pattern and rank_pattern say
of a module is in its factors then. Readers differ in which of these they look at.
"""

import shutil
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from merge_engine.errors import AdapterError, RecipeError, some, writing
from merge_engine.files.folder import output_path, place_folder
from merge_engine.formats.adapter import Adapter, common_dtype, short_name
from merge_engine.formats.biases import BIAS
from merge_engine.formats.checkpoint import COMPANIONS, check_inside
from merge_engine.formats.families import PEFT
from merge_engine.formats.open import open_adapter
from merge_engine.formats.peft_writer import AdapterWriter
from merge_engine.formats.servers import max_lora_rank, warn_of_servers
from merge_engine.rules.recipe import DTYPES

_KEPT_FILES = ("README.md", *(pattern for pattern in COMPANIONS if not pattern.endswith(".py")))


@dataclass(frozen=True)
class Normalized:
    """An adapter that was written at one rank with scaling 1.

    rank: of every module. modules: how many. rounded: the names of those whose factors are not exactly ``s B`` and
    ``A``, but rounded once to `dtype`; empty where the delta is the same bit for bit.
    """

    path: Path
    rank: int
    modules: int
    dtype: torch.dtype
    rounded: tuple[str, ...] = field(default=(), repr=False)

    @property
    def max_lora_rank(self) -> int | None:
        """The --max-lora-rank with which vLLM loads the adapter; None: it loads none of so large a rank."""
        return max_lora_rank(self.rank)

    def __str__(self) -> str:
        how = f"{len(self.rounded)} of them rounded once to {short_name(self.dtype)}" if self.rounded else "bit-exact"
        return f"{self.path}: {some(self.modules, 'module')} at rank {self.rank}, scaling 1, {how}"


def normalize(
    adapter: str | Path | Adapter, output: str | Path, *, overwrite: bool = False, dtype: str | None = None
) -> Normalized:
    """B' A' = s B A with one rank for all modules, scaling 1, and empty rank_pattern and alpha_pattern.

    adapter: a folder, a hub id ``user/repo``, or an opened adapter. Its model card and tokenizer files are copied.
    output: the folder to write, loadable by PEFT; it appears complete or not at all, and an existing one is refused
        unless overwrite.
    dtype: of the written factors: "float32", "float16", "bfloat16"; None: the adapter's own.

    ``s B`` is rounded once, to the dtype. Nothing is rounded where s is a power of two, as with alpha = r or 2 r, and
    rarely with others in float32; see `Normalized`. Raises MergeError before anything is written.
    """
    if dtype is not None and (not isinstance(dtype, str) or dtype not in DTYPES):
        raise RecipeError(f"dtype: wanted one of {', '.join(DTYPES)}, got {dtype!r}")
    path = output_path(output)
    opened = adapter if isinstance(adapter, Adapter) else open_adapter(adapter)
    if opened.family.name != PEFT.name:
        raise AdapterError(f"{opened.name} is {opened.family}, wanted {PEFT}: servers load no other")
    opened.check_finite()
    modules = opened.modules.values()
    written = DTYPES[dtype] if dtype else common_dtype({module.dtype for module in modules})
    rank = max(module.rank for module in modules)
    nbytes = 2 * rank * sum(module.rows + module.columns for module in modules) * written.itemsize
    with place_folder(path, overwrite, nbytes, inputs=[opened.path]) as folder:
        rounded = _write(opened, folder, written)
        _copy_files(opened.path, folder)
    return Normalized(path, rank, len(opened.modules), written, rounded)


def _write(adapter: Adapter, folder: Path, dtype: torch.dtype) -> tuple[str, ...]:
    """Write weights and configuration; the names of the modules that were rounded."""
    writer = AdapterWriter(folder, [adapter], adapter.modules, dtype)
    rounded = []
    try:
        for name, module in adapter.modules.items():
            a, b = (factor.double() for factor in adapter.factors(name))
            scaled = b * module.scaling
            writer.add(name, a, scaled)
            exact = _holds(dtype, scaled @ a) if module.kind == BIAS else _holds(dtype, a) and _holds(dtype, scaled)
            if not (exact and _short(module.scaling)):
                rounded.append(name)
        writer.complete()
        warn_of_servers(adapter.name, writer.trouble_of_servers())
    except BaseException:
        writer.abandon()
        raise
    return tuple(rounded)


def _holds(dtype: torch.dtype, values: torch.Tensor) -> bool:
    return torch.equal(values.to(dtype).double(), values)


def _short(scaling: float) -> bool:
    """Whether float64 holds its product with every float32: 24 digits each."""
    return float(torch.tensor(scaling, dtype=torch.float32)) == scaling


def _copy_files(source: Path, folder: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and any(fnmatchcase(file.name, pattern) for pattern in _KEPT_FILES):
            check_inside(file, source, source.name)
            with writing(folder / file.name):
                shutil.copyfile(file, folder / file.name)
