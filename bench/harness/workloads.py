"""The workloads: what is merged, as a table in order of importance. A run takes those that fit its time budget."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bench.harness.inputs import FLUX, LAYERS, LLAMA_134M, MODELS, TINY_LLAMA, TWO_OF_TINY_LLAMA, Pair, factors
from merge_engine.cpu.mask import keep_mask
from merge_engine.rules.philox import stream_id
from merge_engine.rules.rule import Rule, make_rule

DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}  # as names of workloads have them
STREAM = stream_id("layer", "delta")  # of the random masks of the one layer


@dataclass(frozen=True)
class Workload:
    """One row of the table.

    kind: which benchmark (see `kinds.table.KINDS`).
    method: the merge method, PEFT's combination type, or the name of a grid of recipes, depending on the kind.
    rows, columns: of one layer. Or, instead, layers: of a model, whose blocks have the shapes `inputs.MODELS[model]`.
    only: the names of the contestants that take part; empty: all.
    vary: a field and its values: one workload for each value, and their rounds are interleaved.
    """

    kind: str
    method: str
    rows: int = 0
    columns: int = 0
    adapters: int = 3
    rank: int = 16
    density: float = 0.2
    dtype: str = "float32"
    layers: int = 0
    model: str = "TinyLlama"
    only: tuple[str, ...] = ()
    vary: tuple[str, tuple[int, ...]] | None = None

    @property
    def name(self) -> str:
        """Unique within a kind: "ties 3x r16 4096x4096 d0.2 fp32"."""
        of_model = "" if self.model == "TinyLlama" else f" of {self.model}"
        size = f"{self.layers} layers{of_model}" if self.layers else f"{self.rows}x{self.columns}"
        if self.vary is not None:
            size += f" by {self.vary[0]}"
        return f"{self.method} {self.adapters}x r{self.rank} {size} d{self.density} {DTYPES[self.dtype]}"

    @property
    def elements(self) -> int:
        """How many elements the deltas of one adapter have."""
        if not self.layers:
            return self.rows * self.columns
        return self.layers * sum(rows * columns for rows, columns in MODELS[self.model].values())

    @property
    def flops(self) -> int:
        """Of computing B @ A once for every adapter: the least that any contestant does."""
        return 2 * self.rank * self.elements * self.adapters

    @property
    def nbytes(self) -> int:
        """Of reading the factors once and writing the merged deltas once in float32: the least that anyone moves."""
        size = torch.finfo(getattr(torch, self.dtype)).bits // 8
        return 4 * self.elements + size * self.adapters * self.rank * (self.rows + self.columns)

    def sizes(self) -> "list[Workload]":
        """One workload for each value of `vary`, or just this one."""
        if self.vary is None:
            return [self]
        field, values = self.vary
        return [replace(self, vary=None, **{field: value}) for value in values]  # type: ignore[arg-type]

    def shrunk(self, factor: int) -> "Workload":
        """The same with 1/factor of the rows and columns, or of the layers: for a quick trial."""
        vary = self.vary
        if vary is not None and vary[0] in ("rows", "columns"):
            vary = (vary[0], tuple(max(16, value // factor) for value in vary[1]))
        return replace(
            self,
            rows=self.rows and max(16, self.rows // factor),
            columns=self.columns and max(16, self.columns // factor),
            layers=self.layers and max(1, self.layers // factor),
            vary=vary,
        )


@dataclass(frozen=True)
class Task:
    """The inputs of a workload with one layer, made before any run begins: factors in its dtype, on a device."""

    workload: Workload
    device: str = "cpu"
    pairs: list[Pair] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        generator, work = torch.Generator().manual_seed(0), self.workload
        made = [factors(work.rows, work.columns, work.rank, generator) for _ in range(work.adapters)]
        dtype = getattr(torch, work.dtype)
        object.__setattr__(self, "pairs", [(A.to(self.device, dtype), B.to(self.device, dtype)) for A, B in made])

    @property
    def weights(self) -> list[float]:
        """2 for the first adapter, 1 for the others."""
        return [1.0 + (number == 0) for number in range(self.workload.adapters)]

    @property
    def rule(self) -> Rule:
        return make_rule(self.workload.method)

    @property
    def kept(self) -> int:
        """How many elements of each delta a trim keeps."""
        return self.rule.kept(self.workload.density, self.workload.elements)

    def mask(self, adapter: int, rows: range | None = None) -> Tensor:
        """Which of the adapter's deltas a random drop keeps, bool [rows, columns]."""
        columns = range(self.workload.columns)
        rows = range(self.workload.rows) if rows is None else rows
        where = {"seed": 0, "stream": STREAM, "adapter": adapter}
        return keep_mask(self.workload.density, rows=rows, columns=columns, **where).to(self.device)


