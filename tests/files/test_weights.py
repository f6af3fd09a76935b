"""Weight files: read whole and in pieces, and damaged ones refused."""

import json
import os
import shutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_models import KEY, refused, saved, shard
from safetensors.torch import save_file

from merge_engine.errors import AdapterError
from merge_engine.files.safetensors_writer import tensor_bytes
from merge_engine.files.weights import StoredTensor, open_bin, open_safetensors


def test_a_truncated_file_at_every_kind_of_place(tmp_path):
    path = saved(tmp_path / "a", r=4) / "adapter_model.safetensors"
    whole = path.read_bytes()
    data = 8 + int.from_bytes(whole[:8], "little")
    for size in (0, 1, 7, 8, 9, data - 1, data, data + 1, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path.parent, match=rf"a: adapter_model.safetensors is truncated.*: {size} bytes")
    path.write_bytes(whole + b"x")
    refused(path.parent, match=rf"is damaged: {len(whole) + 1} bytes, wanted {len(whole)} from its header")


@pytest.mark.quick
@pytest.mark.parametrize(
    "header, match",
    [
        (b"{", "header of adapter_model.safetensors is damaged"),
        (b"[1]", "header of adapter_model.safetensors is damaged"),
        (b'{"x": 3}', "header of adapter_model.safetensors is damaged"),
        (b'{"x": {"dtype": "F32", "shape": [1]}}', "header of adapter_model.safetensors is damaged"),
        (b'{"x": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}}', "tensor x is F3, which cannot be read"),
        (b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', r"x has 4 bytes, wanted 8 for \[2\]"),
        (b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}', "is damaged"),
        (b'{"x": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}', "is damaged"),
        (b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "overlap or leave holes"),
        (
            b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
            b' "y": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
            "overlap or leave holes",
        ),
        (
            b'{"x": {"dtype": "F32", "shape": [9223372036854775808, 0], "data_offsets": [0, 0]}}',
            "a shape that torch has",
        ),
        (b'{"x": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 4]}}' % b",".join([b"1"] * 65), "that torch has"),
        (b'{"": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', "tensor '' is .*wanted a name"),
        (b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', r"is damaged \(UnicodeEncodeError"),
        ('{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'.encode("utf-16"), r"is damaged \(Unicode"),
    ],
)
def test_a_damaged_header(tmp_path, header, match):
    path = saved(tmp_path / "a", r=4) / "adapter_model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refused(path.parent, match=rf"^a: .*{match}")


@pytest.mark.parametrize("place", ["../a.safetensors", "/etc/a.safetensors", "..", "sub/a.safetensors", "", 3, None])
def test_an_index_that_leads_out_of_its_folder(tmp_path, place):
    path = saved(tmp_path / "a", r=4)
    shutil.copy(path / "adapter_model.safetensors", tmp_path / "a.safetensors")
    files = shard(path)
    files[f"{KEY}.lora_A.weight"] = place
    (path / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    refused(
        path, match=r"a: adapter_model.safetensors.index.json (names .*, wanted a file in the same folder|is damaged)"
    )


def test_an_index_that_disagrees_with_its_files(tmp_path):
    path = saved(tmp_path / "a", r=4)
    index = path / "adapter_model.safetensors.index.json"
    files = shard(path)
    index.write_text(json.dumps({"weight_map": {**files, "more": files[f"{KEY}.lora_A.weight"]}}))
    refused(path, match=r"a: adapter_model-0000\d-of-00003.safetensors lacks tensor more, which .*index.json lists")
    fewer = {key: file for key, file in files.items() if key != f"{KEY}.lora_A.weight"}
    index.write_text(json.dumps({"weight_map": fewer}))
    refused(path, match=rf"holds tensor {KEY}.lora_A.weight, which .*index.json does not list")
    index.write_text(json.dumps({"weight_map": files}))
    (path / files[f"{KEY}.lora_A.weight"]).unlink()
    refused(
        path, match=rf"a: {files[f'{KEY}.lora_A.weight']} is missing, wanted by adapter_model.safetensors.index.json"
    )
    index.write_text("{}")
    refused(path, match=r"index.json is damaged: wanted a weight_map")


class Surprise:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("content", [{"x": Surprise()}, b"", b"PK\x03\x04 not really", b"\x80\x02."])
def test_a_bin_file_that_is_damaged_or_runs_code(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "a", r=4, safe_serialization=False) / "adapter_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    refused(path.parent, match=r"a: adapter_model.bin is damaged or holds more than tensors")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")  # kinds of tensors that torch calls beta or old
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8), "quantized"),
        (lambda: torch.ones(2, 2, device="meta"), "a meta tensor, which has no values"),
        (lambda: torch.ones(2, 2).to_sparse(), "sparse"),
        (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "nested"),
        (lambda: torch.ones(2, 2).to(torch.float8_e4m3fnuz), "torch.float8_e4m3fnuz"),
        (lambda: torch.ones(2, 2, dtype=torch.complex128), "torch.complex128"),
        (lambda: torch.ones([1] * 65), r"of shape \[1, 1, 1, 1, 1, 1, \.\.\.\]"),
    ],
)
def test_a_bin_file_of_other_tensors(tmp_path, make, what):
    path = saved(tmp_path / "a", r=4, safe_serialization=False) / "adapter_model.bin"
    torch.save({**torch.load(path), "base_model.model.lm_head.weight": make()}, path)
    try:
        torch.load(path, weights_only=True)
    except Exception:
        what = "wanted a file for torch.load"  # some kinds are refused by torch
    refused(path.parent, match=rf"^a: .*{what}")


