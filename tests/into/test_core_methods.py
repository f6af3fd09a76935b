"""Methods on cores, common spaces and the automatic scale in merges into a base, against float64."""

import logging

import pytest
import torch
from dense_merges import SHAPES, U32, WEIGHTS, auto, dense_merge, save_zoo, sizes_of, tasks_of
from lora_files import save_factors
from safetensors.torch import load_file
from toy_models import bytes_of, save_base, weights_of
from tuned_models import save_model

import merge_engine
from merge_engine.errors import RecipeError
from merge_engine.into import write as into_write
from merge_engine.rules import reference
from merge_engine.rules.rule import make_rule
from merge_engine.runtime.threads import threads

BASE = {**SHAPES, "embed_tokens": (30, 12), "norm": (12,)}
RECIPES = [
    *({"method": method} for method in ("tsv", "iso_c", "tsv_iso", "actmat", "multislerp", "karcher")),
    {"method": "tsv", "space": "core", "scale": 0.3},
    {"method": "actmat", "ridge": 0.3, "scale": "auto", "balance": "pico"},
    *({"method": "ties", "density": 0.4, "space": space} for space in ("knots", "core")),
    {"method": "ties", "density": 0.4, "space": "knots", "convention": "paper", "scale": "auto"},
    {"method": "dare_ties", "density": 0.4, "space": "core", "seed": 3, "scale": "auto"},
    {"method": "consensus", "space": "knots", "scale": -0.5},
    {"method": "linear", "space": "core"},
    *({"method": method, "scale": "auto"} for method in ("linear", "cat", "tsv", "ties", "dare_linear", "elect_max")),
    {"method": "linear", "balance": "pico"},
    {"method": "ties", "density": 0.4, "balance": "pico", "scale": "auto"},
]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return save_zoo(tmp_path_factory.mktemp("zoo"))


def stored(merged):
    """Merged deltas in the shapes of the base's tensors."""
    turned = {name: delta.T if name == "embed_tokens" else delta for name, delta in merged.items()}
    return {name: delta.reshape(BASE[name]) for name, delta in turned.items()}


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_and_the_textbook_rounded_once(zoo, tmp_path, recipe, dtype):
    """Off by what rounding makes of the merged delta in float32, and by one rounding of the sum."""
    base = save_base(tmp_path / "base", dtype=dtype, shapes=BASE)
    recipe = {"weights": WEIGHTS, **recipe}
    if recipe["method"] == "dare_linear":
        recipe |= {"density": 0.5}
    gain = {"gain": {"nothing": 9, ".*": 0.5}} if recipe.get("scale") == "auto" else {}
    result = merge_engine.merge_into(base, zoo, tmp_path / "out", **recipe, **gain)
    tasks = tasks_of(zoo)
    dense = dense_merge(tasks, {**recipe, "method": recipe["method"].replace("cat", "linear")}, 0.5 if gain else 1.0)
    merged, before, got = stored(dense), weights_of(base), weights_of(tmp_path / "out")
    assert got.keys() == before.keys() and result.merged == len(merged)
    half = torch.finfo(dtype).eps / 2
    sizes = sizes_of(zoo, WEIGHTS)
    for key, tensor in before.items():
        name = key.removesuffix(".weight")
        if name not in merged:
            assert torch.equal(got[key], tensor)
            continue
        wanted = tensor.double() + merged[name]
        lost = 20 * U32 * sizes[name] + 2 * U32 * float(wanted.abs().max())
        error = (got[key].double() - wanted).abs()
        assert got[key].dtype == dtype and bool((error <= half * wanted.abs() * 1.01 + lost).all()), key


