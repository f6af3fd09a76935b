"""Every method of whole tensors against its formula in float64, on whole tensors, in both conventions."""

import itertools
import math

import numpy as np
import pytest
import torch

from merge_engine.errors import RecipeError
from merge_engine.loops import door
from merge_engine.rules.philox import keep_threshold, philox, stream_id
from merge_engine.rules.whole_methods import WHOLE_METHODS
from merge_engine.whole_tensors import group as groups
from merge_engine.whole_tensors.group import Group
from merge_engine.whole_tensors.ranks import chances_of_ranks, keep_by_rank
from merge_engine.whole_tensors.table import FUNCTIONS, merge_group

SHAPES = [(7,), (1, 1), (5, 13), (64, 257), (3, 4, 5), (0, 3)]


def words(shape, adapter, seed=3):
    """The random words of a task tensor, by the textbook of Philox."""
    rows, columns = math.prod(shape[:-1]), shape[-1]
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    four = philox((column >> 2, row, np.full_like(row, stream_id("x", "delta")), np.full_like(row, adapter)), (seed, 0))
    return torch.from_numpy(np.choose(column & 3, four).astype(np.int64)).reshape(shape)


def largest(task, k):
    mask = torch.zeros(task.numel(), dtype=torch.bool)
    mask[task.abs().flatten().argsort(descending=True, stable=True)[:k]] = True
    return mask.reshape(task.shape)


def to_norm(task, kept, rescale):
    return kept * (task.abs().sum() / kept.abs().sum()) if rescale and kept.any() else kept


def kept_of(method, task, number, options, published):
    """keep(x - base) of the family of task arithmetic."""
    density, rescale = options["density"][number], options["rescale"]
    if method == "task_arithmetic" or density >= 1 or not task.numel():
        return task
    k = int(density * task.numel())
    if method == "ties":
        k = max(k, 0 if published else 1)
        return to_norm(task, task * largest(task, k), rescale)
    if "breadcrumbs" in method:
        top = min(int(options["gamma"][number] * task.numel()), task.numel() - k)
        return to_norm(task, task * (largest(task, top + k) & ~largest(task, top)), rescale)
    chance = torch.full(task.shape, density, dtype=torch.float64)
    if "della" in method:
        length = task.shape[-1]
        ranks = task.abs().argsort(dim=-1, stable=True).argsort(-1).double()
        if length > 1:
            chance = density - options["epsilon"][number] * (1 - 2 * ranks / (length - 1))
    kept = task * (words(task.shape, number) < torch.round(chance * 2**32))
    return to_norm(task, kept, rescale) if not published else kept / chance if rescale else kept


def arithmetic(method, tensors, base, options, published):
    weights = options["weight"]
    kept = [kept_of(method, x - base, i, options, published) for i, x in enumerate(tensors)]
    terms = torch.stack([w * k for w, k in zip(weights, kept, strict=True)])
    shape = (-1, *[1] * base.ndim)
    shares = torch.tensor(weights, dtype=torch.float64).reshape(shape).expand_as(terms)
    if method in ("ties", "dare_ties", "breadcrumbs_ties", "della"):
        agrees = terms.sign() == torch.where(terms.sum(0) >= 0, 1.0, -1.0)
        terms, shares = terms * agrees, shares * agrees
    divisor = shares.sum(0) if options["normalize"] else torch.ones_like(base)
    return base + options["lambda"] * terms.sum(0) / torch.where(divisor.abs() < 1e-8, 1.0, divisor)


def arc(a, b, t, straight=1.0):
    """slerp of two vectors."""
    cosine = (a @ b / (a.norm() * b.norm())).clamp(-1, 1) if a.norm() * b.norm() > 0 else torch.tensor(0.0).double()
    angle = torch.arccos(cosine)
    if angle.sin() < 1e-12 or cosine.abs() > straight:
        return (1 - t) * a + t * b
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / angle.sin()


def slerp(tensors, base, options, published):
    return arc(base.flatten(), tensors[0].flatten(), options["t"], 1.0 if published else 0.9995).reshape(base.shape)


def nuslerp(tensors, base, options, published):
    start = 0 if base is None else base
    one, two = (x - start for x in tensors)
    t = options["weight"][1] / sum(options["weight"])
    if options["nuslerp_flatten"] or one.ndim < 2:
        return start + arc(one.flatten(), two.flatten(), t).reshape(one.shape)
    if options["nuslerp_row_wise"]:  # mergekit's name: every column
        lines = zip(one.flatten(1).t(), two.flatten(1).t(), strict=True)
        return start + torch.stack([arc(a, b, t) for a, b in lines], 1).reshape(one.shape)
    lines = zip(one.reshape(-1, one.shape[-1]), two.reshape(-1, one.shape[-1]), strict=True)
    return start + torch.stack([arc(a, b, t) for a, b in lines]).reshape(one.shape)


