"""The safetensors writer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from merge_engine.errors import OutputError
from merge_engine.files.dtypes import STORED_DTYPES
from merge_engine.files.safetensors_writer import SafetensorsWriter


def sample(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bits, so that a byte out of place shows; some are NaN, so compare bits."""
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return bits.view(dtype).reshape(shape)


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", STORED_DTYPES.values(), ids=list(STORED_DTYPES))
def test_every_dtype_comes_back_bit_for_bit(tmp_path, dtype):
    tensors = {"a": sample(dtype, 3, 5), "scalar": sample(dtype, 1)[0], "empty": torch.empty(0, 4, dtype=dtype)}
    with SafetensorsWriter(tmp_path / "x.safetensors", tensors) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(same(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.quick
def test_shapes_and_order_need_not_be_known(tmp_path):
    tensors = {f'layer.{i}.é"\\': torch.randn(i % 7 + 1, 3) for i in range(50)}
    with SafetensorsWriter(tmp_path / "x.safetensors", tensors) as writer:
        for name in reversed(tensors):
            writer.add(name, tensors[name])
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(torch.equal(file.get_tensor(name), tensors[name]) for name in tensors)


def test_rows_are_written_in_order_whatever_the_strides(tmp_path):
    base = torch.randn(6, 8)
    views = {"t": base.T, "step": base[::2, 1::3], "grad": base.clone().requires_grad_()}
    with SafetensorsWriter(tmp_path / "x.safetensors", views) as writer:
        for name, view in views.items():
            writer.add(name, view)
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], views[name]) for name in views)


@settings(max_examples=50)
@given(st.dictionaries(st.text(min_size=1).filter(lambda name: name != "__metadata__"), st.integers(0, 8), max_size=20))
def test_the_room_for_the_header_is_enough_and_the_data_aligned(tmp_path_factory, dimensions):
    path = tmp_path_factory.mktemp("header") / "x.safetensors"
    with SafetensorsWriter(path, dimensions) as writer:
        for name, count in dimensions.items():
            writer.add(name, torch.empty([0, *[99] * 7][:count], dtype=torch.float8_e4m3fn))
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == sorted(dimensions)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_no_tensors_at_all(tmp_path):
    SafetensorsWriter(tmp_path / "x.safetensors", []).close()
    assert load_file(tmp_path / "x.safetensors") == {}


def test_a_shorter_file_is_left_where_a_longer_one_was(tmp_path):
    save_file({"old": torch.randn(1000)}, tmp_path / "x.safetensors")
    with SafetensorsWriter(tmp_path / "x.safetensors", ["new"]) as writer:
        writer.add("new", torch.ones(2))
    assert load_file(tmp_path / "x.safetensors").keys() == {"new"}


def test_names_are_held_to_the_plan(tmp_path):
    writer = SafetensorsWriter(tmp_path / "x.safetensors", ["a", "b"])
    writer.add("a", torch.ones(2))
    with pytest.raises(ValueError, match=r"x\.safetensors: tensor c was not planned"):
        writer.add("c", torch.ones(2))
    with pytest.raises(ValueError, match=r"x\.safetensors: tensor a was added twice"):
        writer.add("a", torch.ones(2))
    with pytest.raises(ValueError, match=r"x\.safetensors: 1 planned tensors never came: b"):
        writer.close()
    with pytest.raises(ValueError, match=r"tensor b is torch\.complex128, which safetensors does not have"):
        writer.add("b", torch.ones(2, dtype=torch.complex128))
    writer.abandon()
    with pytest.raises(ValueError, match="never came"), SafetensorsWriter(tmp_path / "x.safetensors", ["a"]):
        pass


def test_an_unfinished_file_is_not_taken_for_a_whole_one(tmp_path):
    with pytest.raises(KeyError), SafetensorsWriter(tmp_path / "x.safetensors", ["a", "b"]) as writer:
        writer.add("a", torch.ones(100_000))
        raise KeyError
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "x.safetensors")


def test_a_full_disk_is_one_clear_error(tmp_path):
    (tmp_path / "x.safetensors").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"x\.safetensors cannot be written: No space left on device"):
        SafetensorsWriter(tmp_path / "x.safetensors", ["a"])


def test_a_missing_folder_is_one_clear_error(tmp_path):
    with pytest.raises(OutputError, match=r"x\.safetensors cannot be written: No such file or directory"):
        SafetensorsWriter(tmp_path / "nowhere" / "x.safetensors", ["a"])