def test_results_are_those_of_an_adapter(zoo, tmp_path):
    """The same factors as by `merge`, added to the base: one product, and one rounding."""
    base = save_base(tmp_path / "base", dtype=torch.float32, shapes=BASE)
    for number, recipe in enumerate(({"method": "tsv", "scale": "auto"}, {"space": "knots", "method": "ties"})):
        merge_engine.merge_into(base, zoo, tmp_path / f"in {number}", weights=WEIGHTS, **recipe)
        merge_engine.merge(zoo, tmp_path / f"alone {number}", weights=WEIGHTS, **recipe)
        again = tmp_path / f"again {number}"
        merge_engine.merge_into(base, [tmp_path / f"alone {number}"], again, method="linear")
        one, other = weights_of(tmp_path / f"in {number}"), weights_of(again)
        for key, tensor in one.items():
            torch.testing.assert_close(tensor, other[key], rtol=4 * U32, atol=64 * U32)


def differences(base, folders):
    start = load_file(base / "model.safetensors")
    tasks = {}
    for number, folder in enumerate(folders):
        for key, tensor in load_file(folder / "model.safetensors").items():
            if tensor.is_floating_point():
                flat = (tensor.double() - start[key].double()).reshape(len(tensor) if tensor.ndim > 1 else 1, -1)
                tasks.setdefault(key.removesuffix(".weight"), {})[number] = flat
    return tasks


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("recipe", [{"method": "linear"}, {"method": "ties", "density": 0.4, "convention": "paper"}])
def test_full_models_have_the_automatic_scale(tmp_path, recipe, backend):
    """Of whole tensors: the mean norm of the differences over the norm of what is merged."""
    if backend == "triton":
        pytest.importorskip("triton")
    base = save_model(tmp_path / "base", 0, torch.float32)
    like = load_file(base / "model.safetensors")
    folders = [save_model(tmp_path / name, seed, torch.float32, like) for seed, name in enumerate("abc", 1)]
    options = {"weights": [1.0, 0.5, -2.0], "scale": "auto", "gain": 0.75, "backend": backend}
    merge_engine.merge_models(base, folders, tmp_path / "out", **recipe, **options)
    tasks, got = differences(base, folders), load_file(tmp_path / "out" / "model.safetensors")
    rule = make_rule(**{key: value for key, value in recipe.items() if key != "density"})
    plain = reference.merge_model(tasks, options["weights"], dict.fromkeys(tasks, [0.4] * 3), rule)
    for key, tensor in like.items():
        name = key.removesuffix(".weight")
        if name not in tasks:
            assert torch.equal(got[key], tensor)
            continue
        scale = auto([float(task.norm()) for task in tasks[name].values()], plain[name], 0.75)
        wanted = tensor.double() + (scale * plain[name]).reshape(tensor.shape)
        torch.testing.assert_close(got[key].double(), wanted, rtol=2 * U32, atol=16 * U32 * float(wanted.abs().max()))


def test_models_and_adapters_have_it_together(tmp_path):
    base = save_model(tmp_path / "base", 0, torch.float32)
    like = load_file(base / "model.safetensors")
    model = save_model(tmp_path / "tuned", 1, torch.float32, like)
    generator = torch.Generator().manual_seed(4)
    A, B = torch.randn(2, 12, generator=generator), torch.randn(12, 2, generator=generator)
    adapter = save_factors(tmp_path / "sql", {"model.layers.0.q_proj": (A, B)}, lora_alpha=3)
    merge_engine.merge_models(base, [model, adapter], tmp_path / "out", method="linear", scale="auto", weights=[1, 3])
    tasks = differences(base, [model])
    tasks["model.layers.0.q_proj"][1] = 1.5 * (B.double() @ A.double())
    got = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("model.layers.0.q_proj", "lm_head"):
        merged = sum(weight * tasks[name][number] for number, weight in ((0, 1.0), (1, 3.0)) if number in tasks[name])
        scale = auto([float(task.norm()) for task in tasks[name].values()], merged)
        wanted = like[f"{name}.weight"].double() + scale * merged
        assert float((got[f"{name}.weight"].double() - wanted).norm()) <= 8 * U32 * float(wanted.norm())


