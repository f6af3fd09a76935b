"""The kernels that are compiled ahead of time, and the specialisations that methods and conventions make of them."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from merge_engine.kernels import finish, merge, search, select, terms, trims
from merge_engine.kernels.launch import SMALL as OPTIONS
from merge_engine.kernels.launch import Launch, finish_launch, launch_for, search_launch
from triton.compiler import ASTSource

from bench.static.gpus import target_of

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
# What a search launches, in this order; it counts and collects over all elements.
SEARCH = ("sample", "bracket", "count", "narrow", "collect", "finish")
# Thresholds that span a model, and L1 norms.
SELECTIONS = ("coarse_histogram", "fine_histogram", "tied_rows", "tied_columns", "l1_norms")
SWEEPS = ("sample", "count", "collect", "coarse_histogram", "fine_histogram", "tied_rows", "tied_columns")
SMALL = ("bracket", "narrow", "terms")  # no tiles: a few programs
_MODULES = {
    **dict.fromkeys(SEARCH, search),
    **dict.fromkeys(SELECTIONS, select),
    "finish": finish,
    "terms": terms,
    "vote_balance": merge,
}

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_POINTERS = {
    **dict.fromkeys(
        ("terms_ptr", "counts_ptr", "interval_ptr", "value_ptr", "row_ptr", "column_ptr", "words_ptr"), "*i32"
    ),
    **dict.fromkeys(("top_row_ptr", "top_column_ptr", "length_ptr", "keys_ptr", "tiles_ptr"), "*i32"),
    **dict.fromkeys(("state_ptr", "kept_ptr", "reached_ptr", "balance_ptr"), "*i64"),
    **dict.fromkeys(("numbers_ptr", "scaling_ptr", "norms_ptr", "weights_ptr", "top_value_ptr"), "*fp32"),
    "sample_ptr": "*i16",
    "flags_ptr": "*i8",
    "factor_ptr": "*fp64",
}


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel: a method, "vote_balance", "terms", or one of SEARCH or SELECTIONS."""

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
    dtype = _DTYPES[case.dtype]
    random = case.name.startswith("dare") or case.name == "l1_norms"
    how = {"random": random, "band": case.name.startswith("breadcrumbs"), "twice": case.name == "consensus"}
    launch = launch_for(4096, 4096, case.rank, dtype, target, recipes=case.recipes, **how)
    if case.name == "finish":
        return finish_launch(launch, dtype)
    return search_launch(launch, target) if case.name in SWEEPS else launch


def loops_in(case: Case) -> int:
    """How many loops over adapters, or over tiles, a kernel has: a consensus makes its products twice."""
    return 2 if case.name == "consensus" else 1


def compiled(case: Case, target: str, launch: Launch) -> Any:
    """The kernel of a case, compiled for a target as the JIT would compile it."""
    constexprs: dict[str, Any] = {
        "RANK": case.rank,
        "SUBTRACT": case.rank == 0,
        "ADD": case.base,
        "PRECISION": case.precision,
        "RECIPES": launch.recipes,
        "COMBINE": "sum",
        "TILES": trims.TILES_A_PROGRAM,
        "EXACT": True,
        "EVERY": 4,
        "CHUNK": trims.CHUNK,
        "LIST": trims.list_length(4096 * 4096),
        "AREA": launch.block_m * launch.block_n,
        "IN_SHARED": trims.in_shared(_DTYPES[case.dtype]),
        "KEEPS_LAYOUT": trims.KEEPS_LAYOUT,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_R": launch.block_r,
        **dict.fromkeys(case.ones, 1),
    }
    if case.name in METHODS:
        kernel = merge._merge_deltas_kernel
        constexprs |= METHODS[case.name]
    else:
        kernel = getattr(_MODULES[case.name], f"_{case.name}_kernel")
        constexprs |= TIES
    if case.name == "terms":
        unused = ("top_value_ptr", "top_row_ptr", "top_column_ptr", "words_ptr", "factor_ptr")
        constexprs |= dict.fromkeys(unused)
    constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
    pointers = {**_POINTERS, "value_ptr": "*fp32"} if case.name == "terms" else _POINTERS
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, name in enumerate(kernel.arg_names):
        is_pointer = name.endswith("_ptr")
        signature[name] = pointers.get(name, f"*{case.dtype}") if is_pointer else "i32"
        if name in constexprs:
            signature[name] = "constexpr"
        elif case.aligned and (is_pointer or name.startswith("stride") or name in ("M", "N", "length")):
            attributes[i,] = [["tt.divisibility", 16]]
        if is_pointer and target_of(target).backend == "hip" and name not in constexprs:
            # As the JIT says of tensors of less than 2 GB: offsets fit 32 bits.
            attributes.setdefault((i,), []).append(["tt.pointer_range", 32])
    launch_options = OPTIONS if case.name in SMALL else launch.options
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=target_of(target), options=launch_options)
