"""scale="auto": every merged module gets the mean norm of its adapters, against dense deltas in float64."""

import json

import pytest
import torch
import yaml
from command_line import run_cli
from dense_merges import SHAPES, U32, WEIGHTS, auto, dense_merge, factors_of, product, save_zoo, sizes_of, tasks_of
from lora_files import save_factors

import merge_engine
from merge_engine.errors import RecipeError
from merge_engine.rules.methods import METHODS

SPACES = [
    (method, space)
    for method, row in METHODS.items()
    for space in (["delta", "knots", "core"] if row.kind == "elementwise" else ["delta"])
]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return save_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def tasks(zoo):
    return tasks_of(zoo)


def norms_of(tasks):
    return {name: [float(task.norm()) for task in each.values()] for name, each in tasks.items()}


def check(merged, zoo, tasks, recipe, gain=1.0):
    """Deltas, and the scales that are reported, of a merge of full rank by scale='auto'."""
    plain = dense_merge(tasks, {**recipe, "scale": 1.0, "method": recipe["method"].replace("cat", "linear")})
    sizes, norms = sizes_of(zoo, recipe.get("weights", WEIGHTS)), norms_of(tasks)
    assert merged.figures.keys() == plain.keys()
    for name, dense in plain.items():
        scale = auto(norms[name], dense, gain[name] if isinstance(gain, dict) else gain)
        # Rounding of factors and of merged elements is a share of what is summed up; drops have divided that by 0.4.
        lost = 20 * U32 * sizes[name]
        assert float((product(merged.modules[name]) - scale * dense).norm()) <= lost * max(1.0, abs(scale)), name
        if dense.any():
            assert merged.figures[name]["scale"] == pytest.approx(scale, rel=2 * lost / float(dense.norm())), name


@pytest.mark.parametrize(("method", "space"), SPACES)
@pytest.mark.parametrize("weights", [WEIGHTS, [1.0, 0.0, 2.0]], ids=str)
def test_every_method_in_every_space(zoo, tasks, method, space, weights):
    recipe = {"method": method, "space": space, "weights": weights, "scale": "auto"}
    if METHODS[method].keep != "all":
        recipe |= {"density": 0.4, "seed": 3}
    rank = {} if METHODS[method].kind == "stacked" else {"rank": 10**6}
    check(merge_engine.merge(zoo, gain=-1.5, **recipe, **rank), zoo, tasks, recipe, -1.5)


@pytest.mark.parametrize("method", ["linear", "tsv", "ties"])
def test_modules_have_gains_of_their_own(zoo, tasks, method, tmp_path):
    """By the first pattern that matches, in a merge, and in a session after one with another gain."""
    table = {"q": 3.0, r"layers\.\d+\.up": -0.5, "layers.1.*": 0.25, ".*": 1}
    gains = {name: 1.0 for name in SHAPES} | {"layers.0.q": 3.0, "layers.1.q": 3.0, "layers.0.up": -0.5}
    gains |= {"layers.1.small": 0.25, "layers.1.own": 0.25, "layers.1.zero": 0.25}
    recipe = {"method": method, "scale": "auto"} | ({"density": 0.4} if method == "ties" else {})
    merged = merge_engine.merge(zoo, gain=table, rank=10**6, weights=WEIGHTS, **recipe)
    check(merged, zoo, tasks, recipe, gains)
    with merge_engine.Session(zoo) as session:
        session.merge(gain=2.0, rank=10**6, weights=WEIGHTS, **recipe)
        again = session.merge(gain=table, rank=10**6, weights=WEIGHTS, **recipe)
    assert all(torch.equal(again.modules[name].B, merged.modules[name].B) for name in SHAPES)
    merge_engine.merge(zoo, tmp_path / "out", gain=table, weights=WEIGHTS, **recipe)
    told = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert told["gain"] == table


@pytest.mark.parametrize("convention", ["mergekit", "paper"])
@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear"])
@pytest.mark.parametrize("space", ["delta", "knots", "core"])
def test_other_conventions(zoo, tasks, method, space, convention):
    recipe = {"method": method, "space": space, "convention": convention, "density": 0.4, "scale": "auto"}
    check(merge_engine.merge(zoo, rank=10**6, weights=WEIGHTS, **recipe), zoo, tasks, recipe)


