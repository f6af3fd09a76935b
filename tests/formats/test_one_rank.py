"""Factors of several ranks, rewritten at one."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

from merge_engine.formats.one_rank import COLUMNS, ROWS, RankAxis, padded, to_one_rank

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one.float(), two.float())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    kernel=st.sampled_from([(), (3,), (2, 3)]),
    dtype=st.sampled_from(DTYPES),
)
def test_zeros_are_below_a_and_right_of_b(tmp_path, ranks, kernel, dtype):
    file, tensors, axes = tmp_path / "factors.safetensors", {}, {}
    for number, rank in enumerate(ranks):
        tensors[f"{number}.A"] = random(rank, 5, *kernel, dtype=dtype)
        tensors[f"{number}.B"] = random(7, rank, *(1 for _ in kernel), dtype=dtype)
        axes |= {f"{number}.A": ROWS, f"{number}.B": COLUMNS}
    others = {"head": random(4, 2, dtype=dtype)}
    save_file({**tensors, **others}, file, {"format": "pt"})
    before = file.read_bytes()
    assert to_one_rank(file, axes, {"made": "here"}) == max(ranks)
    found = load_file(file)
    assert found.keys() == tensors.keys() | others.keys()
    assert same(found["head"], others["head"])
    for number, rank in enumerate(ranks):
        a, b = (tensors[f"{number}.{side}"].float() for side in "AB")
        more = max(ranks) - rank
        nothing = (0, 0) * len(kernel)
        assert same(found[f"{number}.A"], pad(a, (*nothing, 0, 0, 0, more)).to(dtype))
        assert same(found[f"{number}.B"], pad(b, (*nothing, 0, more)).to(dtype))
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == ({"format": "pt"} if len(set(ranks)) == 1 else {"made": "here"})
    assert (file.read_bytes() == before) is (len(set(ranks)) == 1)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(("experts", "own", "wanted"), [(3, 2, 5), (4, 1, 2)])
def test_the_factors_of_several_deltas_in_one_tensor(experts, own, wanted):
    """Expert e has rows e r to (e + 1) r of A and columns e, e + E, ... of B: its product stays what it was."""
    a, b = random(experts * own, 6), random(7, own * experts)
    wide_a, wide_b = padded(a, RankAxis(0, before=experts), wanted), padded(b, RankAxis(1, after=experts), wanted)
    assert (wide_a.shape, wide_b.shape) == ((experts * wanted, 6), (7, wanted * experts))
    for e in range(experts):
        rows = wide_a[e * wanted : (e + 1) * wanted]
        columns = wide_b[:, e::experts]
        assert torch.equal(rows[:own], a[e * own : (e + 1) * own]) and not rows[own:].any()
        assert torch.equal(columns[:, :own], b[:, e::experts]) and not columns[:, own:].any()


def test_a_factor_is_never_cut():
    with pytest.raises(ValueError, match=r"^a factor \[4, 6\] has rank 4, wanted at most 3$"):
        padded(random(4, 6), ROWS, 3)