def test_values_that_are_conjugated_when_they_are_read(tmp_path):
    value = torch.tensor([[1 + 2j, 3 - 1j]], dtype=torch.complex64)
    torch.save({"x": value.conj()}, tmp_path / "x.bin")
    read = open_bin(tmp_path / "x.bin", "x")["x"].read()
    assert torch.equal(torch.view_as_real(read), torch.view_as_real(value.conj().resolve_conj()))


@pytest.mark.parametrize(
    "content, match", [([torch.ones(1)], "holds a list"), ({"x": 3}, "x in adapter_model.bin is a int")]
)
def test_a_bin_file_of_something_else(tmp_path, content, match):
    path = saved(tmp_path / "a", r=4, safe_serialization=False) / "adapter_model.bin"
    torch.save(content, path)
    refused(path.parent, match=match)


def test_a_truncated_bin_file(tmp_path):
    path = saved(tmp_path / "a", r=4, safe_serialization=False) / "adapter_model.bin"
    os.truncate(path, path.stat().st_size // 2)
    refused(path.parent, match=r"a: adapter_model.bin is damaged")


PIECED = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint16, torch.bool]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    shape=st.sampled_from([(), (0,), (0, 3), (3, 0), (1,), (7,), (3, 5), (16,), (4, 2, 4), (33,)]),
    dtype=st.sampled_from(PIECED),
    elements=st.sampled_from([1, 2, 7, 8, 16, 32, 100]),
    form=st.sampled_from(["safetensors", "bin"]),
)
def test_pieces_are_the_tensor_in_order(tmp_path_factory, shape, dtype, elements, form):
    """As long as asked for, all but the last, whatever holds them; of an empty tensor there are none."""
    folder = tmp_path_factory.mktemp("pieces")
    generator = torch.Generator().manual_seed(len(shape))
    tensor = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    tensor = tensor.fmod(2).bool()[..., 0] if dtype == torch.bool else tensor.view(dtype)[..., 0]
    tensors = {"before": torch.ones(3), "x": tensor.contiguous(), "y": torch.ones(5)}
    if form == "bin":
        torch.save(tensors, folder / "x.bin")
        stored = open_bin(folder / "x.bin", "it")["x"]
    else:
        save_file(tensors, folder / "x.safetensors")
        stored = open_safetensors(folder / "x.safetensors", "it")["x"]
    assert stored.read().shape == shape and stored.read().dtype == dtype
    places, got = [], []
    for piece in stored.pieces(elements):
        assert piece.ndim == 1 and piece.dtype == dtype
        places.append(piece.data_ptr())
        got.append(piece.clone())
    assert [len(piece) for piece in got] == [
        min(elements, tensor.numel() - i) for i in range(0, tensor.numel(), elements)
    ]
    want = tensor_bytes(tensor).tobytes()
    assert b"".join(tensor_bytes(piece).tobytes() for piece in got) == want == tensor_bytes(stored.read()).tobytes()
    assert form == "bin" or len(set(places)) <= 1, "each piece takes the place of the one before"