def test_factors_have_it_too(tmp_path):
    generator = torch.Generator().manual_seed(5)
    folders = []
    for number, alpha in enumerate((2, 7)):
        factors = {"q": (torch.randn(3, 9, generator=generator), torch.randn(8, 3, generator=generator))}
        folders.append(save_factors(tmp_path / str(number), factors, lora_alpha=alpha))
    norms = norms_of(tasks_of(folders))["q"]
    for recipe in ({"method": "linear"}, {"method": "ties", "density": 0.5}, {"method": "ties", "rank": 2}):
        plain = merge_engine.merge(folders, space="factors", weights=[1, -2], **recipe).modules["q"]
        merged = merge_engine.merge(folders, space="factors", weights=[1, -2], scale="auto", gain=0.5, **recipe)
        whole = float(product(plain).norm()) / plain.energy**0.5
        assert merged.figures["q"]["scale"] == pytest.approx(0.5 * sum(norms) / 2 / whole, rel=8 * U32)
        scaled = merged.figures["q"]["scale"] * product(plain)
        torch.testing.assert_close(product(merged.modules["q"]), scaled, rtol=0, atol=4 * U32 * float(scaled.norm()))


@pytest.mark.parametrize(
    ("method", "space"), [("linear", "delta"), ("ties", "delta"), ("ties", "knots"), ("tsv", "core")]
)
def test_a_cut_does_not_change_it(zoo, tasks, method, space):
    """|merged| is that before the cut; so is the norm that modules count with in the kept energy of all."""
    recipe = {"method": method, "space": space, "weights": WEIGHTS, "scale": "auto"}
    whole = dense_merge(tasks, recipe)
    full = merge_engine.merge(zoo, **recipe, rank=10**6)
    for cut in ({"rank": 2}, {"energy": 0.5}, {"rank": 3, "energy": 0.95}):
        merged = merge_engine.merge(zoo, **recipe, **cut)
        kept = total = 0.0
        for name, dense in whole.items():
            # Of a dense merge the singular vectors are found by an iteration, to a share of 1e-5 of the error.
            assert merged.figures[name]["scale"] == pytest.approx(full.figures[name]["scale"], rel=1e-6), name
            squares, k = torch.linalg.svdvals(dense).square(), merged.ranks[name]
            least = float(squares[k:].sum()) ** 0.5
            error = float((product(merged.modules[name]) - dense).norm())
            assert error <= least * (1 + 1e-4) + 40 * U32 * sizes_of(zoo, WEIGHTS)[name], name
            kept += float(product(merged.modules[name]).square().sum())
            total += float(squares.sum())
        assert merged.total_energy == pytest.approx(kept / total, rel=1e-5)


def test_what_is_zero_stays_zero(zoo, tmp_path):
    merged = merge_engine.merge(zoo, method="tsv", scale="auto", weights=[0, 0, 0])
    assert all(not module.B.any() for module in merged.modules.values())
    assert {figures["scale"] for figures in merged.figures.values()} == {1.0}
    for method in ("linear", "tsv", "actmat", "ties"):
        merged = merge_engine.merge(zoo, method=method, scale="auto", gain=3)
        assert not merged.modules["layers.1.zero"].B.any() and merged.figures["layers.1.zero"]["scale"] == 1.0
    options = (
        {"method": "linear"},
        {"method": "iso_c"},
        {"method": "magnitude_prune"},
        {"method": "consensus", "space": "knots"},
        {"method": "consensus", "min_tasks": 0},  # which adds up all elements
        {"method": "consensus", "min_tasks": 0, "space": "core"},
    )
    for recipe in options:  # 0.1 + 0.2 - 0.3 is no 0 in float32, but not a delta either
        for weights in ([1.0, -1.0, 0.0], [0.1, 0.2, -0.3]):
            merged = merge_engine.merge([zoo[0]] * 3, scale="auto", weights=weights, **recipe)
            assert all(not product(module).any() for module in merged.modules.values()), recipe


