"""Every elementwise method of the table, under every convention, by everyone who computes it.

The parametrisation reads the table: a new row is tested by being there. Factors, weights and scales are such that every
product and every sum of the adapters is exact in float32: all see the same task tensors, no vote depends on rounding,
and results differ by what is rounded after that.
"""

import math
from contextlib import contextmanager
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_files import save_factors
from safetensors.torch import load_file, save_file
from toy_models import bytes_of, save_base, weights_of

import merge_engine
from merge_engine.cli.main import main
from merge_engine.cpu.mask import keep_mask
from merge_engine.cpu.source import Dense
from merge_engine.engine.backend import Group
from merge_engine.engine.cpu_backend import TorchBackend
from merge_engine.engine.plan import ModulePlan, Plan
from merge_engine.errors import RecipeError
from merge_engine.loops import door
from merge_engine.rules import reference
from merge_engine.rules.conventions import CONVENTIONS
from merge_engine.rules.methods import METHODS, STRICT, looks_at
from merge_engine.rules.philox import stream_id
from merge_engine.rules.recipe import Recipe
from merge_engine.sweeps.trials import sweep_trials

ROWS = [name for name, row in METHODS.items() if row.kind == "elementwise"]
CASES = list(product(ROWS, CONVENTIONS))
WAYS = ("loops", "operators", "kernels")
ON_CPU = WAYS[:2]  # where kernels are interpreted, they take long
U = 2**-24  # unit roundoff of float32
SHAPES = {"layers.0.q_proj": (12, 20), "layers.1.q_proj": (12, 20), "layers.1.up_proj": (70, 33)}
RANK = 4
# Times the adapters' scaling of 2, weights are squares: roots of them, which factors count by, are exact too.
OPTIONS = {
    "weights": [2.0, 0.5, -0.5],
    "density": 0.4,
    "scale": 0.75,
    "seed": 7,
    "gamma": 0.1,
    "mask": 0.5,
    "min_tasks": 2,
}
DENSITY, WEIGHTS = OPTIONS["density"], OPTIONS["weights"]


def recipe_of(method, convention="peft"):
    known = {field: value for field, value in OPTIONS.items() if looks_at(method, field)}
    return {"method": method, "convention": convention, **known}


