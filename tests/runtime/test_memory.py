"""Memory of large tensors: its pages, and that it is lent to one tensor at a time; and sizes as text."""

import mmap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_engine.errors import RecipeError
from merge_engine.runtime import memory as runtime_memory
from merge_engine.runtime.memory import HUGE, KEPT, new_tensor, parse_size, size_text

needs_huge_pages = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="large tensors are torch's own here")
LARGE = HUGE // 4  # elements of float32


@pytest.fixture(autouse=True)
def nothing_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_memory, "_free", [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_shape_and_dtype(dtype: torch.dtype) -> None:
    for shape in ((3, 5), (2, HUGE // dtype.itemsize // 2), (4, 3, HUGE // dtype.itemsize // 8), ()):
        tensor = new_tensor(shape, dtype)
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
        assert bool((tensor.fill_(7) == 7).all())


@pytest.mark.quick
@needs_huge_pages
def test_memory_goes_from_a_tensor_that_is_gone_to_the_next() -> None:
    first = new_tensor((LARGE,))
    place = first.data_ptr()
    second = new_tensor((LARGE,))
    assert second.data_ptr() != place
    del first
    assert new_tensor((2, LARGE), torch.bfloat16).data_ptr() == place


@needs_huge_pages
def test_a_view_holds_the_memory() -> None:
    tensor = new_tensor((LARGE,)).fill_(1)
    view = tensor.view(2, -1)[1].numpy()[5:]
    del tensor
    other = new_tensor((LARGE,)).fill_(2)
    assert (view == 1).all()
    del view
    assert not {new_tensor((LARGE,)).data_ptr()} & {other.data_ptr()}


@needs_huge_pages
def test_the_smallest_that_is_large_enough_is_taken() -> None:
    sizes = [LARGE, 3 * LARGE, 2 * LARGE]
    tensors = [new_tensor((size,)) for size in sizes]
    places = [tensor.data_ptr() for tensor in tensors]
    tensors.clear()
    assert new_tensor((LARGE + 1,)).data_ptr() == places[2]
    assert sorted(map(len, runtime_memory._free)) == sorted(4 * size for size in sizes)
    assert new_tensor((3 * LARGE,)).data_ptr() == places[1]


@needs_huge_pages
def test_where_none_can_be_taken_the_oldest_make_room() -> None:
    """Of memory that is all more than twice as large."""
    tensors = [new_tensor((size,)) for size in (5 * LARGE, 3 * LARGE)]
    del tensors[0], tensors[0]  # one after the other
    small = new_tensor((LARGE,))
    assert [len(each) for each in runtime_memory._free] == [12 * LARGE] and len(small) == LARGE


@needs_huge_pages
def test_the_largest_that_is_too_small_is_made_larger() -> None:
    tensors = [new_tensor((size,)).fill_(size) for size in (LARGE, 3 * LARGE, 2 * LARGE)]
    tensors.clear()
    large = new_tensor((4 * LARGE,))
    assert (large[: 3 * LARGE] == 3 * LARGE).all() and (large[3 * LARGE :] == 0).all()  # as it was, and new
    assert sorted(map(len, runtime_memory._free)) == [4 * LARGE, 8 * LARGE]
    del large
    assert sorted(map(len, runtime_memory._free)) == [4 * LARGE, 8 * LARGE, 16 * LARGE]


@needs_huge_pages
def test_what_another_thread_is_about_to_let_go_of_is_given_up() -> None:
    tensors = [new_tensor((size,)) for size in (LARGE, 2 * LARGE)]
    tensors.clear()
    held = [memoryview(memory) for memory in runtime_memory._free]  # as an array that has not quite gone holds it
    assert len(new_tensor((4 * LARGE,)).fill_(1)) == 4 * LARGE and len(held) == 2
    assert [len(each) for each in runtime_memory._free] == [16 * LARGE]


@needs_huge_pages
def test_what_is_more_than_twice_as_large_is_not_lent() -> None:
    large = new_tensor((3 * LARGE,))
    place = large.data_ptr()
    del large
    small = new_tensor((LARGE,))
    assert runtime_memory._free == [] and small.data_ptr() != place  # a small one that lives long would hold all of it


@needs_huge_pages
def test_no_more_than_so_much_is_kept() -> None:
    half = KEPT // 2 // 4
    tensors = [new_tensor((size,)) for size in (half, LARGE, half)]
    place = tensors[1].data_ptr()
    for _ in range(3):
        tensors.pop(0)
    assert [len(each) for each in runtime_memory._free] == [4 * LARGE, 4 * half]  # the oldest is given up
    assert new_tensor((LARGE,)).data_ptr() == place
    too_large = new_tensor((KEPT // 4 + 1,))
    del too_large
    assert runtime_memory._free == []


@needs_huge_pages
def test_threads_do_not_get_the_same() -> None:
    def work(number: int) -> bool:
        for turn in range(40):
            tensor = new_tensor((LARGE,))
            tensor[:: LARGE // 64] = number * 100 + turn
            if not (tensor[:: LARGE // 64] == number * 100 + turn).all():
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


@pytest.mark.quick
@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), (7, 7), ("12", 12), ("3B", 3)])
def test_sizes(text, size):
    assert parse_size(text, "memory") == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 apples", "0", None, "1e3"])
def test_no_sizes(text):
    with pytest.raises(RecipeError, match=r"^shard_size: wanted a size such as 5GB or 200MB, got "):
        parse_size(text, "shard_size")


@pytest.mark.parametrize(
    ("nbytes", "down", "up"),
    [
        (0, "0 bytes", "0 bytes"),
        (999, "999 bytes", "999 bytes"),
        (1000, "1.00 KB", "1.00 KB"),
        (2_099_001, "2.09 MB", "2.10 MB"),
        (5 * 10**9, "5.00 GB", "5.00 GB"),
        (10**18, "1000000.00 TB", "1000000.00 TB"),
    ],
)
def test_sizes_as_text_are_in_the_unit_that_fits(nbytes, down, up):
    assert (size_text(nbytes), size_text(nbytes, up=True)) == (down, up)


@given(st.integers(1, 10**13), st.integers(1, 10**9))
def test_a_size_that_is_larger_reads_as_larger(nbytes, more):
    """parse_size reads both, up to the rounding; and what is needed is never said to be what is free."""
    needs, free = size_text(nbytes + more, up=True), size_text(nbytes)
    assert needs != free
    if "bytes" not in free:
        assert parse_size(free, "free") <= nbytes < nbytes + more <= parse_size(needs, "needs")
