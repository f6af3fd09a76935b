"""Thresholds by the kernels against the textbook: exactly k elements stay, the first of equal magnitudes."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_groups import FLOATS, U32, exact, group, seen, source_of
from merge_engine.kernels.merge import merge_deltas
from merge_engine.kernels.select import l1_factors, model_trims
from merge_engine.kernels.source import Dense, Drop, Source, Trim
from merge_engine.kernels.trims import trims
from torch import Tensor

from merge_engine.cpu import merge as cpu_merge
from merge_engine.cpu import select as cpu_select
from merge_engine.cpu.keep import Drop as TileDrop
from merge_engine.cpu.source import Product
from merge_engine.rules import reference
from merge_engine.rules.rule import make_rule


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
        (of_model,) = model_trims([source], torch.full((1, 1), k))
        assert_trimmed(source, of_model, k)


@pytest.mark.quick
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


@settings(max_examples=2)
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
