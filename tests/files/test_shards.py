"""Shards of a model, written in any order."""

import errno
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from xxhash import xxh3_128

from merge_engine.errors import OutputError
from merge_engine.files import shards
from merge_engine.files.safetensors_writer import tensor_bytes
from merge_engine.files.shards import ShardFiles, lay_out

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float16]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=12),
    st.integers(1, 300),
    st.randoms(use_true_random=False),
)
def test_shards_written_in_any_order_are_read_by_safetensors(tmp_path_factory, specs, shard_size, chance):
    folder = tmp_path_factory.mktemp("shards")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{i}": torch.randint(0, 2, shape, generator=generator).to(dtype) for i, (dtype, shape) in enumerate(specs)
    }
    layout = lay_out({key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}, shard_size)
    assert all(slot.offset % slot.dtype.itemsize == 0 for slot in layout.slots.values() if slot.nbytes)
    files = ShardFiles(folder, layout)
    files.create()
    order = list(tensors)
    chance.shuffle(order)
    for key in order:
        data, cut = tensor_bytes(tensors[key]), chance.randint(0, tensors[key].numel() * tensors[key].itemsize)
        files.write(layout.slots[key], cut, data[cut:])
        files.write(layout.slots[key], 0, data[:cut])
    files.close()
    found = {}
    for name in layout.headers:
        shard = load_file(folder / name)
        assert len(shard) == 1 or sum(t.numel() * t.itemsize for t in shard.values()) <= shard_size
        assert (folder / name).stat().st_size == layout.sizes[name]
        found |= shard
    assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("where", [0, 6, 7, 20])
def test_a_change_in_any_block_of_a_tensor_changes_its_hash(tmp_path, monkeypatch, where):
    monkeypatch.setattr(shards, "_BLOCK", 7)
    layout = lay_out({"first": (torch.uint8, (5,)), "second": (torch.uint8, (21,))}, 1000)
    files = ShardFiles(tmp_path, layout)
    files.create()
    data = bytearray(range(21))
    files.write(layout.slots["second"], 0, memoryview(data))
    assert files.digest(layout.slots["second"]) == xxh3_128(data).hexdigest()
    data[where] ^= 1
    files.write(layout.slots["second"], where, memoryview(data)[where : where + 1])
    assert files.digest(layout.slots["second"]) == xxh3_128(data).hexdigest()
    files.close()


def test_what_was_written_goes_to_the_disk_before_the_end(tmp_path, monkeypatch):
    """A flush that fails there fails the merge: the last sync, of another descriptor, would not see it again."""
    monkeypatch.setattr(shards, "AHEAD", 8)
    layout = lay_out({"x": (torch.uint8, (21,))}, 1000)
    flushed: list[int] = []
    monkeypatch.setattr(shards, "_flush", flushed.append)
    files = ShardFiles(tmp_path, layout)
    files.create()  # its header is longer than that
    files.write(layout.slots["x"], 0, memoryview(bytes(7)))
    files.close()
    assert len(flushed) == 1

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shards, "_flush", fail)
    files = ShardFiles(tmp_path, layout)
    files.write(layout.slots["x"], 0, memoryview(bytes(8)))
    with pytest.raises(OutputError, match="safetensors cannot be written: Input"):
        files.close()
    files = ShardFiles(tmp_path, layout)
    files.write(layout.slots["x"], 0, memoryview(bytes(8)))
    while not files._sent.done():
        time.sleep(0.01)
    with pytest.raises(OutputError, match="safetensors cannot be written: Input"):
        files.write(layout.slots["x"], 8, memoryview(bytes(8)))
