"""Merged LoRAs of image models: what is in the file, by every method, and how it appears."""

import json
import re
from pathlib import Path

import pytest
import torch
from dense_merges import dense_merge
from image_files import FAMILIES, KOHYA_MODULES, hashes, header_of, read_by_comfy, save_image
from lora_files import save_factors
from safetensors import safe_open

import merge_engine
from merge_engine.errors import ModelError, OutputError
from merge_engine.files.safetensors_writer import SafetensorsWriter
from merge_engine.formats.open import open_adapter
from merge_engine.rules.methods import METHODS

WEIGHTS = [0.5, -2.0, 1.25]
U32 = 2.0**-24


def save_three(folder, family="kohya", **header):
    """Three files of different ranks and alphas, one of them with mid where the family has it; the deltas of each."""
    mid = FAMILIES[family][2] is not None
    headers = {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False", **header}
    specs = ((3, 2, torch.float32, False), (2, None, torch.float32, mid), (4, 8, torch.float16, False))
    files, deltas = [], []
    for seed, (rank, alpha, dtype, middle) in enumerate(specs):
        files.append(folder / f"{'abc'[seed]}.safetensors")
        options = {"alpha": alpha, "dtype": dtype, "mid": middle, "seed": seed, "header": headers}
        deltas.append(save_image(files[-1], family, rank, **options))
    return files, {name: dict(enumerate(each[name] for each in deltas)) for name in deltas[0]}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_against_float64(tmp_path, method):
    files, tasks = save_three(tmp_path)
    recipe = {"method": method, "weights": WEIGHTS} | (
        {"density": 0.5} if METHODS[method].kind == "elementwise" else {}
    )
    rank = {} if METHODS[method].kind == "stacked" else {"rank": 60}
    merge_engine.merge(files, tmp_path / "out.safetensors", dtype="float32", **recipe, **rank)
    want = dense_merge(tasks, {**recipe, "method": "linear"} if method == "cat" else recipe)
    got = read_by_comfy(tmp_path / "out.safetensors", tasks)
    for name, delta in got.items():
        size = max(float(task.norm()) for task in tasks[name].values())
        assert (delta - want[name]).norm() <= 3e-6 * size, name


@pytest.mark.quick
@pytest.mark.parametrize("family", FAMILIES)
def test_comfyui_reads_every_key_with_scale_one(tmp_path, family):
    files, tasks = save_three(tmp_path, family)
    merge_engine.merge(files, tmp_path / "out.safetensors", method="linear", weights=WEIGHTS, dtype="float32")
    got = read_by_comfy(tmp_path / "out.safetensors", tasks)
    assert got.keys() == tasks.keys()
    for name, each in tasks.items():
        want = sum(w * task for w, task in zip(WEIGHTS, each.values(), strict=True))
        assert (got[name] - want).norm() <= 1e-6 * sum(task.norm() for task in each.values())


def test_the_tensors_of_kohya(tmp_path):
    files, _ = save_three(tmp_path)
    result = merge_engine.merge(files, tmp_path / "out.safetensors", method="linear", rank=5)
    wanted = {}
    for name, (rows, columns, *kernel) in KOHYA_MODULES.items():
        ones = [1] * len(kernel)
        wanted |= {f"{name}.lora_down.weight": [5, columns, *kernel], f"{name}.lora_up.weight": [rows, 5, *ones]}
        wanted[f"{name}.alpha"] = []
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert {key: list(file.get_tensor(key).shape) for key in file.keys()} == wanted
        assert {float(file.get_tensor(f"{name}.alpha")) for name in KOHYA_MODULES} == {5.0}
    assert result.rank == 5 and result.server_note is None


def test_modules_of_smaller_rank_are_filled_up_with_zeros(tmp_path):
    modules = {"lora_unet_a": (3, 16), "lora_unet_b": (12, 16)}
    for seed, name in enumerate("ab"):
        save_image(tmp_path / f"{name}.safetensors", "kohya", 4, modules=modules, seed=seed)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    result = merge_engine.merge(files, tmp_path / "one.safetensors", method="linear")
    assert result.ranks == {"lora_unet_a": 3, "lora_unet_b": 8}
    assert {m.rank for m in open_adapter(tmp_path / "one.safetensors").modules.values()} == {8}
    merge_engine.merge(files, tmp_path / "own.safetensors", method="linear", ranks="own")
    assert {n: m.rank for n, m in open_adapter(tmp_path / "own.safetensors").modules.items()} == result.ranks
    for name in modules:
        one, own = (read_by_comfy(tmp_path / f"{form}.safetensors", modules)[name] for form in ("one", "own"))
        assert torch.equal(one, own)


@pytest.mark.quick
def test_the_header_of_kohya(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    files, _ = save_three(tmp_path, **{"modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "ss_epoch": "3"})
    merge_engine.merge(files, tmp_path / "style.safetensors", method="linear", rank=6)
    model, legacy = hashes(tmp_path / "style.safetensors")
    args = {"conv_dim": "6", "conv_alpha": "6"}
    assert header_of(tmp_path / "style.safetensors") == {
        "format": "pt",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "6",
        "ss_network_alpha": "6",
        "ss_network_args": json.dumps(args),
        "sshs_model_hash": model,
        "sshs_legacy_hash": legacy,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": "style",
        "modelspec.date": "1970-01-02T00:00:00",
        "modelspec.merged_from": "a, b, c",
    }


def test_the_hashes_of_a_file_above_a_megabyte(tmp_path):
    modules = {"lora_unet_wide": (400, 900)}
    for seed, name in enumerate("ab"):
        save_image(tmp_path / f"{name}.safetensors", "kohya", 128, modules=modules, seed=seed)
    merge_engine.merge(sorted(tmp_path.iterdir()), tmp_path / "out.safetensors", method="linear")
    header = header_of(tmp_path / "out.safetensors")
    assert (header["sshs_model_hash"], header["sshs_legacy_hash"]) == hashes(tmp_path / "out.safetensors")
    assert hashes(tmp_path / "out.safetensors")[1] != "e3b0c442"  # that of no bytes


def test_the_header_of_diffusers(tmp_path):
    config = {"transformer.r": 4, "transformer.lora_alpha": 6, "transformer.target_modules": ["to_q", "conv"]}
    config |= {"text_encoder.r": 4, "text_encoder.lora_alpha": 4, "text_encoder.target_modules": ["fc1"]}
    header = {"lora_adapter_metadata": json.dumps(config)}
    save_image(tmp_path / "a.safetensors", "diffusers", 4, header=header)
    save_image(tmp_path / "b.safetensors", "diffusers", 3, alpha=2, seed=1)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    merge_engine.merge(files, tmp_path / "out.safetensors", method="linear")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "alpha" in key]
    written = json.loads(header_of(tmp_path / "out.safetensors")["lora_adapter_metadata"])
    targets = {key: written.pop(key) for key in list(written) if key.endswith("target_modules")}
    one = {"r": 7, "lora_alpha": 7, "rank_pattern": {}, "alpha_pattern": {}}
    assert written == {f"{part}.{key}": value for part in ("transformer", "text_encoder") for key, value in one.items()}
    for name in ("blocks.0.attn.to_q", "blocks.0.conv"):
        assert re.fullmatch(targets["transformer.target_modules"], name)
    assert not re.fullmatch(targets["transformer.target_modules"], "other.blocks.0.conv")
    merge_engine.merge(files[1:], tmp_path / "own.safetensors", method="linear")  # its header says nothing of alpha
    assert "lora_adapter_metadata" not in header_of(tmp_path / "own.safetensors")


def test_bases_that_differ_are_named(tmp_path):
    for name, base in {"a": "sd_v1", "b": "sdxl_base_v1-0", "c": None}.items():
        header = {"ss_base_model_version": base} if base else None
        save_image(tmp_path / f"{name}.safetensors", "kohya", 2, header=header)
    files = [tmp_path / f"{name}.safetensors" for name in "abc"]
    with pytest.warns(UserWarning, match="b was trained on sdxl_base_v1-0, a on sd_v1"):
        merge_engine.merge(files[:2], tmp_path / "out.safetensors", method="linear")
    assert "ss_base_model_version" not in header_of(tmp_path / "out.safetensors")
    merge_engine.merge(files[1:], tmp_path / "known.safetensors", method="linear")
    assert header_of(tmp_path / "known.safetensors")["ss_base_model_version"] == "sdxl_base_v1-0"


def test_many_merges_sessions_and_comparisons(tmp_path):
    files, tasks = save_three(tmp_path)
    recipes = [
        {"method": "ties", "density": 0.3, "rank": 4},
        {"method": "tsv"},
        {"method": "linear", "weights": WEIGHTS},
    ]
    single = []
    for number, recipe in enumerate(recipes):
        merge_engine.merge(files, tmp_path / f"{number}.safetensors", **recipe)
        single.append(read_by_comfy(tmp_path / f"{number}.safetensors", tasks))
    many = list(merge_engine.merge_many(files, recipes, tmp_path / "many", names=["x", "y", "z"]))
    with merge_engine.Session(files) as session:
        for result, recipe, want in zip(many, recipes, single, strict=True):
            assert {path.name for path in result.path.iterdir()} >= {f"{result.path.name}.safetensors", "README.md"}
            kept = session.merge(**recipe)
            session.merge(tmp_path / "session.safetensors", overwrite=True, **recipe)
            again = read_by_comfy(tmp_path / "session.safetensors", tasks)
            for name, delta in read_by_comfy(result.path / f"{result.path.name}.safetensors", tasks).items():
                assert torch.equal(delta, want[name]) and torch.equal(again[name], want[name])
                product = kept.modules[name].B.double() @ kept.modules[name].A.double()
                assert (product - want[name]).norm() <= 1e-6 * want[name].norm()
    figures = merge_engine.interference(files, density=0.5)
    for number, norm in enumerate(figures.overall.norms):
        assert norm == pytest.approx(sum(float(each[number].norm()) ** 2 for each in tasks.values()) ** 0.5, rel=1e-6)


@pytest.mark.quick
def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    files, _ = save_three(tmp_path)
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "new" / "out.safetensors"

    def fails(self, metadata=None):
        raise RuntimeError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(SafetensorsWriter, "close", fails)
        with pytest.raises(RuntimeError, match="stopped"):
            merge_engine.merge(files, out, method="linear")
    assert sorted(tmp_path.iterdir()) == before
    merge_engine.merge(files, out, method="linear")
    assert [path.name for path in out.parent.iterdir()] == ["out.safetensors"]
    first = out.read_bytes()
    with pytest.raises(OutputError, match="already exists; pass overwrite"):
        merge_engine.merge(files, out, method="ties")
    assert out.read_bytes() == first
    merge_engine.merge(files, out, method="ties", overwrite=True)
    assert out.read_bytes() != first
    with pytest.raises(OutputError, match=r"a\.safetensors is merged; wanted another file"):
        merge_engine.merge(files, files[0], overwrite=True)
    with pytest.raises(OutputError, match="is a folder, wanted a file"):
        (tmp_path / "folder.safetensors").mkdir()
        merge_engine.merge(files, tmp_path / "folder.safetensors", overwrite=True)


def test_an_adapter_of_peft_is_no_single_file(tmp_path):
    factors = {"q": (torch.ones(2, 4), torch.ones(3, 2))}
    folder = save_factors(tmp_path / "a", factors)
    with pytest.raises(OutputError, match=r"x\.safetensors is a file, wanted a folder to write to"):
        merge_engine.merge([folder, folder], tmp_path / "x.safetensors", method="linear")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_image_loras_are_not_merged_into_a_base(tmp_path):
    files, _ = save_three(tmp_path)
    for merge in (merge_engine.merge_into, merge_engine.merge_models):
        with pytest.raises(ModelError, match=r"a is kohya's file .* not merged into a base here; fuse_lora"):
            merge(tmp_path / "base", files, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_report_of_a_folder(tmp_path):
    files, tasks = save_three(tmp_path)
    merge_engine.merge(files, tmp_path / "style", method="linear", rank=3)
    report = json.loads((tmp_path / "style" / "merge_report.json").read_text())
    assert report["modules"].keys() == tasks.keys() and report["rank"] == 3
    assert report["adapters"] == [str(file) for file in files]
    assert open_adapter(tmp_path / "style").name == "style"
    assert open_adapter(Path(tmp_path / "style" / "style.safetensors")).modules.keys() == tasks.keys()
