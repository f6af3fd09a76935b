"""The kernels against the textbook, in the interpreter here and compiled where there is a GPU.

Two things are checked apart, since a trim is not continuous. What is kept is checked to the bit, on the task tensors
that the kernels themselves see; these, and what is made of what is kept, against float64 within derived bounds.
"""

import importlib.util
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from merge_engine.kernels.merge import merge_deltas, vote_balance
from merge_engine.kernels.select import l1_factors, model_trims, trims
from merge_engine.kernels.source import Dense, Drop, Keep, Lora, Source, Trim, pack
from torch import Tensor

from merge_engine.cpu import merge as cpu_merge
from merge_engine.cpu import select as cpu_select
from merge_engine.cpu.keep import Drop as TileDrop
from merge_engine.cpu.mask import keep_mask
from merge_engine.cpu.source import Product
from merge_engine.rules import reference
from merge_engine.rules.philox import stream_id
from merge_engine.rules.rule import Rule, make_rule

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
U32 = 2.0**-24
U_OUT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
WEIGHTS = [1.0, -0.5, 0.75]
DENSITY = 0.4
SEED = 0x123456789ABCDEF0

CASES = [
    ("linear", "total"),
    ("magnitude_prune", "total"),
    ("ties", "total"),
    ("ties", "frequency"),
    ("dare_linear", "total"),
    ("dare_ties", "total"),
    ("dare_ties", "frequency"),
]


