"""The kernels that are compiled ahead of time, and the specialisations that methods and conventions make of them."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from merge_engine.kernels import merge, select
from merge_engine.kernels.launch import Launch, launch_for
from triton.compiler import ASTSource

from bench.static.gpus import GPUS

TIES = {"KEEP": "magnitude", "ELECT": "total", "WEIGH": "never", "DIVISOR": "count"}
# The constexprs of the merge kernel, for the methods and conventions that differ most.
METHODS: dict[str, dict[str, str]] = {
    "linear": {"KEEP": "all", "ELECT": "none", "WEIGH": "before", "DIVISOR": "one"},
    "magnitude_prune": {"KEEP": "magnitude", "ELECT": "none", "WEIGH": "before", "DIVISOR": "one"},
    "ties": TIES,
    "ties, unequal weights": {**TIES, "WEIGH": "after"},
    "ties, frequency": {**TIES, "ELECT": "frequency"},
    "ties, frequency, unequal weights": {**TIES, "ELECT": "frequency", "WEIGH": "after"},
    "ties, mergekit, unequal weights": {**TIES, "WEIGH": "before", "DIVISOR": "weight"},
    "dare_linear": {"KEEP": "bernoulli", "ELECT": "none", "WEIGH": "before", "DIVISOR": "one"},
    "dare_ties": {**TIES, "KEEP": "bernoulli"},
    "dare_ties, unequal weights": {**TIES, "KEEP": "bernoulli", "WEIGH": "after"},
    "dare_ties, frequency, unequal weights": {
        **TIES,
        "KEEP": "bernoulli",
        "ELECT": "frequency",
        "WEIGH": "after",
    },
    "dare_ties, mergekit": {"KEEP": "bernoulli", "ELECT": "total", "WEIGH": "before", "DIVISOR": "one"},
    "breadcrumbs": {"KEEP": "band", "ELECT": "none", "WEIGH": "before", "DIVISOR": "one"},
    "breadcrumbs_ties": {"KEEP": "band", "ELECT": "total", "WEIGH": "before", "DIVISOR": "one"},
    "breadcrumbs_ties, frequency": {"KEEP": "band", "ELECT": "frequency", "WEIGH": "before", "DIVISOR": "one"},
    "elect_max": {"KEEP": "all", "ELECT": "total", "COMBINE": "max", "WEIGH": "before", "DIVISOR": "one"},
    "elect_max, frequency": {
        "KEEP": "all",
        "ELECT": "frequency",
        "COMBINE": "max",
        "WEIGH": "before",
        "DIVISOR": "one",
    },
    "consensus": {"KEEP": "all", "ELECT": "none", "COMBINE": "consensus", "WEIGH": "before", "DIVISOR": "one"},
}
SELECTIONS = ("coarse_histogram", "fine_histogram", "tied_rows", "tied_columns", "l1_norms")

_POINTERS = {
    "terms_ptr": "*i32",
    "tied_ptr": "*i32",
    "counts_ptr": "*i32",
    "interval_ptr": "*i32",
    "value_ptr": "*i32",
    "row_ptr": "*i32",
    "flags_ptr": "*i8",
    "balance_ptr": "*i64",
    "scale_ptr": "*fp32",
    "consensus_ptr": "*fp32",
    "scaling_ptr": "*fp32",
    "norms_ptr": "*fp32",
}


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel: a method of the merge, "vote_balance", or one of SELECTIONS."""

    name: str
    dtype: str = "bf16"  # of factors and output: "fp32", "fp16", "bf16"
    rank: int = 16  # 0: dense
    recipes: int = 1
    base: bool = False
    precision: str = "ieee"
    aligned: bool = True  # rows start at multiples of 16 bytes, which is so if sizes are multiples of 16
    ones: tuple[str, ...] = ()  # integer arguments that are 1: the JIT makes constants of them


def launch_of(case: Case, target: str) -> Launch:
    """How the kernel is launched for tensors of 4096 x 4096."""
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[case.dtype]
    random = case.name.startswith("dare") or case.name == "l1_norms"
    how = {"random": random, "band": case.name.startswith("breadcrumbs"), "twice": case.name == "consensus"}
    return launch_for(4096, 4096, case.rank, dtype, target, recipes=case.recipes, **how)


def compiled(case: Case, target: str, launch: Launch) -> Any:
    """The kernel of a case, compiled for a target as the JIT would compile it."""
    constexprs: dict[str, Any] = {
        "RANK": case.rank,
        "SUBTRACT": case.rank == 0,
        "ADD": case.base,
        "PRECISION": case.precision,
        "RECIPES": launch.recipes,
        "COMBINE": "sum",
        "consensus_ptr": None,
        "TILES": select.TILES_A_PROGRAM,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_R": launch.block_r,
        **dict.fromkeys(case.ones, 1),
    }
    if case.name in METHODS:
        kernel = merge._merge_deltas_kernel
        constexprs |= METHODS[case.name]
        if constexprs["COMBINE"] == "consensus":
            del constexprs["consensus_ptr"]
    elif case.name == "vote_balance":
        kernel = merge._vote_balance_kernel
        constexprs |= TIES
    else:
        kernel = getattr(select, f"_{case.name}_kernel")
    constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        is_pointer = name.endswith("_ptr")
        signature[name] = _POINTERS.get(name, f"*{case.dtype}") if is_pointer else "i32"
        if name in constexprs:
            signature[name] = "constexpr"
        elif case.aligned and (is_pointer or name.startswith("stride") or name in ("M", "N")):
            attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=GPUS[target].target, options=launch.options)