def test_what_takes_factors_is_refused_of_full_models(zoo, tmp_path):
    base = save_model(tmp_path / "base", 0)
    model = save_model(tmp_path / "tuned", 1, like=load_file(base / "model.safetensors"))
    adapter = save_factors(tmp_path / "sql", {"model.layers.0.q_proj": (torch.ones(2, 12), torch.ones(12, 2))})
    known = "linear, magnitude_prune, ties, dare_linear, dare_ties, breadcrumbs, breadcrumbs_ties, elect_max, consensus"
    who = "tuned is a full model and has no factors"
    for recipe, message in (
        *(
            ({"method": method}, f"method: {who}; wanted one of {known}, got {method}")
            for method in ("tsv", "iso_c", "tsv_iso", "actmat", "multislerp", "karcher", "cat")
        ),
        *(({"space": space}, f"space: {who}; wanted delta, got {space}") for space in ("factors", "knots", "core")),
        ({"balance": "pico"}, f"balance: {who}; wanted none, got pico"),
        ({"balance": "pico", "method": "linear"}, f"balance: {who}; wanted none, got pico"),
    ):
        for inputs in ([model], [adapter, model]):
            with pytest.raises(RecipeError) as error:
                merge_engine.merge_models(base, inputs, tmp_path / "out", **recipe)
            assert str(error.value) == message
    for options in ({"rank": 4}, {"energy": 0.9}):
        with pytest.raises(RecipeError, match=r"^rank: a merge into a base model is not cut to a rank"):
            merge_engine.merge_models(base, [adapter], tmp_path / "out", method="tsv", **options)
    assert not (tmp_path / "out").exists()