def multislerp(tensors, base, options, published):
    start = 0 if base is None else base
    tasks, weights = [x - start for x in tensors], torch.tensor(options["weight"], dtype=torch.float64)
    weights = weights / weights.sum() if options["normalize_weights"] else weights
    mean = sum(w * task / task.norm() for w, task in zip(weights, tasks, strict=True))
    return start + mean / mean.norm() * sum(w * task.norm() for w, task in zip(weights, tasks, strict=True))


def karcher(tensors, base, options, published):
    units = [x / x.norm() for x in tensors]
    mean = sum(units) / sum(units).norm()
    for _ in range(options["max_iter"]):
        angles = [torch.arccos((mean * unit).sum().clamp(-1, 1)) for unit in units]
        logs = [
            angle / angle.sin() * (unit - angle.cos() * mean) if angle >= options["tol"] else 0 * unit
            for angle, unit in zip(angles, units, strict=True)
        ]
        step = sum(logs) / len(units)
        if step.norm() < options["tol"]:
            break
        mean = step.norm().cos() * mean + step.norm().sin() / step.norm() * step
    return mean / mean.norm() * sum(x.norm() for x in tensors) / len(tensors)


def model_stock(tensors, base, options, published):
    if options["filter_wise"]:
        rows = [x.reshape(-1, base.shape[-1]) for x in (base, *tensors)]
        whole = {**options, "filter_wise": False}
        parts = zip(*rows, strict=True)
        return torch.stack([model_stock(x, b, whole, published) for b, *x in parts]).reshape(base.shape)
    tasks, count, floor = [x - base for x in tensors], len(tensors), 0 if published else 1e-6
    cosines = [(a * b).sum() / max(a.norm() * b.norm(), floor) for a, b in itertools.combinations(tasks, 2)]
    cosine = sum(cosines) / len(cosines)
    t = count * cosine / (1 + (count - 1) * cosine)
    return t * sum(tensors) / count + (1 - t) * base


def sce(tensors, base, options, published):
    tasks = torch.stack([x - base for x in tensors])
    if options["select_topk"] < 1:
        variance = tasks.var(0, unbiased=False)
        tasks = tasks * largest(variance, int(variance.count_nonzero() * options["select_topk"]))
    squares = tasks.square().reshape(len(tasks), -1).mean(1)
    even = squares.sum() == 0 or (squares.sum() < 1e-6 and not published)
    weights = torch.ones(len(tasks)).double() / len(tasks) if even else squares / squares.sum()
    agrees = tasks.sign() == torch.where(tasks.sum(0) >= 0, 1.0, -1.0)
    shares = agrees * weights.reshape(-1, *[1] * base.ndim)
    divisor = shares.sum(0)
    divisor = torch.where(divisor == 0, 1.0, divisor) if published else divisor.clamp(min=1e-6)
    return base + (tasks * shares).sum(0) / divisor


def nearswap(tensors, base, options, published):
    apart = (tensors[0] - base).abs().clamp(min=1e-300 if published else 1e-6)
    share = (options["t"] / apart).clamp(0, 1)
    return share * tensors[0] + (1 - share) * base


def arcee_fusion(tensors, base, options, published):
    p, q = ((x.softmax(-1) + 1e-8) for x in (tensors[0], base))
    importance = (tensors[0] - base).abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    values = importance.flatten().sort().values
    first, median, third = (values[int(share * (len(values) - 1))] for share in (0.25, 0.5, 0.75))
    return torch.where(importance >= median + 1.5 * (third - first), tensors[0], base)


def ram(tensors, base, options, published, gains=None):
    tasks = torch.stack([x - base for x in tensors])
    used = tasks.abs() > options["epsilon"]
    count = used.sum(0)
    gains = torch.ones(len(tasks)) if gains is None else gains
    alone = (tasks * used * gains.reshape(-1, *[1] * base.ndim)).sum(0)
    return base + torch.where(count > 1, (tasks * used).sum(0) / count.clamp(min=1), alone)


