"""The fused pass: product -> keep -> elect -> combine (-> + base), with one store per output element."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .source import Keep, Source, check_tensor, launch_of, on_device, task_arguments, tiles_of
from .task_tile import TERMS, WEIGHT, float_term, kept, task_tile, tile_place
from .terms import keep_name, terms_of

# What the loop over adapters costs, and what was tried: SASS instructions per adapter and element for ties, bfloat16,
# rank 16, on sm_90 (`python -m bench.report --only static`; nothing was run).
#   15    with five accumulators (a first draft)
#   11.0  with the two counts packed in one integer and added by selects
#   8.1   with the sign shifted in and a predicated add
#   7.5   now, with |S| + sum |w t| in place of two one-sided sums
# Two sides by sign predicates take 14, by min and max with predicated adds 9 to 10. A table of divisors gained nothing
# (its pointers go through shared memory), num_stages = 2 cost 1.3, and 64 elements per thread spilled 200 bytes. A cut
# as one column limit per row took 5.4 in the tiles that hold the cut, now 3.3. With weighted votes a band takes 9.8,
# the largest 8.1, and each of the two loops of a consensus about 9.

# WEIGH says when weights are applied: "never" (equal weights are one factor at the end), "before" the vote, or "after"
# it. Where the vote is the weighted sum S up to a positive factor, the elected side is (|S| + sum |w t|) / 2: two sums
# and no cancellation. Elsewhere the sums of the two sides and the vote are three sums.


# What a recipe has beside its terms: float32 words.
NUMBERS: tl.constexpr = tl.constexpr(4)
SCALE: tl.constexpr = tl.constexpr(0)
TIED: tl.constexpr = tl.constexpr(1)  # the side (+1, -1) that a vote of 0 elects
MASK: tl.constexpr = tl.constexpr(2)  # of a consensus, and how many have to pass it
LEAST: tl.constexpr = tl.constexpr(3)

LARGEST_NEGATIVE: tl.constexpr = tl.constexpr(-(2**31) + 1)  # the bits of -2**-149


@triton.jit
def _enter(
    ledger,
    t,
    keep,
    weight,
    ELECT: tl.constexpr,
    COMBINE: tl.constexpr,
    WEIGH: tl.constexpr,
    DIVISOR: tl.constexpr,
):
    """The ledger with one adapter's tile t entered where `keep`.

    ledger: (vote, plus, minus, plus_share, minus_share, counts); only the tiles in use cost registers. counts is 65536
    for each kept element, and 1 more for each negative one. Every add is predicated, so no zero is selected first.
    """
    vote, plus, minus, plus_share, minus_share, counts = ledger
    if WEIGH == "before":
        t *= weight
        keep &= t != 0.0  # a weight of 0, or underflow
    if ELECT == "none":
        vote = tl.where(keep, vote + t, vote)
    else:
        if ELECT == "total":
            vote = tl.where(keep, vote + t, vote)
        if COMBINE == "max":
            plus = tl.where(keep, tl.maximum(t, plus), plus)
            minus = tl.where(keep, tl.minimum(t, minus), minus)
        elif (ELECT == "total") & (WEIGH != "after"):
            plus = tl.where(keep, plus + tl.abs(t), plus)
        else:
            factor = weight if WEIGH == "after" else 1.0
            plus = tl.where(keep, tl.fma(tl.maximum(t, 0.0), factor, plus), plus)
            minus = tl.where(keep, tl.fma(tl.minimum(t, 0.0), factor, minus), minus)
        if DIVISOR == "weight":
            plus_share = tl.where(keep & (t > 0.0), plus_share + weight, plus_share)
            minus_share = tl.where(keep & (t < 0.0), minus_share + weight, minus_share)
        if (DIVISOR == "count") | (ELECT == "frequency"):
            negative = (t.to(tl.uint32, bitcast=True) >> 31).to(tl.int32)
            counts = tl.where(keep, counts + 65536 + negative, counts)
    return vote, plus, minus, plus_share, minus_share, counts


@triton.jit
def divided_by_count(x, n):
    """x / n rounded once, for whole numbers 0 < n < 2**15, where the quotient is a normal number.

    `/` is x times an approximate reciprocal on NVIDIA: for n = 3 a third of all float32 are off by one unit. Here the
    estimate q is off by a few units, so that its residue x - n q, a small multiple of one, is exact; and what is added
    to q brings it within 2**-18 of a unit of x / n, which is never within 1 / (2 n) of where rounding turns. What is
    infinite becomes NaN. `tl.div_rn` gives the same for all n, at ten instructions more.
    """
    root = tl.rsqrt(n)
    inverse = root * root
    quotient = x * inverse
    return tl.fma(tl.fma(-n, quotient, x), inverse, quotient)


@triton.jit
def _vote(ledger, ELECT: tl.constexpr):
    vote, _, _, _, _, counts = ledger
    return (counts >> 16) - 2 * (counts & 65535) if ELECT == "frequency" else vote


@triton.jit
def _combined(
    ledger,
    tied,
    scale,
    ELECT: tl.constexpr,
    COMBINE: tl.constexpr,
    WEIGH: tl.constexpr,
    DIVISOR: tl.constexpr,
):
    """scale * the elected side / divisor."""
    vote, plus, minus, plus_share, minus_share, counts = ledger
    if ELECT == "none":
        return vote * scale
    else:
        # One comparison: a vote of 0 is above the largest negative number, and not above 0.
        if ELECT == "frequency":
            positive = _vote(ledger, ELECT) > tl.where(tied > 0, -1, 0)
        else:
            positive = vote > tl.where(tied > 0, LARGEST_NEGATIVE, 0).to(tl.float32, bitcast=True)
        if (COMBINE == "sum") & (ELECT == "total") & (WEIGH != "after"):
            twice = tl.abs(vote) + plus
            merged = tl.where(positive, twice, -twice) * (0.5 * scale)
        else:
            merged = tl.where(positive, plus, minus) * scale
        if DIVISOR == "count":
            # The upper half of counts is that of all, the lower that of the negative: take it off, or take it.
            negatives = counts << 16
            agreeing = tl.where(positive, counts - negatives, negatives) >> 16
            merged = divided_by_count(merged, tl.maximum(agreeing, 1).to(tl.float32))
        elif DIVISOR == "weight":
            share = tl.where(positive, plus_share, minus_share)
            merged = tl.div_rn(merged, tl.where(share == 0.0, 1.0, share))
        return merged


@triton.jit
def _tally(
    task,
    terms_ptr,
    first,
    place,
    RECIPES: tl.constexpr,
    KEEP: tl.constexpr,
    ELECT: tl.constexpr,
    COMBINE: tl.constexpr,
    WEIGH: tl.constexpr,
    DIVISOR: tl.constexpr,
    RANK: tl.constexpr,
    SUBTRACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The ledgers of RECIPES recipes from `first` on, with all adapters' tiles entered: one product serves all."""
    _, _, _, _, _, _, modules, adapters, _, _ = task
    module, _, _ = place
    zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    empty = (zero, zero, zero, zero, zero, tl.zeros([BLOCK_M, BLOCK_N], tl.int32))
    ledgers = ()
    for _ in tl.static_range(RECIPES):
        ledgers = ledgers + (empty,)  # noqa: RUF005 (Triton has no star)
    for number in range(adapters):
        adapter = tl.cast(number, tl.int64)  # a name of its own: before Triton 3.6 a loop could not change a type
        product = task_tile(task, place, adapter, RANK, SUBTRACT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R)
        entered = ()
        for recipe in tl.static_range(RECIPES):
            terms = terms_ptr + (((first + recipe) * modules + module) * adapters + adapter) * TERMS
            t, keep = kept(product, terms, place, KEEP, BLOCK_M, BLOCK_N)
            weight = float_term(terms, WEIGHT)
            entered = entered + (_enter(ledgers[recipe], t, keep, weight, ELECT, COMBINE, WEIGH, DIVISOR),)  # noqa: RUF005
        ledgers = entered
    return ledgers