WIDE = {f"layers.{i}.up_proj": (257, 300) for i in range(4)}
LARGE = [  # recipes, and the options of the command that say the same
    ({"method": "tsv", "scale": "auto"}, ["--method", "tsv", "--scale", "auto"]),
    ({"space": "knots", "scope": "model"}, ["--space", "knots", "--scope", "model"]),
    ({"method": "linear", "scale": "auto"}, ["--method", "linear", "--scale", "auto"]),
    (
        {"space": "core", "convention": "paper", "balance": "pico"},
        ["--space", "core", "--convention", "paper", "--balance", "pico"],
    ),
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A base in float32 whose modules and ranks are large enough for a BLAS of several threads."""
    root = tmp_path_factory.mktemp("wide")
    base = save_base(root / "base", dtype=torch.float32, shapes={**WIDE, "norm": (7,)})
    generator = torch.Generator().manual_seed(0)
    adapters = []
    for name in "abc":
        sides = {
            module: (torch.randn(24, columns, generator=generator), torch.randn(rows, 24, generator=generator))
            for module, (rows, columns) in WIDE.items()
        }
        adapters.append(save_factors(root / name, sides))
    for number, (recipe, _) in enumerate(LARGE):
        merge_engine.merge_into(base, adapters, root / f"want {number}", shard_size="300KB", **recipe)
    return base, adapters, [bytes_of(root / f"want {number}") for number in range(len(LARGE))]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_change_no_byte(wide, tmp_path, count):
    base, adapters, want = wide
    with threads(count):
        for number, (recipe, _) in enumerate(LARGE):
            merge_engine.merge_into(base, adapters, tmp_path / str(number), shard_size="300KB", **recipe)
            assert bytes_of(tmp_path / str(number)) == want[number], recipe


def test_scales_are_found_on_one_thread(zoo, tmp_path, monkeypatch):
    """Sums on several have other last bits, which hardly ever show in float32: so it is the threads that are asked."""
    base, seen, real = save_base(tmp_path / "base", shapes=BASE), [], into_write.scale_of

    def scale_of(*arguments):
        seen.append(torch.get_num_threads())
        return real(*arguments)

    monkeypatch.setattr(into_write, "scale_of", scale_of)
    with threads(2):
        merge_engine.merge_into(base, zoo, tmp_path / "out", method="ties", scale="auto")
        assert torch.get_num_threads() == 2
    assert seen == [1] * 8


def test_two_processes_write_the_bytes_of_one(wide, tmp_path, forks):
    base, adapters, want = wide
    start = ["merge", "--into", base, *adapters, "--shard-size", "300KB", "--backend", "torch"]
    done = forks.ranks(2, *([*start, *options, "-o", tmp_path / str(n)] for n, (_, options) in enumerate(LARGE)))
    assert done.codes == [0, 0], done.err
    for number, bytes_of_one in enumerate(want):
        assert bytes_of(tmp_path / str(number)) == bytes_of_one, LARGE[number]


KILLED = """
import os, signal
from merge_engine.into import write
right, seen = write._write, []
def dying(*arguments):
    seen.append(1)
    if len(seen) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return right(*arguments)
write._write = dying
"""


def test_a_killed_merge_goes_on_where_it_stopped(wide, tmp_path, forks):
    base, adapters, want = wide
    for number, (recipe, options) in enumerate(LARGE[:2]):
        out = tmp_path / str(number)
        command = ["merge", "--into", base, *adapters, "--shard-size", "300KB", *options, "-o", out]
        assert forks.run(command, first=KILLED).codes == [-9]
        assert not out.exists()
        result = merge_engine.merge_into(base, adapters, out, shard_size="300KB", **recipe)
        assert result.resumed == 2 and bytes_of(out) == want[number]


def test_a_dry_run_estimates_them(wide, tmp_path):
    base, adapters, _ = wide
    for recipe, _ in LARGE:
        result = merge_engine.merge_into(base, adapters, tmp_path / "out", dry_run=True, **recipe)
        assert result.path is None and result.seconds > 0 and result.merged == 4


def test_what_cancels_leaves_the_base(zoo, tmp_path):
    """0.1 + 0.2 - 0.3 is no 0 in float32, and no delta to be made as large as the adapters."""
    base = save_base(tmp_path / "base", shapes=BASE)
    for method in ("linear", "tsv"):
        out = tmp_path / method
        merge_engine.merge_into(base, [zoo[0]] * 3, out, method=method, weights=[0.1, 0.2, -0.3], scale="auto")
        before, got = weights_of(base), weights_of(out)
        assert all(torch.equal(got[key], tensor) for key, tensor in before.items())


def test_copies_lie_between_merged_tensors(zoo, tmp_path, monkeypatch):
    """Every tensor is written once, whatever is merged and whatever is copied."""
    base = save_base(tmp_path / "base", shapes={**BASE, **{f"norms.{i}": (3,) for i in range(20)}})
    written, real = [], into_write._write

    def write(job, files, journal, item):
        written.extend(item.keys)
        return real(job, files, journal, item)

    monkeypatch.setattr(into_write, "_write", write)
    for method in ("tsv", "linear"):
        written.clear()
        merge_engine.merge_into(base, zoo, tmp_path / method, method=method)
        assert sorted(written) == sorted(weights_of(base)) and len(set(written)) == len(written)


def test_one_line_tells_of_adapters_that_started_from_one(tmp_path, caplog):
    base = save_base(tmp_path / "base", shapes={"a": (30, 40), "b": (30, 40)})
    generator = torch.Generator().manual_seed(7)
    A = torch.randn(4, 40, generator=generator)
    folders = []
    for name in "xyz":
        factors = {module: (A, torch.randn(30, 4, generator=generator)) for module in "ab"}
        folders.append(save_factors(tmp_path / name, factors))
    for options, count in (({"space": "knots"}, 1), ({"space": "core"}, 1), ({}, 0), ({"method": "tsv"}, 0)):
        caplog.clear()
        merge_engine.merge_into(base, folders, tmp_path / str(options), **options)
        lines = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
        assert len(lines) == count
        assert all(line.startswith("merge into base: in 2 of 2 modules the adapters' A are nearly") for line in lines)