def test_a_tensor_in_huge_pages_is_read_whole(tmp_path):
    """From 8 MiB on memory comes from the system itself, for every dtype."""
    for dtype in (torch.float8_e5m2, torch.bfloat16, torch.bool, torch.complex64):
        bits = torch.arange((9 << 20) // dtype.itemsize * dtype.itemsize, dtype=torch.int32).to(torch.uint8)
        tensor = bits.fmod(2).bool() if dtype == torch.bool else bits.view(dtype)
        save_file({"x": tensor.reshape(4, -1)}, tmp_path / "x.safetensors")
        got = open_safetensors(tmp_path / "x.safetensors", "it")["x"].read()
        assert got.shape == (4, tensor.numel() // 4) and got.dtype == dtype and got.is_contiguous()
        assert torch.equal(got.view(torch.uint8), tensor.reshape(4, -1).view(torch.uint8))
        got.view(torch.uint8).zero_()  # it is the reader's own


@pytest.mark.quick
@pytest.mark.parametrize("forms", [("safetensors", "bin"), ("bin", "safetensors"), ("safetensors", "safetensors")])
def test_tensors_are_the_same_whatever_holds_them(tmp_path, forms):
    """Compared piece by piece: of one million elements each, so some differ in the last piece only."""
    long = torch.zeros((1 << 20) + 3, dtype=torch.int8)
    other, first = long.clone(), long.clone()
    other[-1] = first[0] = 1
    tensors = {"long": long, "last": other, "first": first, "none": torch.zeros(0, 3), "one": torch.tensor(2.0)}

    def opened(form):
        path = tmp_path / f"x.{form}"
        if form == "bin":
            torch.save(tensors, path)
            return open_bin(path, "it")
        save_file(tensors, path)
        return open_safetensors(path, "it")

    one, two = map(opened, forms)
    same = {(a, b) for a in tensors for b in tensors if one[a].same_as(two[b])}
    assert same == {(key, key) for key in tensors}
    assert one["long"].same_as(one["long"])


def test_a_mapped_tensor_is_the_one_that_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"small": torch.arange(5), "x": torch.randn(300, 257), "y": torch.randn(70000).bfloat16()}
    save_file(tensors, path)
    before, found = path.read_bytes(), open_safetensors(path, "it")
    for key, wanted in tensors.items():
        view = found[key].view()
        assert view.dtype == wanted.dtype and torch.equal(view, wanted)
        view.zero_()  # stays in memory
    assert path.read_bytes() == before
    last = max(found.values(), key=lambda stored: stored.offset)
    path.write_bytes(before[:-8])
    with pytest.raises(AdapterError, match=rf"x\.safetensors ends inside tensor {last.key}, 8 bytes short"):
        last.view()


def test_a_file_that_became_shorter_is_told_of_by_its_pieces(tmp_path):
    save_file({"x": torch.arange(100)}, tmp_path / "x.safetensors")
    stored = open_safetensors(tmp_path / "x.safetensors", "it")["x"]
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[: stored.offset + 8 * 45])
    pieces = stored.pieces(20)
    assert [next(pieces).tolist()[0], next(pieces).tolist()[-1]] == [0, 39]
    with pytest.raises(AdapterError, match=r"x\.safetensors ends inside tensor x, 120 bytes short"):
        next(pieces)
    (tmp_path / "x.safetensors").unlink()
    for read in (stored.read, lambda: next(stored.pieces())):
        with pytest.raises(AdapterError, match=r"x\.safetensors cannot be read: No such file or directory"):
            read()
    gone = StoredTensor("x", tmp_path / "x.safetensors", (0,), torch.float32)
    with pytest.raises(AdapterError, match="cannot be read"):
        list(gone.pieces())


def test_an_error_of_who_reads_pieces_stays_as_it_is(tmp_path):
    """A full disk while a piece is written is no fault of the file that is read."""
    save_file({"x": torch.arange(100)}, tmp_path / "x.safetensors")
    stored = open_safetensors(tmp_path / "x.safetensors", "it")["x"]
    with pytest.raises(OSError, match="No space left"):
        for _ in stored.pieces(20):
            raise OSError(28, "No space left on device")
