"""What a GPU has to show that no interpreter can, at production shapes; each check also runs small, interpreted."""

import pytest
import torch
from kernel_groups import group
from merge_engine.kernels.merge import merge_deltas
from merge_engine.kernels.source import Drop, Lora
from merge_engine.kernels.trims import trims

from bench.first_contact import checks
from merge_engine.cpu.mask import keep_mask
from merge_engine.engine.copies import StreamCopies

SHAPES = [
    pytest.param((48, 64), id="small"),
    pytest.param((4096, 4096), id="4096 x 4096", marks=pytest.mark.gpu),
    pytest.param((4096, 11008), id="4096 x 11008", marks=pytest.mark.gpu),
]
DTYPES = [torch.bfloat16, torch.float32]


def made(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Lora, torch.Tensor]:
    source = group(shape, ranks=(16, 16), dtype=dtype, modules=2, device=device)
    return source, torch.full((1, 2, 2), shape[0] * shape[1] // 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_merge_keeps_as_many_as_the_search_found(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    """Both see the same bits: else a count is off by those at the threshold."""
    source, kept = made(shape, dtype, device)
    found = trims(source, kept)
    for adapter in range(2):
        weights = [float(i == adapter) for i in range(2)]
        merged = merge_deltas(source, [weights], found)[0]
        assert (merged != 0).flatten(1).sum(1).tolist() == [int(kept[0, 0, 0])] * 2


@pytest.mark.parametrize("shape", SHAPES)
def test_repeated_runs_give_equal_bits(shape: tuple[int, int], device: torch.device) -> None:
    source, kept = made(shape, torch.bfloat16, device)
    how = {"elect": "total", "divisor": "count"}
    first = merge_deltas(source, [[1.0, 1.0]], trims(source, kept), **how)
    for _ in range(2):
        assert torch.equal(merge_deltas(source, [[1.0, 1.0]], trims(source, kept), **how), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_recipes_together_have_the_bits_of_each(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    """Two recipes of float32 factors share a program, and have smaller tiles than one."""
    source, kept = made(shape, dtype, device)
    weights, numbers = [[1.0, 0.5], [0.25, 1.0]], [kept, kept // 2]
    how = {"elect": "total", "divisor": "count"}
    together = merge_deltas(source, weights, trims(source, torch.cat(numbers)), **how)
    for recipe, (own, number) in enumerate(zip(weights, numbers, strict=True)):
        alone = merge_deltas(source, [own], trims(source, number), **how)
        assert torch.equal(together[recipe], alone[0])


@pytest.mark.gpu
def test_a_stream_of_the_callers(device: torch.device) -> None:
    """What is launched on another stream is the same, while the default one is busy."""
    source, kept = made((4096, 4096), torch.bfloat16, device)
    want = merge_deltas(source, [[1.0, 1.0]], trims(source, kept))
    stream = torch.cuda.Stream(device)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        got = merge_deltas(source, [[1.0, 1.0]], trims(source, kept))
    stream.synchronize()
    assert torch.equal(got, want)


@pytest.mark.gpu
def test_masks_of_the_host_and_the_device(device: torch.device) -> None:
    size = 4096
    source, _ = made((size, size), torch.bfloat16, device)
    drop = Drop(torch.full((1, 2, 2), 0.3, dtype=torch.float64), [11], torch.tensor([5, 6]), torch.arange(2))
    merged = merge_deltas(source, [[1.0, 0.0]], drop)[0].cpu()
    whole = merge_deltas(source, [[1.0, 0.0]])[0].cpu()
    for module in range(2):
        mask = keep_mask(0.3, seed=11, stream=5 + module, adapter=0, rows=range(size), columns=range(size))
        assert torch.equal(merged[module] != 0, mask & (whole[module] != 0))


@pytest.mark.gpu
def test_two_devices_give_equal_bits(device: torch.device) -> None:
    """While the first is the current one."""
    try:
        checks.two_devices(checks.Place(device, (4096, 4096)))
    except checks.Skipped as reason:
        pytest.skip(str(reason))


@pytest.mark.gpu
def test_out_of_memory_halves_the_group(device: torch.device) -> None:
    """Really out of memory, with all that a failed attempt leaves behind."""
    assert "out of memory with 8 modules" in checks.out_of_memory_halves(checks.Place(device, (4096, 4096)))


@pytest.mark.gpu
def test_copies_wait_for_what_they_copy(device: torch.device) -> None:
    """To the device, by a product that takes a while, and back, each way on a stream of its own."""
    copies = StreamCopies(device)
    x = torch.randint(-4, 5, (2048, 2048)).float()  # whole numbers: products are exact
    late = []
    for i in range(8):
        (there,) = copies.up([copies.staged(x + i)])
        late.append(copies.down(there @ there))
    for i, arrived in enumerate(late):
        assert torch.equal(arrived(), (x + i) @ (x + i))