@triton.jit
def _passing(
    task,
    terms_ptr,
    numbers_ptr,
    first,
    place,
    ledgers,
    RECIPES: tl.constexpr,
    KEEP: tl.constexpr,
    WEIGH: tl.constexpr,
    RANK: tl.constexpr,
    SUBTRACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """How many adapters have |t| > mask |S - t|, S being the sum in the ledger, for each of RECIPES recipes.

    The sum has to be known first: products are made a second time.
    """
    _, _, _, _, _, _, modules, adapters, _, _ = task
    module, _, _ = place
    counts = ()
    for _ in tl.static_range(RECIPES):
        counts = counts + (tl.zeros([BLOCK_M, BLOCK_N], tl.float32),)  # noqa: RUF005
    for number in range(adapters):
        adapter = tl.cast(number, tl.int64)
        product = task_tile(task, place, adapter, RANK, SUBTRACT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R)
        counted = ()
        for recipe in tl.static_range(RECIPES):
            terms = terms_ptr + (((first + recipe) * modules + module) * adapters + adapter) * TERMS
            t, keep = kept(product, terms, place, KEEP, BLOCK_M, BLOCK_N)
            if WEIGH == "before":
                t *= float_term(terms, WEIGHT)
            rest = tl.abs(ledgers[recipe][0] - t) * tl.load(numbers_ptr + (first + recipe) * NUMBERS + MASK)
            passes = keep & (tl.abs(t) > rest)
            counted = counted + (tl.where(passes, counts[recipe] + 1.0, counts[recipe]),)  # noqa: RUF005
        counts = counted
    return counts


@triton.jit
def _merge_place(modules, M, N, RECIPES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first recipe, place) of this program: programs are numbered by tiles, then modules, then recipes."""
    slab, row, column = tile_place(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    return slab // modules * RECIPES, (slab % modules, row, column)


@triton.jit(do_not_specialize=["modules", "adapters"])
def _merge_deltas_kernel(
    out_ptr,  # [recipes, modules, M, N], contiguous: float32, float16 or bfloat16
    base_ptr,  # [modules, M, N], contiguous, of any of these dtypes: added if ADD
    x_ptr,  # B [modules, adapters, M, RANK], or dense task tensors [modules, adapters, M, N]
    stride_xm,
    stride_xa,
    stride_xr,
    a_ptr,  # A [modules, adapters, RANK, N], contiguous
    minus_ptr,  # [modules, M, N], contiguous: taken off dense task tensors if SUBTRACT
    terms_ptr,  # int32 [recipes, modules, adapters, TERMS], see tile.py
    numbers_ptr,  # float32 [recipes, NUMBERS]
    modules,
    adapters,
    M,
    N,
    ADD: tl.constexpr,
    RECIPES: tl.constexpr,  # how many a program carries, a divisor of their number
    KEEP: tl.constexpr,  # "all", "magnitude", "band", "bernoulli"
    ELECT: tl.constexpr,  # "none", "total", "frequency"
    COMBINE: tl.constexpr,  # "sum", "max", "consensus"
    WEIGH: tl.constexpr,  # "never", "before", "after" the vote
    DIVISOR: tl.constexpr,  # "one", "count", "weight"
    RANK: tl.constexpr,  # 0: dense
    SUBTRACT: tl.constexpr,
    PRECISION: tl.constexpr,  # of tl.dot on float32 factors: "ieee", "tf32x3", "tf32"
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out = base + scale * combine(elect(keep(t))): one program for each tile of a module."""
    tl.static_assert((COMBINE == "sum") | (COMBINE == "max") | (COMBINE == "consensus"), "no such combine")
    task = (x_ptr, stride_xm, stride_xa, stride_xr, a_ptr, minus_ptr, modules, adapters, M, N)
    first, place = _merge_place(modules, M, N, RECIPES, BLOCK_M, BLOCK_N)
    ledgers = _tally(
        task,
        terms_ptr,
        first,
        place,
        RECIPES,
        KEEP,
        ELECT,
        COMBINE,
        WEIGH,
        DIVISOR,
        RANK,
        SUBTRACT,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_R,
    )
    if COMBINE == "consensus":
        passing = _passing(
            task,
            terms_ptr,
            numbers_ptr,
            first,
            place,
            ledgers,
            RECIPES,
            KEEP,
            WEIGH,
            RANK,
            SUBTRACT,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_R,
        )
    module, row, column = place
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask = (row + offs_m < M)[:, None] & (column + offs_n < N)[None, :]
    offs = offs_m[:, None] * N + offs_n[None, :]
    for recipe in tl.static_range(RECIPES):
        numbers = numbers_ptr + (first + recipe) * NUMBERS
        tied, scale = tl.load(numbers + TIED), tl.load(numbers + SCALE)
        merged = _combined(ledgers[recipe], tied, scale, ELECT, COMBINE, WEIGH, DIVISOR)
        if COMBINE == "consensus":
            merged = tl.where(passing[recipe] >= tl.load(numbers + LEAST), merged, 0.0)
        if ADD:
            merged += tl.load(base_ptr + (module * M + row) * N + column + offs, mask=mask, other=0.0).to(tl.float32)
        out_ptrs = out_ptr + (((first + recipe) * modules + module) * M + row) * N + column + offs
        # Apart and together again: else Triton stores on AMD from the layout of the matrix unit, four elements a lane.
        left, right = tl.split(merged.to(out_ptr.dtype.element_ty).reshape(BLOCK_M, BLOCK_N // 2, 2))
        tl.store(out_ptrs, tl.join(left, right).reshape(BLOCK_M, BLOCK_N), mask=mask)


@triton.jit(do_not_specialize=["modules", "adapters"])
def _vote_balance_kernel(
    balance_ptr,  # int64 [recipes]: added to
    x_ptr,  # this and the following as in _merge_deltas_kernel
    stride_xm,
    stride_xa,
    stride_xr,
    a_ptr,
    minus_ptr,
    terms_ptr,
    modules,
    adapters,
    M,
    N,
    RECIPES: tl.constexpr,
    KEEP: tl.constexpr,
    ELECT: tl.constexpr,
    WEIGH: tl.constexpr,
    RANK: tl.constexpr,
    SUBTRACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """balance += votes for + less votes for -: integers, so that no order of adding matters. Outside, votes are 0."""
    task = (x_ptr, stride_xm, stride_xa, stride_xr, a_ptr, minus_ptr, modules, adapters, M, N)
    first, place = _merge_place(modules, M, N, RECIPES, BLOCK_M, BLOCK_N)
    ledgers = _tally(
        task,
        terms_ptr,
        first,
        place,
        RECIPES,
        KEEP,
        ELECT,
        "sum",
        WEIGH,
        "one",
        RANK,
        SUBTRACT,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_R,
    )
    for recipe in tl.static_range(RECIPES):
        vote = _vote(ledgers[recipe], ELECT)
        signs = tl.where(vote > 0, 1, 0) - tl.where(vote < 0, 1, 0)
        tl.atomic_add(balance_ptr + first + recipe, tl.sum(tl.sum(signs, axis=1), axis=0).to(tl.int64), sem="relaxed")


def merge_deltas(
    source: Source,
    weights: Sequence[Sequence[float]],
    keep: Keep = None,
    *,
    elect: str = "none",
    combine: str = "sum",
    divisor: str = "one",
    vote_weighted: bool = False,
    mask: float | Sequence[float] = 0.0,
    min_tasks: int | Sequence[int] = 0,
    scale: float | Sequence[float] = 1.0,
    tied: int | Sequence[int] = 1,
    base: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    precision: str = "ieee",
    launch: Launch | None = None,
) -> Tensor:
    """out[recipe, module] = base + scale * combine(w_i t_i where sign(t_i) is elected): [recipes, modules, M, N].

    source: the task tensors t_i of a group (`Lora` or `Dense`).
    weights: [recipes][adapters], on the host: where they are all equal, a cheaper kernel is used.
    keep: None, `Trim`, `Band` or `Drop`, with a row for each recipe.
    elect: "none", "total" (sign of the sum), "frequency" (sign of the sum of signs).
    combine: the "sum" of the elected side; its element of largest magnitude, "max", by a weighted vote; or "consensus",
        without a vote: the sum S where at least min_tasks of the i have |w_i t_i| > mask |S - w_i t_i|, else 0.
    divisor: "one", "count" of the agreeing, or "weight", the sum of their weights (1 where that is 0).
    vote_weighted: the election sees w t instead of t.
    scale, tied, mask, min_tasks: one for all recipes, or one each; tied is the side (+1, -1) that a vote of 0 elects.
    base: [modules, M, N] to add to, contiguous; it decides the dtype of a new out.
    out: [recipes, modules, M, N], contiguous, to write into; by default a new tensor of `dtype`.
    precision: "ieee", "tf32x3" or "tf32": how float32 factors are multiplied. Others are multiplied exactly.
    launch: None for `launch_for`; must be that of the selection.
    All arithmetic is float32, rounded once to out's dtype at the store. Raises ValueError for what does not fit.
    """
    modules, _, rows, columns = source.shape
    recipes, device = len(weights), source.x.device
    scales = [float(each) for each in _each("scale", scale, recipes)]
    sides = _each("tied", tied, recipes)
    _one_of("divisor", divisor, "one", "count", "weight")
    _one_of("combine", combine, "sum", "max", "consensus")
    if combine == "max" and (elect == "none" or not vote_weighted):
        raise ValueError(f"elect is {elect!r}, weighted: {vote_weighted}; wanted a weighted vote for the largest")
    if combine == "consensus" and elect != "none":
        raise ValueError(f"elect is {elect!r}, wanted 'none' for a consensus")
    if combine != "sum" and divisor != "one":
        raise ValueError(f"divisor is {divisor!r}, wanted 'one' with {combine!r}")
    limits = list(zip(_each("mask", mask, recipes), _each("min_tasks", min_tasks, recipes), strict=True))
    if elect == "none" and divisor != "one":
        raise ValueError(f"divisor is {divisor!r}, wanted 'one' without an election")
    if not set(sides) <= {1, -1}:
        raise ValueError(f"tied is {tied}, wanted +1 or -1")
    if base is not None:
        check_tensor("base", base, (modules, rows, columns), device)
        dtype = base.dtype
    if out is None:
        out = torch.empty(recipes, modules, rows, columns, dtype=dtype, device=device)
    check_tensor("out", out, (recipes, modules, rows, columns), device)
    launch = launch or launch_of(source, recipes=recipes, keep=keep, twice=combine == "consensus")
    weigh = _weigh(source, weights, elect, vote_weighted)
    if weigh == "never":
        # Equal weights are one factor at the end, which a divisor by weight cancels.
        if divisor == "weight":
            divisor = "count"
        else:
            scales = [each * row[0] for each, row in zip(scales, weights, strict=True)]
    numbers = [word for row in zip(scales, sides, limits, strict=True) for word in (*row[:2], *row[2])]
    arguments = _arguments(source, weights, keep, elect, weigh, precision, launch, numbers)
    programs = _programs(source, recipes, launch)
    if programs:
        with torch.cuda.device_of(out):
            _merge_deltas_kernel[(programs,)](
                out_ptr=out,
                base_ptr=out if base is None else base,
                ADD=base is not None,
                COMBINE=combine,
                DIVISOR=divisor,
                **arguments,
            )
    return out


def vote_balance(
    source: Source,
    weights: Sequence[Sequence[float]],
    keep: Keep = None,
    *,
    elect: str,
    vote_weighted: bool = False,
    out: Tensor | None = None,
    precision: str = "ieee",
    launch: Launch | None = None,
) -> Tensor:
    """The number of elements that vote +, less those that vote -, over all modules: int64 [recipes], added to `out`.

    Its sign over all groups of a model is the model's majority sign. Arguments as in `merge_deltas`.
    """
    recipes = len(weights)
    _one_of("elect", elect, "total", "frequency")
    if out is None:
        out = torch.zeros(recipes, dtype=torch.int64, device=source.x.device)
    check_tensor("out", out, (recipes,), source.x.device, (torch.int64,))
    launch = launch or launch_of(source, recipes=recipes, keep=keep)
    weigh = _weigh(source, weights, elect, vote_weighted)
    arguments = _arguments(source, weights, keep, elect, weigh, precision, launch, [])
    del arguments["numbers_ptr"]
    programs = _programs(source, recipes, launch)
    if programs:
        with torch.cuda.device_of(out):
            _vote_balance_kernel[(programs,)](balance_ptr=out, **arguments)
    return out


def _weigh(source: Source, weights: Sequence[Sequence[float]], elect: str, vote_weighted: bool) -> str:
    """When weights are applied, see WEIGH above."""
    adapters = source.shape[1]
    _one_of("elect", elect, "none", "total", "frequency")
    if not weights or any(len(row) != adapters for row in weights):
        raise ValueError(f"weights hold {[len(row) for row in weights]} numbers a recipe, wanted {adapters}")
    if adapters >= 1 << 15:
        raise ValueError(f"got {adapters} adapters, wanted fewer than {1 << 15}: counts are 16 bits wide")
    found = {weighing(row, elect, vote_weighted) for row in weights}
    return found.pop() if len(found) == 1 else (found - {"never"}).pop()


def weighing(weights: Sequence[float], elect: str, vote_weighted: bool) -> str:
    """When one recipe applies its weights, see WEIGH above: recipes of which this differs have other bits together."""
    if len(set(weights)) == 1 and (weights[0] > 0 or elect == "none"):
        return "never"
    return "before" if vote_weighted or elect == "none" else "after"


def _arguments(
    source: Source,
    weights: Sequence[Sequence[float]],
    keep: Keep,
    elect: str,
    weigh: str,
    precision: str,
    launch: Launch,
    numbers: list[float],
) -> dict[str, Any]:
    """The arguments of both kernels. All that the host knows goes to the device as one tensor."""
    words = [*numbers, *(weight for row in weights for weight in row)]
    table = on_device(torch.tensor(words, dtype=torch.float32), source.x.device)
    return {
        "numbers_ptr": table,
        "terms_ptr": terms_of(source, keep, table[len(numbers) :]),
        "KEEP": keep_name(keep),
        "ELECT": elect,
        "WEIGH": weigh,
        "RECIPES": launch.recipes,
        **task_arguments(source, precision, launch),
    }


def _programs(source: Source, recipes: int, launch: Launch) -> int:
    if recipes % launch.recipes:
        raise ValueError(f"the launch carries {launch.recipes} recipes a program, wanted a divisor of {recipes}")
    return recipes // launch.recipes * source.shape[0] * tiles_of(source, launch)


def _each(name: str, value: Any, recipes: int) -> list[Any]:
    values = list(value) if isinstance(value, Sequence) else [value] * recipes
    if len(values) != recipes:
        raise ValueError(f"{name} has {len(values)} numbers, wanted one, or one for each of {recipes} recipes")
    return values


def _one_of(name: str, value: str, *known: str) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}, wanted one of {', '.join(known)}")