def ramplus_tl(tensors, base, options, published):
    used = torch.stack([(x - base).abs() > options["epsilon"] for x in tensors])
    shared = torch.stack([(u & (used.sum(0) > 1)).sum() for u in used]).double()
    alone = torch.stack([(u & (used.sum(0) == 1)).sum() for u in used]).double()
    share = shared / alone.clamp(min=options["epsilon"])
    return ram(tensors, base, options, published, 1 + options["r"] * share.clamp(0, options["alpha"]))


def linear(tensors, base, options, published):
    total = sum(w * x for w, x in zip(options["weight"], tensors, strict=True))
    return total / sum(options["weight"]) if options["normalize"] else total


def passthrough(tensors, base, options, published):
    return tensors[0] * (1 if options["scale"][0] is None else options["scale"][0])


OF_ONE = {"t": 0.3, "select_topk": 0.4, "lambda": 0.8, "epsilon": 0.2}
OF_EACH = {"weight": (0.5, 0.7, -0.25), "density": (0.5, 0.3, 0.6), "gamma": (0.05,) * 3, "epsilon": (0.1,) * 3}
OF_EACH["scale"] = (1.5, 0.5, 2.0)
SWITCHES = ("normalize", "rescale", "nuslerp_flatten", "nuslerp_row_wise", "normalize_weights", "filter_wise")


def cases():
    for name, row in WHOLE_METHODS.items():
        switches = [key for key in SWITCHES if key in row.options]
        for values in itertools.product((False, True), repeat=len(switches)):
            yield pytest.param(name, dict(zip(switches, values, strict=True)), id=f"{name}-{values}")


def options_of(method, switches, count):
    found = {}
    for name, option in WHOLE_METHODS[method].options.items():
        if option.of == "merge":
            found[name] = OF_ONE.get(name, option.default)
        elif name in OF_EACH:
            found[name] = OF_EACH[name][:count]
    return found | switches


@pytest.mark.quick
@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize(("method", "switches"), list(cases()))
def test_a_method_is_its_formula(method, switches, published):
    row = WHOLE_METHODS[method]
    count = {1: 1, 2: 1}.get(row.most, 2 if row.others == (2, 2) else 3)
    options = options_of(method, switches, count)
    for number, shape in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(number)
        base = torch.randn(shape, generator=generator)
        tensors = [base + 0.5 * torch.randn(shape, generator=generator) for _ in range(count)]
        for under in {"needed": [base], "none": [None], "optional": [base, None]}[row.base]:
            if not base.numel():
                merge_group(method, Group("x.weight", tensors, under, torch.empty(shape), options, 3, published))
                continue
            out = torch.full(shape, torch.nan)
            merge_group(method, Group("x.weight", tensors, under, out, options, 3, published))
            # the differences are those of float32, as they are merged
            start = torch.zeros(shape) if under is None else under
            exact = [(x - start).double() + start.double() for x in tensors]
            formula = globals().get(method)
            arguments = exact, None if under is None else under.double(), options, published
            want = arithmetic(method, *arguments) if formula is None else formula(*arguments)
            size = sum(x.abs() for x in exact) + start.abs().double()
            assert ((out.double() - want).abs() <= 2**-24 * 24 * (size + want.abs()) + 1e-12).all(), (shape, under)


def test_the_table_has_a_function_for_each_row():
    assert FUNCTIONS.keys() == WHOLE_METHODS.keys()


@pytest.mark.parametrize("method", ["sce", "model_stock", "nearswap", "slerp"])
def test_floors_matter_where_models_are_close(method):
    """Differences of 1e-5: the two conventions differ, and each follows its own formula."""
    generator = torch.Generator().manual_seed(0)
    base = torch.zeros(40, 50) if method != "slerp" else torch.randn(40, 50, generator=generator)
    scales = [1e-5, 3e-5, 1e-4] if method != "model_stock" else [1e-5] * 3
    shared = torch.randn(40, 50, generator=generator)
    tensors = [base + s * (shared + torch.randn(40, 50, generator=generator)) for s in scales]
    tensors = tensors[:1] if method in ("nearswap", "slerp") else tensors
    if method == "slerp":
        tensors = [base + 0.02 * shared]
    options = options_of(method, {"filter_wise": True} if method == "model_stock" else {}, len(tensors))
    options |= {"t": 1e-9} if method == "nearswap" else {}
    results = []
    for published in (True, False):
        out = torch.empty(40, 50)
        merge_group(method, Group("x", tensors, base, out, options, 0, published))
        want = globals()[method]([x.double() for x in tensors], base.double(), options, published)
        assert (out.double() - want).norm() <= 1e-5 * (want - base.double()).norm()
        results.append(out)
    assert (results[0] - results[1]).norm() > 1e-6 * (results[0] - base).norm()