def options_of(recipe):
    """The same on the command line."""
    words = []
    for field, value in recipe.items():
        words += [f"--{field.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return words


@contextmanager
def computed_by(way):
    """What tells merges that they are to be computed so."""
    if way == "kernels":
        pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        if way == "operators":
            patch.setattr(door, "installed", lambda: False)
        yield {"backend": "triton" if way == "kernels" else "torch"}


@pytest.fixture(scope="module")
def factors():
    """{module: (A, B)} of three adapters, in eighths; the third lacks a module."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randint(-40, 41, shape, generator=generator) / 8

    made = [{name: (draw(RANK, columns), draw(rows, RANK)) for name, (rows, columns) in SHAPES.items()} for _ in "abc"]
    del made[2]["layers.1.up_proj"]
    return made


@pytest.fixture(scope="module")
def adapters(factors, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return [save_factors(root / name, each) for name, each in zip("abc", factors, strict=True)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model of whole numbers, so that the tasks of models tuned from it are exact."""
    folder = save_base(tmp_path_factory.mktemp("base") / "base", dtype=torch.float32, shapes=SHAPES)
    tensors = {key: (8 * tensor).round() for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def textbook(factors, recipe, side):
    """({module: merged}, {module: sum of |w t| with room for a rescale}) of one side, by the reference in float64."""
    scale = recipe["scale"] if side != "A" else 1.0
    weights = WEIGHTS
    if side != "delta":
        weights = [math.copysign((2 * abs(w)) ** 0.5, w if side == "A" else 1) for w in WEIGHTS]
    tasks = {}
    for number, adapter in enumerate(factors):
        for name, (A, B) in adapter.items():
            task = {"A": A, "B": B, "delta": reference.delta(A, B, 2.0)}[side]
            tasks.setdefault(name, {})[number] = task.double()
    masks = {name: {i: mask_of(name, side, i, t.shape) for i, t in each.items()} for name, each in tasks.items()}
    densities = {name: [DENSITY] * 3 for name in tasks}
    merged = reference.merge_model(tasks, weights, densities, Recipe(**recipe).rule(), masks=masks, scale=scale)
    # 4 is more than 1/density, and than what norms before and after a drop differ by.
    sizes = {name: sum(4 * abs(weights[i]) * t.abs() for i, t in each.items()) for name, each in tasks.items()}
    return merged, sizes


def mask_of(name, side, number, shape):
    place = {"seed": OPTIONS["seed"], "stream": stream_id(name, side), "adapter": number}
    return keep_mask(DENSITY, rows=range(shape[0]), columns=range(shape[1]), **place)


def assert_near(got, want, sizes, under=0.0):
    """Rounded are each of three terms, in its rescale, its weight and its sum, a quotient, the scale and the base."""
    bound = 8 * U * (want.abs() + sizes) + U * (under + want).abs()
    assert bool(((got.double() - under - want).abs() <= bound).all())


@pytest.mark.parametrize(("method", "convention"), CASES)
def test_into_a_base_is_the_textbook_whoever_computes_it(method, convention, factors, adapters, base, tmp_path):
    recipe = recipe_of(method, convention)
    want, sizes = textbook(factors, recipe, "delta")
    start = weights_of(base)
    assert any(bool(merged.any()) for merged in want.values())
    for way in WAYS:
        with computed_by(way) as how:
            merge_engine.merge_into(base, adapters, tmp_path / way, **how, **recipe)
        got = weights_of(tmp_path / way)
        for name, merged in want.items():
            assert_near(got[f"{name}.weight"], merged, sizes[name], start[f"{name}.weight"].double())
    assert bytes_of(tmp_path / "loops")["model.safetensors"] == bytes_of(tmp_path / "operators")["model.safetensors"]


@pytest.mark.parametrize(("method", "convention"), CASES)
def test_factors_are_the_textbook_whoever_computes_them(method, convention, factors, adapters):
    recipe = recipe_of(method, convention)
    found = {}
    for way in WAYS if convention == "peft" else ON_CPU:
        with computed_by(way) as how:
            found[way] = merge_engine.merge(adapters, space="factors", **how, **recipe).modules
        for side in "AB":
            want, sizes = textbook(factors, recipe, side)
            for name, merged in want.items():
                assert_near(getattr(found[way][name], side), merged, sizes[name])
    assert_same(found["operators"], found["loops"])


def assert_same(got, want):
    """To the bit, but for the sign of zeros."""
    assert got.keys() == want.keys()
    for name, result in want.items():
        assert torch.equal(got[name].A, result.A) and torch.equal(got[name].B, result.B), name


@pytest.mark.parametrize("way", WAYS)
def test_many_merges_and_a_session_give_the_bits_of_one_merge(way, factors, adapters):
    """All of them at once: they share products and thresholds. At full rank a merge is the textbook."""
    cases = CASES if way in ON_CPU else list(product(ROWS, ["mergekit"]))
    recipes = [{**recipe_of(method, convention), "rank": 12} for method, convention in cases]
    with computed_by(way) as how, merge_engine.Session(adapters, **how) as session:
        alone = [merge_engine.merge(adapters, **how, **recipe).modules for recipe in recipes]
        for recipe, want, many in zip(recipes, alone, merge_engine.merge_many(adapters, recipes, **how), strict=True):
            assert_same(many.modules, want)
            assert_same(session.merge(**recipe).modules, want)
    for (method, convention), merged in zip(cases, alone, strict=True):
        want, _ = textbook(factors, recipe_of(method, convention), "delta")
        for name in ("layers.0.q_proj", "layers.1.q_proj"):
            A, B, _ = merged[name]
            # A float32 decomposition of a 12 x 20 matrix is off by less than 100 units of its norm.
            assert float((B.double() @ A.double() - want[name]).norm()) <= 100 * U * float(want[name].norm())


@pytest.mark.parametrize("field", ["gamma", "mask", "min_tasks"])
def test_a_session_and_many_merges_tell_recipes_apart_that_differ_in_one_field(field, adapters):
    method = next(name for name in ROWS if looks_at(name, field))
    recipes = [{**recipe_of(method), field: value} for value in {"min_tasks": (1, 2, 3)}.get(field, (0.05, 0.3, 0.7))]
    alone = [merge_engine.merge(adapters, **recipe).modules for recipe in recipes]
    name = "layers.0.q_proj"
    assert not any(torch.equal(one[name].B, other[name].B) for one, other in pairwise(alone))
    with merge_engine.Session(adapters) as session:
        for recipe, want, many in zip(recipes, alone, merge_engine.merge_many(adapters, recipes), strict=True):
            assert_same(many.modules, want)
            assert_same(session.merge(**recipe).modules, want)


@pytest.mark.parametrize("way", ON_CPU)
def test_two_ranks_write_the_bytes_of_one(way, adapters, base, tmp_path, forks):
    names = ["-".join(case) for case in CASES]
    with computed_by(way) as how:
        for name, case in zip(names, CASES, strict=True):
            merge_engine.merge_into(base, adapters, tmp_path / "one" / name, **how, **recipe_of(*case))
    start = ["merge", "--into", base, *adapters]
    commands = [
        [*start, "-o", tmp_path / "two" / name, *options_of(recipe_of(*case))]
        for name, case in zip(names, CASES, strict=True)
    ]
    without = "from merge_engine.loops import door\ndoor.installed = lambda: False" if way == "operators" else ""
    done = forks.ranks(2, *commands, first=without)
    assert done.codes == [0, 0], done.err
    for name in names:
        assert bytes_of(tmp_path / "two" / name) == bytes_of(tmp_path / "one" / name), name


@pytest.mark.parametrize("way", ON_CPU)
def test_models_merge_as_the_adapters_that_they_differ_by(way, factors, adapters, base, tmp_path):
    """A model that is as its base in a module brings zeros there, which change nothing."""
    start, models = load_file(base / "model.safetensors"), []
    for number, adapter in enumerate(factors):
        tuned = {f"{name}.weight": start[f"{name}.weight"] + 2 * B @ A for name, (A, B) in adapter.items()}
        models.append(save_base(tmp_path / f"model{number}"))
        save_file({**start, **tuned}, models[-1] / "model.safetensors", metadata={"format": "pt"})
    with computed_by(way) as how:
        for method in ROWS:
            recipe = recipe_of(method)
            merge_engine.merge_models(base, models, tmp_path / "models" / method, **how, **recipe)
            merge_engine.merge_into(base, adapters, tmp_path / "adapters" / method, **how, **recipe)
            got, want = (weights_of(tmp_path / kind / method) for kind in ("models", "adapters"))
            assert all(torch.equal(got[f"{name}.weight"], want[f"{name}.weight"]) for name in SHAPES), method


@pytest.mark.parametrize("method", METHODS)
def test_fields_that_a_method_does_not_know_are_refused_by_name(method):
    given = {"gamma": 0.2, "mask": 0.3, "min_tasks": 1, "balance": "pico", "ridge": 0.5}
    assert given.keys() == STRICT
    for field in STRICT:
        if looks_at(method, field):
            assert Recipe(method=method, **{field: given[field]}).as_dict()[field] == given[field]
        else:
            with pytest.raises(RecipeError, match=f"^{field}: {method} "):
                Recipe(method=method, **{field: given[field]})


def test_a_band_has_thresholds_of_each_tensor():
    for method in ("breadcrumbs", "breadcrumbs_ties"):
        with pytest.raises(RecipeError, match=f"^scope: {method} has thresholds for each tensor, wanted tensor"):
            Recipe(method=method, scope="model")
        assert Recipe(method=method, convention="paper").rule().scope == "tensor"
        assert Recipe(method=method, convention="paper").rule().trim_ties == "keep"


@pytest.mark.parametrize(
    ("method", "field", "wanted", "values"),
    [
        ("breadcrumbs", "gamma", "a number from 0 up to, but not, 1", [-0.1, 1.0, 2]),
        ("breadcrumbs", "gamma", "a finite number", ["x", True, math.nan, None]),
        ("consensus", "mask", "a number above 0", [0, -1.0]),
        ("consensus", "mask", "a finite number", ["x", math.inf, None]),
        ("consensus", "min_tasks", "a whole number of at least 0", [-1, 1.5, True, "2", None]),
    ],
)
def test_values_out_of_range_are_refused_by_name(method, field, wanted, values):
    for value in values:
        with pytest.raises(RecipeError, match=f"^{field}: wanted {wanted}, got {value!r}"):
            Recipe(method=method, **{field: value})


def test_a_consensus_of_more_tasks_than_there_are_is_refused(adapters):
    with pytest.raises(RecipeError, match=r"^min_tasks: wanted at most 3, one for each input, got 4"):
        merge_engine.merge(adapters, method="consensus", min_tasks=4)
    with pytest.raises(RecipeError, match=r"^min_tasks: wanted at most 1"):
        merge_engine.merge(adapters[:1], method="consensus")


def test_options_of_the_command_are_those_of_the_recipe(adapters, tmp_path, capsys):
    for recipe in (
        {"method": "breadcrumbs", "density": 0.3, "gamma": 0.2},
        {"method": "consensus", "mask": 0.7, "min_tasks": 1},
    ):
        out, want = tmp_path / recipe["method"], tmp_path / f"{recipe['method']}-want"
        assert main(["merge", *map(str, adapters), "-o", str(out), *options_of(recipe)]) == 0, capsys.readouterr()
        merge_engine.merge(adapters, want, **recipe)
        assert bytes_of(out)["adapter_model.safetensors"] == bytes_of(want)["adapter_model.safetensors"]


def test_a_sweep_leaves_a_field_out_of_the_methods_that_do_not_look_at_it():
    axes = {"method": ["breadcrumbs", "consensus", "elect_max"], "gamma": [0.0, 0.1], "min_tasks": [1, 2]}
    assert [trial.name for trial in sweep_trials(axes, {}, 3)] == [
        "breadcrumbs,gamma=0",
        "breadcrumbs,gamma=0.1",
        "consensus,min_tasks=1",
        "consensus,min_tasks=2",
        "elect_max",
    ]


# The arithmetic of rows that PEFT does not have, element by element in Python's floats, as its authors describe it.


def kept_by_hand(values, recipe):
    """A list of numbers, of which the largest magnitudes are dropped, the next ones are kept, and others are 0."""
    n, paper = len(values), recipe.convention == "paper"
    k = min(int(recipe.density * n) + paper, n)
    k = n if recipe.density == 1 else max(k, 1) if recipe.convention == "mergekit" else k
    top = min(int(recipe.gamma * n), n - k)
    order = sorted(range(n), key=lambda i: (-abs(values[i]), i))
    dropped, kept = set(order[:top]), set(order[top : top + k])
    if paper:  # all that equal the last that is dropped go, and of the others all that equal the last that is kept stay
        highest = abs(values[order[top - 1]]) if top else math.inf
        least = abs(values[order[top + k - 1]])
        kept = {i for i in range(n) if least <= abs(values[i]) < highest}
    return [x if i in kept - dropped else 0.0 for i, x in enumerate(values)]


def sign(x):
    return (x > 0) - (x < 0)


def vote_by_hand(column, recipe):
    return sign(sum(map(sign, column)) if recipe.election == "frequency" else math.fsum(column))


def merged_by_hand(column, recipe, tied):
    """Of the weighted numbers of one place."""
    total = math.fsum(column)
    if recipe.method == "breadcrumbs":
        return total
    if recipe.method == "consensus":
        passing = [x for x in column if abs(x) > recipe.mask * abs(total - x)]
        return total if len(passing) >= recipe.min_tasks else 0.0
    elected = vote_by_hand(column, recipe) or tied
    agreeing = [x for x in column if sign(x) == elected]
    return elected * max(map(abs, agreeing), default=0.0) if recipe.method == "elect_max" else math.fsum(agreeing)


def columns_by_hand(tensors, weights, recipe):
    """The weighted numbers of each place, after the keep."""
    lists = [tensor.flatten().tolist() for tensor in tensors]
    if recipe.method.startswith("breadcrumbs"):
        lists = [kept_by_hand(values, recipe) for values in lists]
    return list(zip(*([w * x for x in values] for w, values in zip(weights, lists, strict=True)), strict=True))


def by_backend(way, tensors, weights, recipe, tied, device):
    """The same by a backend, as the engine has it merge a module of these tensors."""
    (rows, columns), names = tensors[0].shape, tuple(range(len(tensors)))
    densities = recipe.densities_for("m", names)
    module = ModulePlan("m", rows, columns, names, weights, (1.0,) * len(names), densities, 1)
    plan = Plan((), recipe, recipe.rule(), (module,), torch.float32)
    if way == "kernels":
        pytest.importorskip("triton")
        from merge_engine.kernels.source import Dense as Slab

        from merge_engine.engine.triton_backend import TritonBackend

        packed = Slab(torch.stack(tensors)[None].to(device))
        return TritonBackend(device).merge(Group(plan, [module], "delta", packed, {}, tied))[0].cpu()
    with computed_by(way):
        return TorchBackend().merge(Group(plan, [module], "delta", [Dense(t) for t in tensors], {}, tied))[0]


def assert_all_are_by_hand(ways, tensors, weights, recipe, device):
    """Whole numbers times powers of two: every sum is exact, and so is the result."""
    columns = columns_by_hand(tensors, weights, recipe)
    balance = sum(vote_by_hand(column, recipe) for column in columns)
    tied = 1 if recipe.convention != "paper" or balance > 0 else -1  # the majority of the paper's model
    merged = [merged_by_hand(column, recipe, tied) for column in columns]
    want = torch.tensor(merged, dtype=torch.float64).view_as(tensors[0])
    densities = {"m": recipe.densities_for("m", [str(i) for i in range(len(tensors))])}
    book = reference.merge_model({"m": dict(enumerate(tensors))}, weights, densities, recipe.rule())["m"]
    assert torch.equal(book.double(), want)
    for way in ways:
        assert torch.equal(by_backend(way, tensors, weights, recipe, tied, device).double(), want), way


@st.composite
def merges(draw, methods, **fields):
    """Tensors of small whole numbers, of which many are equal, weights, and a recipe."""
    rows, columns, count = draw(st.integers(1, 6)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    largest = draw(st.sampled_from([0, 1, 3, 40]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    tensors = [torch.randint(-largest, largest + 1, (rows, columns), generator=generator).float() for _ in range(count)]
    if draw(st.booleans()):
        tensors[0] = torch.full((rows, columns), float(largest))
    weights = draw(st.lists(st.sampled_from([1.0, 2.0, 0.5, -1.0, -0.25, 0.0]), min_size=count, max_size=count))
    chosen = {"method": draw(st.sampled_from(methods)), "convention": draw(st.sampled_from(sorted(CONVENTIONS)))}
    return tensors, tuple(weights), Recipe(**chosen, **{field: draw(values) for field, values in fields.items()})


ELECTIONS = st.sampled_from(["total", "frequency"])
BANDS = merges(
    ["breadcrumbs", "breadcrumbs_ties"],
    density=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    gamma=st.sampled_from([0.0, 0.1, 0.3, 0.6, 0.95]),
    election=ELECTIONS,
)


LARGEST = merges(["elect_max"], election=ELECTIONS)
CONSENSUS = merges(["consensus"], mask=st.sampled_from([0.25, 0.5, 1.0, 2.0]), min_tasks=st.integers(0, 4))
ANY = st.one_of(BANDS, LARGEST, CONSENSUS)


@settings(max_examples=150)
@given(merge=BANDS)
def test_bands_by_hand(merge, device):
    """Equal magnitudes, nothing or much at the top, gamma + density above 1, and tensors of one number."""
    assert_all_are_by_hand(ON_CPU, *merge, device)


@settings(max_examples=75)
@given(merge=LARGEST)
def test_the_largest_by_hand(merge, device):
    assert_all_are_by_hand(ON_CPU, *merge, device)


@settings(max_examples=75)
@given(merge=CONSENSUS)
def test_a_consensus_by_hand(merge, device):
    assert_all_are_by_hand(ON_CPU, *merge, device)


@settings(max_examples=20)
@given(merge=ANY)
def test_kernels_by_hand(merge, device):
    assert_all_are_by_hand(["kernels"], *merge, device)


@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_is_rescaled_to_its_norm_unless_that_is_tiny(way, device):
    """mergekit's bound is 1e-7; the norms here are 2**-24 and 2**-21."""
    recipe = Recipe(method="dare_linear", convention="mergekit", density=0.5)
    tiny, small = (by_backend(way, [torch.full((4, 8), 2.0**-n)], (1.0,), recipe, 1, device) for n in (29, 26))
    kept = tiny != 0
    assert 0 < int(kept.sum()) < 32 and torch.equal(tiny, kept * 2.0**-29)
    torch.testing.assert_close(small, kept * (2.0**-21 / int(kept.sum())), rtol=2**-22, atol=0)


def test_a_consensus_of_no_tasks_is_linear(adapters, base, tmp_path):
    for way in WAYS:
        with computed_by(way) as how:
            for method, more in (("linear", {}), ("consensus", {"min_tasks": 0})):
                merge_engine.merge_into(base, adapters, tmp_path / way / method, method=method, **more, **how)
        got, want = (weights_of(tmp_path / way / method) for method in ("consensus", "linear"))
        assert all(torch.equal(got[key], tensor) for key, tensor in want.items()), way