def group(
    shape: tuple[int, int] = (37, 70),
    *,
    ranks: Sequence[int] = (8, 8, 8),
    modules: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Lora:
    """A group of random adapters with entries about 1."""
    generator = torch.Generator().manual_seed(7)
    rows, columns = shape

    def factor(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    pairs = [[(factor(rank, columns), factor(rows, rank)) for rank in ranks] for _ in range(modules)]
    scaling = [[0.5 + 0.3 * i for i in range(len(ranks))] for _ in range(modules)]
    return pack(pairs, scaling, device=device)


def source_of(kind: str, dtype: torch.dtype, device: torch.device) -> Source:
    """The three things a rule merges: deltas, finetuned - base, and factors (here those named A, as they lie)."""
    lora = group(dtype=dtype, device=device)
    if kind == "lora":
        return lora
    if kind == "factors":
        return Dense(lora.A[:, :, :8])
    x = seen(lora).to(dtype)
    return Dense(x, x.mean(1) / 2)


def seen(source: Source) -> Tensor:
    """The task tensors to the bit as a kernel sees them: float32 [modules, adapters, M, N]."""
    adapters = source.shape[1]
    one_hot = [[float(i == j) for j in range(adapters)] for i in range(adapters)]
    # Adding zeros to a number, or multiplying it by 1, changes nothing: only -0 may become +0.
    return merge_deltas(source, one_hot).transpose(0, 1).contiguous()


def exact(source: Source) -> tuple[Tensor, Tensor]:
    """The task tensors in float64, and a bound on the error of what a kernel sees."""
    if isinstance(source, Lora):
        A, B, scaling = source.A.double(), source.B.double(), source.scaling.double()[..., None, None]
        steps = source.rank + 2  # products, sums and the scaling
        return scaling * (B @ A), steps * U32 * scaling.abs() * (B.abs() @ A.abs())
    x = source.x.double()
    if source.base is None:
        return x, torch.zeros_like(x)
    t = x - source.base.double()[:, None]
    return t, U32 * t.abs()


def keep_of(rule: Rule, source: Source, device: torch.device, density: float = DENSITY) -> Keep:
    modules, adapters, rows, columns = source.shape
    if rule.keep == "magnitude":
        kept = torch.full((1, modules, adapters), rule.kept(density, rows * columns))
        return trims(source, kept, ties=rule.trim_ties)
    if rule.keep == "bernoulli":
        streams = torch.tensor([stream_id(f"layers.{i}", "delta") for i in range(modules)])
        densities = torch.full((1, modules, adapters), density, dtype=torch.float64)
        drop = Drop(densities, [SEED], streams, torch.arange(adapters))
        return replace(drop, factor=l1_factors(source, drop)) if rule.l1_rescale else drop
    return None


def kept_tensors(rule: Rule, source: Source, keep: Keep) -> Tensor:
    """keep(t) in float64, by the textbook, of the task tensors as a kernel sees them: [modules, adapters, M, N]."""
    tensors = seen(source).cpu()
    modules, adapters, rows, columns = source.shape
    kept = torch.empty(tensors.shape, dtype=torch.float64)
    for module in range(modules):
        for adapter in range(adapters):
            t = tensors[module, adapter]
            if isinstance(keep, Trim):
                kept[module, adapter] = reference.trim(t, rule.kept(DENSITY, t.numel()), rule.trim_ties).double()
            elif isinstance(keep, Drop):
                mask = mask_of(keep, module, adapter, rows, columns)
                kept[module, adapter] = reference.drop_and_rescale(t.double(), mask, DENSITY, rule.l1_rescale)
            else:
                kept[module, adapter] = t.double()
    return kept


def mask_of(drop: Drop, module: int, adapter: int, rows: int, columns: int, recipe: int = 0) -> Tensor:
    return keep_mask(
        float(drop.density[recipe, module, adapter]),
        seed=drop.seeds[recipe],
        stream=int(drop.streams[module]),
        adapter=int(drop.adapters[adapter]),
        rows=range(rows),
        columns=range(columns),
    )


def check(
    out: Tensor, kept: Tensor, weights: Sequence[float], rule: Rule, *, scale: float = 1.0, base: Tensor | None = None
) -> None:
    """out [modules, M, N] against the textbook on float64, within what float32 sums of these terms may be off by.

    A vote that rounding may turn is not checked; a vote that is 0 because nothing was kept is.
    """
    n = kept.shape[1]
    w = torch.tensor(weights, dtype=torch.float64)[:, None, None]
    for module in range(len(kept)):
        tensors = kept[module]
        want = reference.combine(list(tensors), list(weights), rule)
        sizes = (w * tensors).abs()
        # Each of n weighted terms is rounded in the rescale, the weighting and at most n sums; then halving is exact,
        # a division (2 units in Triton), the scale and the base are rounded.
        spread = sizes.sum(0)
        divisor = torch.ones_like(spread)
        if rule.divisor == "weight":
            elected = reference.vote(list(tensors), list(weights), rule).sign()
            elected[elected == 0] = 1
            divisor = ((w * tensors).sign() == elected).mul(w).sum(0).abs()
            divisor[divisor == 0] = 1
            spread = spread * (1 + n * w.abs().sum() / divisor)
        bound = (n + 8) * U32 * spread / divisor * abs(scale)
        want = scale * want
        if base is not None:
            want = want + base[module].cpu().double()
            bound = bound + U32 * want.abs()
        bound = bound + U_OUT[out.dtype] * want.abs() + SMALLEST[out.dtype]
        sure = torch.ones_like(want, dtype=torch.bool)
        if rule.elect != "none":
            votes = reference.vote(list(tensors), list(weights), rule)
            ballots = sizes if rule.vote_weighted else tensors.abs()
            doubt = torch.zeros_like(votes) if rule.elect == "frequency" else (n + 2) * U32 * ballots.sum(0)
            sure = (votes.abs() > doubt) | (ballots.sum(0) == 0) | (doubt == 0)
        assert sure.float().mean() > 0.99
        got = out[module].cpu().double()
        wrong = ~((got - want).abs() <= bound) & sure  # NaN, an element that was not written, is wrong
        assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()}, worst {(got - want)[wrong].abs().max()}"


def merge_by(
    rule: Rule, source: Source, weights: Sequence[float], keep: Keep, dtype: torch.dtype, **options: object
) -> Tensor:
    """[modules, M, N], every element of which was NaN."""
    modules, _, rows, columns = source.shape
    out = torch.full((1, modules, rows, columns), torch.nan, dtype=dtype, device=source.x.device)
    merge_deltas(
        source,
        [list(weights)],
        keep,
        elect=rule.elect,
        divisor=rule.divisor,
        vote_weighted=rule.vote_weighted,
        out=out,
        **options,  # type: ignore[arg-type]
    )
    return out[0]


@pytest.mark.parametrize("kind", ["lora", "dense", "factors"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("convention", ["peft", "mergekit", "paper"])
@pytest.mark.parametrize(("method", "election"), CASES)
def test_merge_equals_the_textbook(
    method: str, election: str, convention: str, dtype: torch.dtype, kind: str, device: torch.device
) -> None:
    rule = make_rule(method, election=election, convention=convention, scope="tensor")
    source = source_of(kind, dtype, device)
    keep = keep_of(rule, source, device)
    out = merge_by(rule, source, WEIGHTS, keep, dtype, scale=0.7)
    check(out, kept_tensors(rule, source, keep), WEIGHTS, rule, scale=0.7)


SHAPES = [(1, 1), (1, 67), (67, 1), (61, 53), (64, 64), (65, 130), (0, 5), (5, 0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_shapes(shape: tuple[int, int], method: str, device: torch.device) -> None:
    rule = make_rule(method)
    source = group(shape, device=device)
    keep = keep_of(rule, source, device)
    out = merge_by(rule, source, WEIGHTS, keep, torch.float32)
    assert out.shape == (1, *shape)
    if out.numel():
        check(out, kept_tensors(rule, source, keep), WEIGHTS, rule)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("ranks", [(1,), (4, 17, 64), (128, 80)], ids=str)
def test_ranks(ranks: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    source = group((33, 47), ranks=ranks, dtype=dtype, device=device)
    want, bound = exact(source)
    assert bool(((seen(source).double() - want).abs() <= bound).all())


def test_adapters_of_many_numbers(device: torch.device) -> None:
    rule = make_rule("ties", election="frequency")
    weights = [(-1) ** i * (0.1 + i) for i in range(33)]
    source = group((17, 19), ranks=[4] * 33, device=device)
    keep = keep_of(rule, source, device)
    out = merge_by(rule, source, weights, keep, torch.float32)
    check(out, kept_tensors(rule, source, keep), weights, rule)


@pytest.mark.parametrize("weights", [[1.0] * 3, [0.3] * 3, [-2.0] * 3, [0.0, 1.0, 2.0]], ids=str)
@pytest.mark.parametrize("convention", ["peft", "mergekit"])
@pytest.mark.parametrize("election", ["total", "frequency"])
def test_equal_negative_and_zero_weights(
    election: str, convention: str, weights: list[float], device: torch.device
) -> None:
    rule = make_rule("ties", election=election, convention=convention)
    source = group(device=device)
    keep = keep_of(rule, source, device)
    check(merge_by(rule, source, weights, keep, torch.float32), kept_tensors(rule, source, keep), weights, rule)


@pytest.mark.parametrize("tied", [1, -1])
def test_a_tied_vote_elects_the_side_it_is_told_to(tied: int, device: torch.device) -> None:
    x = torch.tensor([0.3, -0.3]).view(1, 2, 1, 1).expand(1, 2, 3, 5).contiguous().to(device)
    for election in ("total", "frequency"):
        rule = make_rule("ties", election=election)
        out = merge_by(rule, Dense(x), [1.0, 1.0], None, torch.float32, tied=tied)
        assert bool((out == tied * x[0, 0, 0, 0]).all())


@pytest.mark.parametrize("scaling", [1.0, 0.3])
def test_opposite_deltas_tie(scaling: float, device: torch.device) -> None:
    """A fused multiply-add would leave the rounding of a product, whose sign is noise, where the vote is 0."""
    lora = group(ranks=(8, 8), device=device)
    lora = Lora(
        lora.A[:, :1].repeat(1, 2, 1, 1),
        lora.B[:, :1] * torch.tensor([1.0, -1.0]).to(device)[:, None, None],
        torch.full((1, 2), scaling, device=device),
    )
    out = merge_by(make_rule("ties"), lora, [1.0, 1.0], None, torch.float32)
    assert torch.equal(out, seen(lora)[:, 0].abs())


@pytest.mark.parametrize("density", [0.0, 0.001, 0.37, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["lora", "dense"])
def test_exactly_k_stay(kind: str, density: float, device: torch.device) -> None:
    source = source_of(kind, torch.bfloat16, device)
    modules, adapters, rows, columns = source.shape
    k = int(density * rows * columns)
    trim = trims(source, torch.full((1, modules, adapters), k))
    assert_trimmed(source, trim, k)


def assert_trimmed(source: Source, trim: Trim, k: int) -> None:
    """The kernel keeps what the textbook keeps of the same bits, and its thresholds say the same."""
    tensors = seen(source)
    for adapter in range(source.shape[1]):
        weights = [float(i == adapter) for i in range(source.shape[1])]
        got = merge_deltas(source, [weights], trim)[0]
        for module in range(len(tensors)):
            t = tensors[module, adapter].cpu()
            want = reference.trim(t, k, "exact")
            assert torch.equal(got[module].cpu(), want)
            value, row, column = (field[0, module, adapter].cpu() for field in (trim.value, trim.row, trim.column))
            place = torch.arange(t.numel()).view_as(t)
            kept = (t.abs() > value) | ((t.abs() == value) & (place < row * t.shape[1] + column))
            assert int(kept.sum()) == k


@pytest.mark.parametrize("k", [0, 1, 200, 2000, 4321, 141 * 70 - 5, 141 * 70])
def test_equal_magnitudes_stay_by_lowest_place(k: int, device: torch.device) -> None:
    """Small integers: nearly every magnitude is tied, over several tiles and in rows that tiles share."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-2, 3, (1, 2, 141, 70), generator=generator).float().to(device)
    source = Dense(x)
    assert_trimmed(source, trims(source, torch.full((1, 1, 2), k)), k)


def test_every_range_of_magnitudes(device: torch.device) -> None:
    """Thresholds in both open-ended coarse bins, at zero, and among denormals."""
    generator = torch.Generator().manual_seed(4)
    exponents = torch.tensor([-149, -126, -60, -31, -30, 0, 1, 2, 3, 90]).repeat_interleave(120).view(1, 1, 20, 60)
    x = torch.randn(1, 1, 20, 60, generator=generator).clamp(-3, 3) * torch.exp2(exponents.double())
    x = x.float()
    x[0, 0, 3] = 0
    source = Dense(x.to(device))
    for k in (1, 60, 130, 300, 500, 700, 1000, 1130, 1199):
        assert_trimmed(source, trims(source, torch.full((1, 1, 1), k)), k)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kept_sets_are_those_of_the_torch_backend(dtype: torch.dtype, device: torch.device) -> None:
    """Up to elements whose magnitude is within rounding of the threshold."""
    source = group((61, 83), dtype=dtype, device=device)
    _, adapters, rows, columns = source.shape
    k = int(0.2 * rows * columns)
    trim = trims(source, torch.full((1, 1, adapters), k))
    want, bound = exact(source)
    for i in range(adapters):
        product = Product(source.A[0, i].cpu(), source.B[0, i].cpu(), float(source.scaling[0, i]))
        ours = merge_deltas(source, [[float(i == j) for j in range(adapters)]], trim)[0, 0].cpu() != 0
        theirs = (
            cpu_merge.merge_deltas([product], [1.0], cpu_select.trims([product], k, "exact"), make_rule("linear")) != 0
        )
        assert int(ours.sum()) == int(theirs.sum()) == k
        near = (want[0, i].abs() - float(trim.value[0, 0, i])).abs() <= 2 * bound[0, i]
        assert bool((ours == theirs)[~near.cpu()].all())


@pytest.mark.parametrize("ties", ["exact", "keep"])
def test_model_scope_is_one_threshold_over_groups(ties: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(5)
    shapes, order = [(2, 3, 19, 70), (1, 3, 33, 9)], [2, 0, 1]
    tensors = [torch.randint(-3, 4, shape, generator=generator).float() for shape in shapes]
    kept = torch.tensor([[500, 1500, 2900], [0, 1, 19 * 70 * 2 + 33 * 9]])
    sources = [Dense(x.to(device)) for x in tensors]
    groups = model_trims(sources, kept, ties=ties, order=order)
    flat = [tensors[0][0], tensors[0][1], tensors[1][0]]
    in_order = [flat[order.index(place)] for place in range(3)]
    for recipe in range(2):
        for adapter in range(3):
            whole = torch.cat([x[adapter].flatten() for x in in_order])
            want = reference.trim(whole, int(kept[recipe, adapter]), ties)
            weights = [[float(i == adapter) for i in range(3)]] * 2
            got = [merge_deltas(s, weights, t)[recipe].cpu() for s, t in zip(sources, groups, strict=True)]
            pieces = [got[0][0], got[0][1], got[1][0]]
            assert torch.equal(torch.cat([pieces[order.index(place)].flatten() for place in range(3)]), want)


class Meeting:
    """Processes that count together, as threads of which one runs at a time: the interpreter bears no two."""

    def __init__(self, world: int) -> None:
        self.world, self.turn = world, threading.Condition()
        self.counts: list[Tensor] = []
        self.sums: list[Tensor] = []

    def total(self, counts: Tensor) -> Tensor:
        turn = len(self.sums)
        self.counts.append(counts.cpu())  # a process without a module counts there
        if len(self.counts) == self.world:
            self.sums.append(torch.stack(self.counts).sum(0))
            self.counts = []
            self.turn.notify_all()
        assert self.turn.wait_for(lambda: len(self.sums) > turn, timeout=60), "not every process counts"
        return self.sums[turn].to(counts.device)

    def run(self, work: Callable[[int], dict[int, Trim]]) -> dict[int, Trim]:
        """What work(rank) of every rank makes, together."""

        def in_turn(rank: int) -> dict[int, Trim]:
            with self.turn:
                return work(rank)

        with ThreadPoolExecutor(self.world) as pool:
            return {name: trim for found in pool.map(in_turn, range(self.world)) for name, trim in found.items()}


@settings(max_examples=5)
@given(
    world=st.integers(2, 3),
    owners=st.lists(st.integers(0, 2), min_size=5, max_size=5),
    order=st.permutations(range(5)),
    densities=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
    ties=st.sampled_from(["exact", "keep"]),
)
@example(world=3, owners=[0, 2, 2, 0, 0], order=[3, 1, 4, 0, 2], densities=(0.0, 1.0, 0.5), ties="exact")
@example(world=2, owners=[0, 1, 1, 0, 1], order=[4, 0, 3, 1, 2], densities=(0.3, 0.1, 0.9), ties="exact")
@example(world=3, owners=[2, 1, 0, 1, 2], order=[4, 3, 2, 1, 0], densities=(0.0, 0.5, 1.0), ties="keep")
def test_thresholds_of_several_processes_are_those_of_one(
    world: int, owners: list[int], order: list[int], densities: tuple[float, ...], ties: str, device: torch.device
) -> None:
    """Modules of two shapes, one without the last adapter; whole numbers, so that ties lie in several modules.

    A process may have no module: so the second one in the first example.
    """
    generator = torch.Generator().manual_seed(sum(owners))
    shapes = [(3, 3, 41)] * 3 + [(2, 7, 9)] * 2
    modules = [torch.randint(-2, 3, shape, generator=generator).float() for shape in shapes]
    numels = [sum(t[0].numel() for t in modules if adapter < len(t)) for adapter in range(3)]
    kept = torch.tensor([[int(density * n) for density, n in zip(densities, numels, strict=True)]])

    def work(mine: Sequence[int], **shared: Callable[[Tensor], Tensor]) -> dict[int, Trim]:
        groups = [group for shape in set(shapes) if (group := [i for i in mine if shapes[i] == shape])]
        trims = model_trims(
            [Dense(torch.stack([modules[i] for i in group]).to(device)) for group in groups],
            kept,
            ties=ties,
            adapters=[range(len(modules[group[0]])) for group in groups],
            order=[order[i] for group in groups for i in group],
            modules=5,
            **shared,
        )
        return {
            module: Trim(*(field[0, i].cpu() for field in (trim.value, trim.row, trim.column)))
            for group, trim in zip(groups, trims, strict=True)
            for i, module in enumerate(group)
        }

    alone, meeting = work(range(5)), Meeting(world)
    together = meeting.run(lambda rank: work([i for i in range(5) if owners[i] % world == rank], total=meeting.total))
    for adapter, k in enumerate(kept[0].tolist()):
        having = sorted((i for i in range(5) if adapter < len(modules[i])), key=lambda i: order[i])
        whole = reference.trim(torch.cat([modules[i][adapter].flatten() for i in having]), k, ties)
        for i, want in zip(having, whole.split([modules[i][adapter].numel() for i in having]), strict=True):
            t = modules[i][adapter]
            for trim in (alone[i], together[i]):
                value, row, column = (field[adapter] for field in (trim.value, trim.row, trim.column))
                before = torch.arange(t.numel()).view_as(t) < row * t.shape[1] + column
                assert torch.equal(t * ((t.abs() > value) | ((t.abs() == value) & before)), want.view_as(t))
            assert alone[i].value[adapter] == together[i].value[adapter]


@pytest.mark.parametrize("density", [1e-12, 0.1, 0.5, 1.0])
def test_masks_are_those_of_the_host(density: float, device: torch.device) -> None:
    source = Dense(torch.ones(2, 3, 7, 133, device=device))
    drop = Drop(
        torch.full((2, 2, 3), density, dtype=torch.float64),
        [SEED, 2**64 - 1],
        torch.tensor([0, 2**32 - 1]),
        torch.tensor([2**31, 5, 0]),
        factor=torch.ones(2, 2, 3),
    )
    for adapter in range(3):
        out = merge_deltas(source, [[float(i == adapter) for i in range(3)]] * 2, drop)
        for recipe in range(2):
            for module in range(2):
                mask = mask_of(drop, module, adapter, 7, 133, recipe)
                assert torch.equal(out[recipe, module].cpu(), mask.float())


def test_l1_factors_are_those_of_the_torch_backend(device: torch.device) -> None:
    source = group((61, 83), ranks=(8, 8), device=device)
    source.B[0, 1] = 0
    drop = Drop(
        torch.tensor([[[0.3, 0.3]], [[1.0, 0.5]]], dtype=torch.float64), [1, 2], torch.tensor([9]), torch.arange(2)
    )
    factors = l1_factors(source, drop).cpu()
    for recipe in range(2):
        for i in range(2):
            product = Product(source.A[0, i].cpu(), source.B[0, i].cpu(), float(source.scaling[0, i]))
            want = cpu_merge.l1_factor(product, TileDrop(float(drop.density[recipe, 0, i]), drop.seeds[recipe], 9, i))
            # Sums of at most 61 * 83 positive terms in float32, however they associate, and the products' rounding.
            assert float(factors[recipe, 0, i]) == pytest.approx(want, rel=61 * 83 * U32)


def test_several_recipes_are_what_each_is_alone(device: torch.device) -> None:
    source = group(modules=2, device=device)
    kept = torch.tensor([300, 1000, 2000])[:, None, None].expand(3, 2, 3)
    trim = trims(source, kept)
    weights = [[1.0, 1.0, 1.0], [0.2, -0.4, 1.0], [2.0, 2.0, 2.0]]
    scale, tied = [1.0, 0.5, 2.0], [1, -1, 1]
    together = merge_deltas(source, weights, trim, elect="total", divisor="count", scale=scale, tied=tied)
    for i in range(3):
        alone = Trim(trim.value[i : i + 1], trim.row[i : i + 1], trim.column[i : i + 1])
        # Not bit for bit: weights that are equal in every recipe take another road. Unequal ones are made so.
        out = merge_deltas(source, [weights[i]], alone, elect="total", divisor="count", scale=scale[i], tied=tied[i])
        torch.testing.assert_close(together[i], out[0], rtol=16 * U32, atol=16 * U32)
        assert torch.equal(trims(source, kept[i : i + 1]).value, alone.value)


def test_an_untrained_adapter_changes_nothing(device: torch.device) -> None:
    """B starts at 0: whatever its A and its weight, it neither votes nor counts, in its place between the others."""
    lora = group(device=device)
    pairs = [(lora.A[0, i, :8].cpu(), lora.B[0, i, :, :8].cpu()) for i in range(3)]
    scaling = lora.scaling[0].tolist()
    untrained = (torch.randn(8, 70, generator=torch.Generator().manual_seed(1)), torch.zeros(37, 8))
    without = pack([pairs], [scaling], device=device)
    among = pack([[pairs[0], untrained, *pairs[1:]]], [[scaling[0], 1.0, *scaling[1:]]], device=device)
    for election, convention in (("total", "peft"), ("frequency", "peft"), ("total", "mergekit")):
        rule = make_rule("ties", election=election, convention=convention)
        want = merge_by(rule, without, WEIGHTS, keep_of(rule, without, device), torch.float32)
        weights = [WEIGHTS[0], 9.0, *WEIGHTS[1:]]
        assert torch.equal(merge_by(rule, among, weights, keep_of(rule, among, device), torch.float32), want)


def test_padding_changes_no_bit(device: torch.device) -> None:
    alone = group(ranks=(8,), device=device)
    A, B = alone.A[0, 0, :8], alone.B[0, 0, :, :8]
    wide = pack([[(A, B), (torch.ones(30, 70), torch.ones(37, 30))]], [[0.5, 1.0]], device=device)
    assert wide.rank == 32
    assert torch.equal(seen(wide)[0, 0], seen(alone)[0, 0])


def test_all_zero_factors_give_zeros(device: torch.device) -> None:
    lora = group(device=device)
    lora.B.zero_()
    for method in ("ties", "dare_ties"):
        rule = make_rule(method)
        out = merge_by(rule, lora, WEIGHTS, keep_of(rule, lora, device), torch.float32)
        assert bool((out == 0).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_base_is_added_in_the_same_pass(method: str, dtype: torch.dtype, device: torch.device) -> None:
    rule = make_rule(method)
    source = group(modules=2, device=device)
    keep = keep_of(rule, source, device)
    base = torch.randn(2, 37, 70, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    out = merge_by(rule, source, WEIGHTS, keep, dtype, base=base, scale=0.3)
    check(out, kept_tensors(rule, source, keep), WEIGHTS, rule, scale=0.3, base=base)


def test_tensors_that_are_not_contiguous(device: torch.device) -> None:
    lora = group(device=device)
    pairs = [(lora.A[0, i, :8].T.contiguous().T, lora.B[0, i, :, :8].T.contiguous().T) for i in range(3)]
    packed = pack([pairs], [lora.scaling[0].tolist()])
    assert torch.equal(packed.A, lora.A) and torch.equal(packed.B, lora.B)
    tensors = torch.randn(3, 2, 9, 40, device=device)[:, :, ::2, 3:30].transpose(0, 1)
    assert torch.equal(seen(Dense(tensors)), tensors)


@pytest.mark.parametrize("election", ["total", "frequency"])
@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_vote_balance(method: str, election: str, device: torch.device) -> None:
    rule = make_rule(method, election=election, convention="paper", scope="tensor")
    source = group(modules=2, device=device)
    keep = keep_of(rule, source, device)
    kept = kept_tensors(rule, source, keep)
    want = sum(int(reference.vote(list(t.float()), WEIGHTS, rule).sign().sum()) for t in kept)
    total = torch.full((1,), 1000, device=device)
    vote_balance(source, [WEIGHTS], keep, elect=election, out=total)
    assert int(total) == want + 1000


def test_errors_say_what_was_wanted(device: torch.device) -> None:
    lora = group(device=device)
    with pytest.raises(ValueError, match="multiple of 16"):
        Lora(lora.A[:, :, :8].contiguous(), lora.B[..., :8].contiguous(), lora.scaling)
    with pytest.raises(ValueError, match="scaling is"):
        Lora(lora.A, lora.B, lora.scaling[:, :2])
    with pytest.raises(ValueError, match="wanted 1 in the last dimension"):
        Dense(lora.A.transpose(2, 3))
    with pytest.raises(ValueError, match=r"wanted \[r, 70\]"):
        pack([[(torch.ones(4, 70), torch.ones(37, 5))]], [[1.0]])
    with pytest.raises(ValueError, match="at least one"):
        pack([[]], [[]])
    with pytest.raises(ValueError, match="elect is 'most'"):
        merge_deltas(lora, [WEIGHTS], elect="most")
    with pytest.raises(ValueError, match="without an election"):
        merge_deltas(lora, [WEIGHTS], divisor="count")
    with pytest.raises(ValueError, match="wanted 3"):
        merge_deltas(lora, [[1.0, 1.0]])
    with pytest.raises(ValueError, match=r"out is \[1, 1, 2, 2\]"):
        merge_deltas(lora, [WEIGHTS], out=torch.empty(1, 1, 2, 2, device=device))
    with pytest.raises(ValueError, match="density <= 1"):
        drop = Drop(torch.zeros(1, 1, 3, dtype=torch.float64), [0], torch.tensor([0]), torch.arange(3))
        merge_deltas(lora, [WEIGHTS], drop)
    with pytest.raises(ValueError, match=r"order is \[1\], wanted 1 different numbers below 1"):
        model_trims([lora], torch.ones(1, 3, dtype=torch.int64), order=[1])


def test_kernels_is_not_a_top_level_package() -> None:
    """transformers probes for Hugging Face's package of that name."""
    found = importlib.util.find_spec("kernels")
    assert found is None or "merge" not in str(found.submodule_search_locations)