def test_a_negative_sum_of_weights_divides_too():
    generator = torch.Generator().manual_seed(3)
    base, one, two = (torch.randn(5, 7, generator=generator) for _ in range(3))
    for published in (True, False):
        options = {"weight": (0.5, -1.0), "density": (1.0, 1.0), "normalize": True, "rescale": False, "lambda": 0.8}
        out = torch.empty_like(base)
        merge_group("task_arithmetic", Group("x", [one, two], base, out, options, 0, published))
        want = base.double() + 0.8 * (0.5 * (one.double() - base) - (two.double() - base)) / -0.5
        assert (out - want).norm() <= 1e-6 * want.norm()
        merge_group(
            "linear", Group("x", [one, two], None, out, {"weight": (0.5, -1.0), "normalize": True}, 0, published)
        )
        want = (0.5 * one.double() - two) / -0.5
        assert (out - want).norm() <= 1e-6 * want.norm()


def merged_by(method, tensors, base, published, **options):
    out = torch.full(tensors[0].shape, torch.nan)
    merge_group(method, Group("x", tensors, base, out, options, 0, published))
    return out


@pytest.mark.quick
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("published", [True, False])
def test_what_formulas_say_at_their_edges(published, compiled, monkeypatch):
    """A band with little left below it, a zero among models on a sphere, a tied vote."""
    if not compiled:
        monkeypatch.setattr(door, "whole_loops", lambda *_: None)
    task = torch.arange(1.0, 11).view(2, 5)
    plain = {"weight": (1.0,), "normalize": False, "rescale": False, "lambda": 1.0}
    got = merged_by("breadcrumbs", [task], 0 * task, published, **plain, density=(0.5,), gamma=(0.95,))
    assert torch.equal(got, task * (task <= 5))  # nine of ten were to be dropped, and half is to be kept
    got = merged_by("karcher", [task, 0 * task, task], None, published, **options_of("karcher", {}, 3))
    torch.testing.assert_close(got, task * 2 / 3, rtol=2**-22, atol=0)
    assert torch.equal(merged_by("sce", [task, -task], 0 * task, published, select_topk=1.0), task)


def test_della_keeps_by_rank_and_on_average_everything():
    """Shares that are kept rise from density - epsilon to density + epsilon; the published mean is the tensor."""
    task = torch.randn(4000, 16, generator=torch.Generator().manual_seed(1))
    options = {
        "weight": (1.0,),
        "density": (0.5,),
        "epsilon": (0.2,),
        "normalize": False,
        "rescale": True,
        "lambda": 1.0,
    }
    out = torch.empty_like(task)
    merge_group("della_linear", Group("x", [task], torch.zeros_like(task), out, options, 0, True))
    ranks = task.abs().argsort(-1).argsort(-1)
    for rank in (0, 7, 15):
        share, want = (out[ranks == rank] != 0).float().mean().item(), 0.3 + 0.4 * rank / 15
        assert abs(share - want) < 5 * math.sqrt(want * (1 - want) / 4000)
    kept = out[out != 0] / task[out != 0]
    assert kept.min() >= 1 / 0.7 - 1e-6 and kept.max() <= 1 / 0.3 + 1e-6
    error = (out - task).mean().item()
    assert abs(error) < 5 * ((out - task).std() / math.sqrt(task.numel())).item()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("with_factors", [True, False])  # without them the loops sort only rows with many alike
@pytest.mark.parametrize(
    ("rows", "columns", "kind"),
    [(7, 300, "normal"), (3, 257, "few values"), (5, 1, "normal"), (4, 2000, "few values"), (4, 5000, "wide")],
)
def test_what_stays_by_rank(rows, columns, kind, with_factors, compiled, monkeypatch):
    generator = torch.Generator().manual_seed(rows)
    values = torch.randn(rows, columns, generator=generator)
    if kind == "few values":  # many equal magnitudes, and zeros of both signs
        values = (2 * values).round() / 2
    if kind == "wide":  # more octaves than bins, up to the largest number there is
        values = values.sign() * 2.0 ** (30 * values.abs().clamp(max=4) - 20)
        values[0, 0] = torch.finfo(torch.float32).max
    words = np.random.default_rng(0).integers(0, 2**32, (rows, columns), np.uint32)
    chances = chances_of_ranks(columns, 0.5, 0.25)
    kept, factors = torch.empty(rows, columns, dtype=torch.bool), torch.empty(rows, columns)
    if not compiled:
        monkeypatch.setattr(door, "rank_loops", lambda work: None)
    sizes = values.abs()
    keep_by_rank(sizes, words, chances, kept, factors if with_factors else None)
    order = np.argsort(values.abs().numpy(), axis=1, kind="stable")
    wanted = np.empty((rows, columns))
    np.put_along_axis(wanted, order, np.broadcast_to(chances, (rows, columns)), 1)
    assert np.array_equal(kept.numpy(), words < wanted * 2.0**32)
    assert torch.equal(sizes, values.abs() * kept)
    if with_factors:
        assert np.array_equal(factors.numpy(), np.where(kept.numpy(), 1 / wanted, 0).astype(np.float32))


