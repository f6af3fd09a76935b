"""Adapters into a base model: against the textbook bit by bit, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_models import CONFIG, WEIGHTS, bytes_of, save_adapter, save_base, weights_of

import merge_engine
from merge_engine.cli.main import main
from merge_engine.cpu.mask import keep_mask
from merge_engine.errors import MergeError, ModelError, OutputError
from merge_engine.files.safetensors_writer import SafetensorsWriter
from merge_engine.formats.open import open_adapter
from merge_engine.rules import reference
from merge_engine.rules.philox import stream_id
from merge_engine.rules.rule import make_rule

ROOT = Path(__file__).parents[2]


def textbook(folders, base, recipe, scale, density=0.4, seed=0):
    """{key: base + scale * reference(deltas) in float32, rounded once}."""
    adapters = [open_adapter(folder) for folder in folders]
    tasks = {}
    for number, adapter in enumerate(adapters):
        for name, module in adapter.modules.items():
            tasks.setdefault(name, {})[number] = reference.delta(*adapter.factors(name), module.scaling)
    masks = {
        name: {
            i: keep_mask(
                density,
                seed=seed,
                stream=stream_id(name, "delta"),
                adapter=i,
                rows=range(len(t)),
                columns=range(t.shape[1]),
            )
            for i, t in tensors.items()
        }
        for name, tensors in tasks.items()
    }
    rule = make_rule(**recipe)
    densities = {name: [density] * len(adapters) for name in tasks}
    merged = reference.merge_model(tasks, WEIGHTS, densities, rule, masks=masks, scale=scale)
    tensors = weights_of(base)
    return {
        f"{name}.weight": (tensors[f"{name}.weight"].float() + delta).to(tensors[f"{name}.weight"].dtype)
        for name, delta in merged.items()
    }


@pytest.mark.quick
@pytest.mark.parametrize("method", ["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"])
@pytest.mark.parametrize("convention", ["peft", "paper", "mergekit"])
def test_every_tensor_is_base_plus_the_textbook_rounded_once(base, three, tmp_path, method, convention):
    recipe = {"method": method, "convention": convention}
    result = merge_engine.merge_into(base, three, tmp_path / "out", weights=WEIGHTS, scale=0.5, density=0.4, **recipe)
    got, before = weights_of(tmp_path / "out"), weights_of(base)
    want = textbook(three, base, recipe, 0.5)
    assert got.keys() == before.keys() and want.keys() < got.keys()
    for key, tensor in got.items():
        assert tensor.dtype == before[key].dtype
        if convention == "mergekit" and "dare" in method and key in want:  # the norms of a rescale sum in another order
            torch.testing.assert_close(tensor, want[key], rtol=2**-7, atol=2**-7)
        else:
            assert torch.equal(tensor, want.get(key, before[key])), key
    assert (result.merged, result.copied, result.resumed) == (3, 4, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_bases_of_other_dtypes(three, tmp_path, dtype):
    base = save_base(tmp_path / "base", dtype=dtype)
    merge_engine.merge_into(base, three, tmp_path / "out", method="ties", weights=WEIGHTS, scale=0.25, density=0.4)
    got, before = weights_of(tmp_path / "out"), weights_of(base)
    for key, want in textbook(three, base, {"method": "ties"}, 0.25).items():
        assert torch.equal(got[key], want) or dtype == torch.float64
        assert got[key].dtype == before[key].dtype == dtype
        torch.testing.assert_close(got[key], want, rtol=2**-22, atol=2**-22)


def test_what_else_lies_in_an_adapters_folder_does_not_matter(base, three, tmp_path):
    """PEFT writes named adapters to folders in it; a broken link and a pipe cannot be read."""
    merge_engine.merge_into(base, three, tmp_path / "want")
    (three[0] / "adapter_other").mkdir()
    (three[0] / "adapter_link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(three[1] / "adapter_pipe")
    merge_engine.merge_into(base, three, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "want")


def test_real_factors_are_within_one_rounding(base, tmp_path):
    folders = [save_adapter(tmp_path / str(seed), seed, whole=False) for seed in range(3)]
    merge_engine.merge_into(base, folders, tmp_path / "out", method="ties", weights=WEIGHTS, density=0.4)
    want, got = textbook(folders, base, {"method": "ties"}, 1.0), weights_of(tmp_path / "out")
    for key in want:
        torch.testing.assert_close(got[key].float(), want[key].float(), rtol=2**-7, atol=2**-9)


def test_what_is_asked_for_as_dtype(base, three, tmp_path):
    merge_engine.merge_into(base, three, tmp_path / "out", method="linear", dtype="float32", weights=WEIGHTS)
    got, before = weights_of(tmp_path / "out"), weights_of(base)
    assert {tensor.dtype for tensor in got.values()} == {torch.float32, torch.int64}
    assert torch.equal(got["lm_head.weight"], before["lm_head.weight"].float())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    merge_engine.merge_into(base, three, tmp_path / "half", method="linear", dtype="float16", weights=WEIGHTS)
    for key, tensor in weights_of(tmp_path / "half").items():
        assert torch.equal(tensor, got[key].to(tensor.dtype))
    with pytest.raises(ModelError, match=r"q_proj\.weight has a value beyond 65504"):
        merge_engine.merge_into(base, three, tmp_path / "over", method="linear", dtype="float16", scale=1e6)
    for recipe in ({"scale": 1e38}, {"weights": [1e38, 1, 1], "scale": 1e3}, {"scale": 1e38, "dtype": "float32"}):
        with pytest.raises(ModelError, match=r"_proj\.weight has a value beyond 3\.\d+e\+38, the largest of"):
            merge_engine.merge_into(base, three, tmp_path / "over", method="linear", **recipe)
    assert not (tmp_path / "over").exists() and not (tmp_path / ".over.partial").exists()


def test_a_copied_value_beyond_float16_is_an_error(base, three, tmp_path):
    folder = tmp_path / "large"
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 1e5  # no adapter has this module
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"^lm_head\.weight has a value beyond 65504, the largest of float16"):
        merge_engine.merge_into(folder, three, tmp_path / "out", method="linear", dtype="float16", weights=WEIGHTS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "cat"])
def test_factor_space(base, three, tmp_path, method):
    recipe = {"method": method, "space": "factors", "density": 0.4, "weights": WEIGHTS, "scale": 0.5}
    merge_engine.merge_into(base, three, tmp_path / "out", **recipe)
    merged = merge_engine.merge(three, **recipe).modules
    before, got = weights_of(base), weights_of(tmp_path / "out")
    for name, factors in merged.items():
        want = before[f"{name}.weight"].double() + factors.B.double() @ factors.A.double()
        torch.testing.assert_close(got[f"{name}.weight"].double(), want, rtol=2**-8, atol=2**-8 * want.abs().max())


@pytest.mark.parametrize(
    "recipe", [{"method": "ties"}, {"method": "dare_ties", "dtype": "float32"}, {"space": "factors"}]
)
def test_triton_merges_into_a_base_too(base, three, tmp_path, recipe):
    pytest.importorskip("triton")
    for backend in ("torch", "triton"):
        merge_engine.merge_into(base, three, tmp_path / backend, backend=backend, weights=WEIGHTS, **recipe)
    one, other = weights_of(tmp_path / "torch"), weights_of(tmp_path / "triton")
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype
        torch.testing.assert_close(tensor, other[key], rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("form", ["sharded", "bin", "sharded bin"])
def test_other_forms_of_the_base(base, three, tmp_path, form):
    merge_engine.merge_into(base, three, tmp_path / "want", weights=WEIGHTS)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tensors = load_file(other / "model.safetensors")
    (other / "model.safetensors").unlink()
    if form == "bin":
        torch.save(tensors, other / "pytorch_model.bin")
    else:
        stem, save = ("model", save_file) if form == "sharded" else ("pytorch_model", torch.save)
        ending = "safetensors" if form == "sharded" else "bin"
        names = [f"{stem}-{i}-of-2.{ending}" for i in (1, 2)]
        weight_map = {key: names[i % 2] for i, key in enumerate(tensors)}
        for name in names:
            save({key: tensors[key] for key in tensors if weight_map[key] == name}, other / name)
        (other / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    merge_engine.merge_into(other, three, tmp_path / "out", weights=WEIGHTS)
    want, got = weights_of(tmp_path / "want"), weights_of(tmp_path / "out")
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)


@pytest.mark.quick
def test_mistakes_are_one_line_each(base, three, tmp_path, capsys):
    odd = save_adapter(tmp_path / "odd", 5, modules=["layers.0.q_proj"], shapes={"layers.0.q_proj": (12, 20)})
    wide = save_adapter(tmp_path / "wide", 5, modules=["lm_head"], shapes={"lm_head": (21, 12)})
    whole = save_base(tmp_path / "quantized", quantization_config={"bits": 4})
    broken = save_base(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    cases = [
        (
            base,
            [odd],
            {},
            "odd: wanted tensor layers.0.q_proj.weight in base for module layers.0.q_proj, got none; it ",
        ),
        (
            base,
            [wide],
            {},
            "wide: the delta of lm_head is [21, 12], wanted [19, 12] as lm_head.weight in base: vocabul",
        ),
        (base, three, {"rank": 4}, "rank: a merge into a base model is not cut to a rank"),
        (base, three, {"shard_size": "5 apples"}, "shard_size: wanted a size such as 5GB or 200MB, got '5 apples'"),
        (whole, three, {}, "quantized: config.json has a quantization_config"),
        (broken, three, {}, "broken: config.json cannot be read: "),
        (
            three[0],
            three,
            {},
            f"sql: {three[0]} is an adapter (adapter_config.json), wanted a full model (config.json)",
        ),
        (tmp_path / "none", three, {}, f"{tmp_path / 'none'} does not exist"),
        (base, [], {}, "adapters: wanted at least one, got none"),
    ]
    before = {path.name for path in tmp_path.iterdir()}
    for folder, adapters, recipe, message in cases:
        with pytest.raises(MergeError) as error:
            merge_engine.merge_into(folder, adapters, tmp_path / "out", **recipe)
        assert str(error.value).startswith(message) and "\n" not in str(error.value)
        assert {path.name for path in tmp_path.iterdir()} == before
    assert main(["merge", str(three[0]), "-o", str(tmp_path / "out"), "--dry-run"]) == 2
    assert "--dry-run: only applies to full models; wanted --into BASE with it" in capsys.readouterr().err
    assert main(["merge", "--into", str(broken), str(three[0]), "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_memory_does_not_hold_the_model(tmp_path):
    """A base of 240 MB in tensors of 8 MB: the peak stays below it, Numba's compiler (about 70 MB) not counted."""
    shapes = {f"layers.{i}.up_proj": (2048, 2048) for i in range(29)}
    base = tmp_path / "base"
    base.mkdir()
    with SafetensorsWriter(base / "model.safetensors", [f"{name}.weight" for name in shapes]) as writer:
        for name, shape in shapes.items():
            writer.add(f"{name}.weight", torch.zeros(shape, dtype=torch.bfloat16))
    (base / "config.json").write_text(json.dumps(CONFIG))
    adapters = [save_adapter(tmp_path / name, seed, shapes, shapes) for seed, name in enumerate("ab")]
    code = (
        "import torch, merge_engine, merge_engine.loops.door\n"
        "merge_engine.loops.door.load()\n"
        "peak = lambda: int(next(l for l in open('/proc/self/status') if 'VmHWM' in l).split()[1]) / 1e3\n"
        "before = peak()\n"
        f"merge_engine.merge_into({str(base)!r}, {[str(a) for a in adapters]}, {str(tmp_path / 'out')!r})\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 200


def test_neither_base_nor_adapter_is_replaced(base, three, tmp_path):
    before = (base / "model.safetensors").read_bytes()
    for inputs, output in (([base, three], base), ([base, three], three[1]), ([base, [base]], base)):
        merge = merge_engine.merge_models if inputs[1] == [base] else merge_engine.merge_into
        for dry_run in (True, False):
            with pytest.raises(OutputError, match="which is merged; wanted another folder to write to"):
                merge(*inputs, output, method="linear", overwrite=True, dry_run=dry_run)
    assert (base / "model.safetensors").read_bytes() == before and (three[1] / "adapter_config.json").exists()


def test_a_dry_run_finds_that_the_output_exists(base, three, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="already exists; pass overwrite to replace it"):
        merge_engine.merge_into(base, three, tmp_path / "out", dry_run=True)
    assert merge_engine.merge_into(base, three, tmp_path / "out", dry_run=True, overwrite=True).path is None


def test_what_no_input_touches_may_be_infinite_and_cast(base, three, tmp_path):
    """As the mask of an attention layer, which some models have saved."""
    tensors = weights_of(base) | {"model.mask": torch.tensor([0, float("-inf")], dtype=torch.bfloat16)}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    merge_engine.merge_into(base, three, tmp_path / "out", method="linear", dtype="float32")
    assert weights_of(tmp_path / "out")["model.mask"].tolist() == [0, float("-inf")]


def test_a_configuration_in_another_encoding_is_said_before_anything_is_written(base, three, tmp_path):
    text = (base / "config.json").read_text()
    (base / "config.json").write_text(text, encoding="utf-16")
    with pytest.raises(ModelError, match=r"^base: config\.json cannot be read: 'utf-8' codec"):
        merge_engine.merge_into(base, three, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()
    (base / "config.json").write_text(text, encoding="utf-8-sig")
    merge_engine.merge_into(base, three, tmp_path / "out")
