"""Full models on disk: what is read, what is refused, and how shards are laid out."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_files import save_factors
from safetensors.torch import load_file, save_file

import merge_engine
from merge_engine.errors import AdapterError, MergeError, ModelError, RecipeError
from merge_engine.files.safetensors_writer import tensor_bytes
from merge_engine.files.shards import ShardFiles, lay_out
from merge_engine.files.weights import StoredTensor, open_bin, open_safetensors
from merge_engine.formats.checkpoint import open_checkpoint
from merge_engine.runtime.memory import parse_size

KEYS = ("model.layers.0.q_proj.weight", "lm_head.weight")


def save_model(folder, name="model.safetensors", save=save_file):
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    save({key: torch.randn(6, 4, generator=generator) for key in KEYS}, folder / name)
    (folder / "config.json").write_text('{"vocab_size": 6, "tie_word_embeddings": false}')
    return folder


def save_adapter(folder):
    return save_factors(folder, {"model.layers.0.q_proj": (torch.ones(2, 4), torch.ones(6, 2))})


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


FILES = {
    "the header is longer than the file": (raw({}, length=10**9), "is truncated or damaged"),
    "the header is longer than any memory": (raw({}, length=2**63), "is truncated or damaged"),
    "offsets overlap": (
        raw({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, bytes(6)),
        "tensors overlap or leave holes",
    ),
    "a key twice": (
        raw(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
            bytes(2),
        ),
        "names a twice",
    ),
    "a billion elements": (raw({"a": entry([10**9], 0, 4 * 10**9)}, bytes(8)), "is truncated: "),
    "a billion elements in no bytes": (
        raw({"a": entry([10**9, 10**9], 0, 4)}, bytes(4)),
        "has 4 bytes, wanted 4000000",
    ),
    "a negative shape": (raw({"a": entry([-1, -1], 0, 4)}, bytes(4)), "is damaged"),
    "deep nesting": (raw(b"[" * 100_000), "is damaged"),
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("sharded", [False, True])
def test_malicious_weights(tmp_path, case, sharded):
    data, message = FILES[case]
    base, adapter = save_model(tmp_path / "base"), save_adapter(tmp_path / "sql")
    (base / "model.safetensors").unlink()
    (base / ("shard.safetensors" if sharded else "model.safetensors")).write_bytes(data)
    if sharded:
        index = {"weight_map": {"a": "shard.safetensors", "b": "shard.safetensors"}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MergeError, match=message) as error:
        merge_engine.merge_into(base, [adapter], tmp_path / "out")
    assert "\n" not in str(error.value) and str(error.value).startswith("base: ")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "sql"}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            '{"weight_map": {"a": "../model.safetensors"}}',
            r"names '\.\./model\.safetensors', wanted a file in the same",
        ),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names '/etc/passwd', wanted a file in the same folder"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "names a twice"),
        ('{"weight_map": 3}', "wanted a weight_map"),
        ("{", "wanted a weight_map"),
        ('{"weight_map": {"a": "missing"}}', "missing is missing"),
    ],
)
def test_malicious_indexes(tmp_path, index, message):
    base, adapter = save_model(tmp_path / "base"), save_adapter(tmp_path / "sql")
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(index)
    with pytest.raises(MergeError, match=message):
        merge_engine.merge_into(base, [adapter], tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "sql"}


@pytest.mark.parametrize("text", ["not JSON", "[1]", "[" * 100_000, ""])
def test_malicious_configurations(tmp_path, text):
    base = save_model(tmp_path / "base")
    (base / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"^base: config\.json "):
        open_checkpoint(base)


def test_a_bin_file_with_more_elements_than_bytes(tmp_path):
    base = save_model(tmp_path / "base", "pytorch_model.bin", torch.save)
    torch.save({"a": torch.zeros(1).expand(10**9)}, base / "pytorch_model.bin")
    with pytest.raises(MergeError, match=r"^base: a in pytorch_model\.bin is \[1000000000\], more than the file has"):
        open_checkpoint(base)
    torch.save({"a": print}, base / "pytorch_model.bin")
    with pytest.raises(MergeError, match="is damaged or holds more than tensors"):
        open_checkpoint(base)


def test_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    for source, message in [
        (tmp_path / "none", "does not exist"),
        (tmp_path / "empty", r"has no config\.json"),
        (save_adapter(tmp_path / "sql"), "is an adapter"),
        (save_model(tmp_path / "other", "weights.safetensors"), "has no weights, wanted model.safetensors, "),
    ]:
        with pytest.raises(ModelError, match=message):
            open_checkpoint(source)


def test_companions_are_no_weights(tmp_path):
    base = save_model(tmp_path / "base")
    wanted = {"tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja"}
    wanted |= {"generation_config.json", "modeling_x.py", "LICENSE.md", "additional_chat_templates/tool.jinja"}
    (base / "additional_chat_templates").mkdir()
    for name in [*wanted, "tokenizer.bin", "consolidated.00.pth", "README.md", "x.gguf", ".env", "training_args.bin"]:
        (base / name).write_text("x")
    assert set(open_checkpoint(base).companions()) == wanted


def test_a_model_from_the_hub(tmp_path, repositories):
    """Weights in safetensors if there are any, else those of torch.save; and what else makes a model of them."""
    repositories["org/model-1"] = save_model(tmp_path / "model")
    names = {"config.json", "tokenizer.json", "additional_chat_templates/tool.jinja"}
    for name in (*names, "README.md", "pytorch_model.bin", "original/model.safetensors"):
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).open("a").close()

    def fetched(model):
        return {str(file.relative_to(model.path)) for file in model.path.rglob("*") if file.is_file()}

    model = open_checkpoint("org/model-1", revision="main")
    assert (model.name, model.source) == ("model-1", "org/model-1") and fetched(model) == {*names, "model.safetensors"}
    repositories["org/bin"] = save_model(tmp_path / "bin", "pytorch_model.bin", torch.save)
    model = open_checkpoint("org/bin")
    assert fetched(model) == {"config.json", "pytorch_model.bin"} and list(model.tensors) == list(KEYS)
    with pytest.raises(ModelError, match=r"^org/none is no local folder and could not be fetched from the hub: "):
        open_checkpoint("org/none")
    with pytest.raises(ModelError, match=r"config.json is a file, wanted a folder with config.json$"):
        open_checkpoint(tmp_path / "bin" / "config.json")


def test_shared_weights_of_a_bin_file(tmp_path):
    base = save_model(tmp_path / "base")
    (base / "model.safetensors").unlink()
    weight = torch.randn(6, 4)
    torch.save({"a.weight": weight, "b.weight": weight, "c.weight": weight.clone()}, base / "pytorch_model.bin")
    assert open_checkpoint(base).twins == {"b.weight": "a.weight"}


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), (7, 7), ("12", 12), ("3B", 3)])
def test_sizes(text, size):
    assert parse_size(text, "memory") == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 apples", "0", None, "1e3"])
def test_no_sizes(text):
    with pytest.raises(RecipeError, match=r"^shard_size: wanted a size such as 5GB or 200MB, got "):
        parse_size(text, "shard_size")


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