def test_equal_magnitudes_take_ranks_in_order():
    chances = chances_of_ranks(4, 0.5, 0.25)
    assert np.allclose(chances, [0.25, 0.25 + 1 / 6, 0.25 + 2 / 6, 0.75])
    at = np.rint((chances + 1 / 12) * 2**32).astype(np.uint32)  # words between the chances of two ranks
    words, kept = np.array([[at[1], at[1], at[2], at[0]]]), torch.empty(1, 4, dtype=torch.bool)
    keep_by_rank(torch.tensor([[1.0, 1.0, 1.0, 0.0]]), words, chances, kept, None)
    assert kept.tolist() == [[False, True, True, False]]
    assert keep_threshold(1.0) == 2**32


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("linear", {"weight": (1.0, -1.0), "normalize": True}, "weight: linear divides by their sum, got 0 for x"),
        ("multislerp", {"weight": (1.0, -1.0), "normalize_weights": True, "eps": 1e-8}, "weight: multislerp divides"),
        (
            "della",
            {"weight": (1.0,) * 2, "density": (0.9,) * 2, "epsilon": (0.15,) * 2, "rescale": True},
            "epsilon: wanted density - epsilon and density . epsilon between 0 and 1, got density 0.9 and epsilon 0.15",
        ),
    ],
)
def test_what_cannot_be_merged_is_said(method, options, message):
    tensors = [torch.ones(2, 3), 2 * torch.ones(2, 3)]
    base = torch.zeros(2, 3) if WHOLE_METHODS[method].base == "needed" else None
    with pytest.raises(RecipeError, match=message):
        merge_group(method, Group("x", tensors, base, torch.empty(2, 3), options))


def test_directions_that_cancel_out():
    ones = torch.ones(2, 3)
    options = {"weight": (1.0, 1.0), "normalize_weights": True, "eps": 1e-8}
    out = torch.empty(2, 3)
    merge_group("multislerp", Group("x", [ones, -3 * ones], None, out, options))
    assert torch.equal(out, -ones)  # two opposite tensors: their mean
    three = {**options, "weight": (1.0, 1.0, 1.0)}
    angles = [torch.tensor([math.cos(a), math.sin(a)]) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    with pytest.raises(RecipeError, match="weight: multislerp: directions cancel out in x; wanted other weights"):
        merge_group("multislerp", Group("x", angles, None, torch.empty(2), {**three, "eps": 1e-6}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", ["slerp", "della", "model_stock", "sce", "karcher", "arcee_fusion", "ties"])
def test_stored_dtypes_are_widened_and_rounded_once(monkeypatch, method, dtype):
    monkeypatch.setattr(groups, "BLOCK", 64)  # many blocks
    row = WHOLE_METHODS[method]
    count = 1 if row.most == 2 else 2
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(9, 31, generator=generator).to(dtype)
    tensors = [(base + 0.5 * torch.randn(9, 31, generator=generator)).to(dtype) for _ in range(count)]
    options, under = options_of(method, {}, count), base if row.base == "needed" else None
    options |= {"normalize": True, "rescale": True} if "rescale" in row.options else {}
    options |= {"filter_wise": False} if method == "model_stock" else {}
    wide, out = torch.empty(9, 31), torch.empty(9, 31, dtype=dtype)
    merge_group(
        method, Group("x", [x.float() for x in tensors], None if under is None else base.float(), wide, options)
    )
    merge_group(method, Group("x", tensors, under, out, options))
    if dtype != torch.float64:
        assert torch.equal(out, wide.to(dtype))
    else:
        assert torch.allclose(out.float(), wide, rtol=1e-6, atol=1e-6)