def test_twice_is_once(zoo, tmp_path):
    """What has the norm already is not scaled again, nor is one adapter alone, whatever its weight."""
    merged = merge_engine.merge(zoo, tmp_path / "once", method="ties", space="knots", scale="auto", weights=WEIGHTS)
    again = merge_engine.merge([tmp_path / "once"], method="linear", scale="auto", weights=[0.25])
    for name, factors in factors_of(tmp_path / "once").items():
        once = factors[2] * (factors[1] @ factors[0])
        torch.testing.assert_close(product(again.modules[name]), once, rtol=0, atol=8 * U32 * float(once.norm()))
        if name != "layers.1.zero":
            assert again.figures[name]["scale"] == pytest.approx(4, rel=4 * U32)
    assert merged.figures["layers.1.own"]["scale"] > 1  # trimmed by its rule, and as large as before


def test_the_folder_and_its_report_say_it(zoo, tasks, tmp_path):
    recipe = {"method": "tsv", "scale": "auto", "weights": WEIGHTS}
    merged = merge_engine.merge(zoo, tmp_path / "out", gain=0.5, **recipe)
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["recipe"]["scale"] == "auto" and report["recipe"]["gain"] == 0.5
    assert "scale: auto" in (tmp_path / "out" / "README.md").read_text()
    norms = norms_of(tasks)
    for name, (A, B, scaling) in factors_of(tmp_path / "out").items():
        module = report["modules"][name]
        assert module["scale"] == merged.figures[name]["scale"]
        assert float((scaling * B @ A).norm()) == pytest.approx(0.5 * sum(norms[name]) / len(norms[name]), rel=1e-6)
        assert isinstance(module["numerical_rank"], int)


def test_a_gain_needs_it(zoo):
    for options in ({"gain": 2}, {"gain": 0.5, "scale": 1.0}):
        with pytest.raises(RecipeError, match=r"^gain: multiplies scale='auto', wanted that with it, got scale 1\.0$"):
            merge_engine.merge(zoo, **options)
    with pytest.raises(RecipeError, match=r"^scale: wanted a number or 'auto', got 'Auto'$"):
        merge_engine.merge(zoo, scale="Auto")
    with pytest.raises(RecipeError, match=r"^gain: wanted a finite number, got nan$"):
        merge_engine.merge(zoo, scale="auto", gain=float("nan"))
    with pytest.raises(RecipeError, match=r"^scale: .* overflows float32$"):
        merge_engine.merge(zoo, scale="auto", gain=3e38)


def test_the_command_knows_it(zoo, tmp_path, capsys):
    """As options, in a recipe file, and as a value of a sweep; a second run of that finds all done."""
    recipe = {"method": "linear", "weights": WEIGHTS}
    for name, options in (("auto", {"scale": "auto"}), ("1", {"scale": 1.0}), ("gain", {"scale": "auto", "gain": 0.5})):
        merge_engine.merge(zoo, tmp_path / name, **recipe, **options)

    def same(folder, name):
        return all((folder / each.name).read_bytes() == each.read_bytes() for each in (tmp_path / name).iterdir())

    weights = [str(weight) for weight in WEIGHTS]
    start = ["merge", *zoo, "--method", "linear", "--weights", *weights]
    assert run_cli(capsys, *start, "-o", tmp_path / "o", "--scale", "auto", "--gain", "0.5")[0] == 0
    assert same(tmp_path / "o", "gain")
    values = {"adapters": list(map(str, zoo)), "output": str(tmp_path / "y"), **recipe, "scale": "auto", "gain": 0.5}
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    assert run_cli(capsys, "merge", tmp_path / "recipe.yaml")[0] == 0
    assert same(tmp_path / "y", "gain")
    for _ in range(2):
        code, out, _ = run_cli(capsys, *start, "-o", tmp_path / "swept", "--sweep", "scale=auto,1")
        assert code == 0 and "auto" in out
        assert same(tmp_path / "swept" / "scale=auto", "auto") and same(tmp_path / "swept" / "scale=1", "1")