def _whole_models(method: str, models: int) -> Workload:
    """So many models and their base."""
    sizes = {"adapters": models, "rank": 0, "density": 0.5, "dtype": "bfloat16", "layers": 12}
    return Workload("whole_models", method, model=LLAMA_134M, **sizes)  # type: ignore[arg-type]


OURS, RIVALS = ("tiled", "triton"), ("tiled", "triton", "PEFT")


def _deltas(method: str, rows: int, columns: int, **fields: object) -> Workload:
    return Workload("deltas", method, rows, columns, **fields)  # type: ignore[arg-type]


def _many_deltas() -> list[Workload]:
    """Layers of TinyLlama, Llama-2-7B, Mistral-7B and Llama-3-70B; several ranks, adapters, densities and dtypes."""
    shapes = [(256, 2048), (5632, 2048), (2048, 5632), (1024, 4096), (11008, 4096), (14336, 4096), (8192, 8192)]
    return [
        *(_deltas("ties", 2048, 2048, rank=rank) for rank in (8, 16, 64)),
        *(_deltas("ties", 2048, 2048, adapters=adapters) for adapters in (2, 8)),
        *(_deltas("ties", 2048, 2048, density=density) for density in (0.05, 0.5)),
        *(_deltas(method, 2048, 2048, dtype="bfloat16") for method in ("ties", "dare_ties")),
        *(_deltas(method, 2048, 2048) for method in ("linear", "magnitude_prune", "dare_linear", "dare_ties")),
        *(_deltas("ties", rows, columns, only=RIVALS) for rows, columns in shapes),
        _deltas("ties", 2048, 2048, adapters=32, only=RIVALS),
        _deltas("ties", 28672, 8192, only=OURS),
    ]


SEARCHED = ("linear", "iso_c", "tsv", "tsv_iso", "actmat")  # with other weights, in a session
FACTORS = ("linear", "magnitude_prune", "dare_ties", "dare_linear", "cat")  # beside ties
WORKLOADS = [
    _deltas("ties", 4096, 4096, only=RIVALS),
    _deltas("dare_ties", 4096, 4096, only=RIVALS),
    Workload("select", "magnitude_prune", 4096, 4096, adapters=1),
    Workload("threads", "ties", 4096, 4096),
    Workload("parts", "ties", 4096, 4096),
    Workload("recompress", "svd", 2048, 2048),
    Workload("recompress", "ties_svd", 2048, 2048),
    Workload("whole", "ties", layers=LAYERS),
    *(Workload("layer", "ties_svd", rows, columns) for rows, columns in sorted(set(TINY_LLAMA.values()))),
    Workload("elements", "ties", 1024, 2048, only=OURS, vary=("rows", (1024, 2048, 4096, 8192))),
    Workload("adapters", "ties", 2048, 2048, only=OURS, vary=("adapters", (4, 8, 16, 32))),
    Workload("factors", "ties", layers=LAYERS),
    Workload("svd_merge", "linear", 3072, 3072, rank=32),
    Workload("image", "linear", layers=19, model=FLUX, rank=32, dtype="bfloat16"),
    Workload("base", "ties", layers=12, model=LLAMA_134M),
    Workload("base", "dare_ties", layers=12, model=LLAMA_134M),
    Workload("ranks", "ties", layers=LAYERS),
    Workload("many", "ties, density x scale", adapters=8, layers=1),
    Workload("trial", "linear", adapters=4, layers=LAYERS),
    _whole_models("slerp", 1),
    *(
        Workload("session", f"{what}, other weights", adapters=8, layers=1)
        for what in ("ties", "linear", "ties of factors")
    ),
    *(_whole_models(method, 2) for method in ("della", "model_stock", "sce")),
    *(Workload("trial", method, adapters=4, layers=LAYERS) for method in ("tsv", "actmat")),
    Workload("image", "ties", layers=19, model=FLUX, rank=32, dtype="bfloat16"),
    *(Workload("factors", method, layers=LAYERS) for method in FACTORS),
    Workload("many", "ties, density x weights", adapters=8, layers=1),
    Workload("many", "linear, weights x scale", adapters=8, layers=4),
    Workload("many", "ties of factors, density x weights", adapters=8, layers=4),
    *(
        Workload("session", f"{method}, other weights", adapters=8, layers=20, model=TWO_OF_TINY_LLAMA)
        for method in SEARCHED
    ),
    Workload("adapters", "ties", 1024, 1024, only=RIVALS, vary=("adapters", (4, 8, 16, 32))),
    *_many_deltas(),
    *(Workload("select", "magnitude_prune", 4096, 4096, adapters=1, density=density) for density in (0.05, 0.5)),
    Workload("select", "magnitude_prune", 2048, 5632, adapters=1, dtype="bfloat16"),
    *(
        Workload("recompress", f"{method}_svd", 2048, 2048)
        for method in ("magnitude_prune", "dare_ties", "dare_linear")
    ),
]
