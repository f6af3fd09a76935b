"""Merges into a base on a device: what comes back is waited for, and host memory does not grow with the model."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from late_copies import LateCopies
from toy_models import bytes_of, save_adapter, save_base

import merge_engine
from merge_engine.into import merge as into_merge
from merge_engine.into import write
from merge_engine.into.write import within

pytest.importorskip("triton")
from merge_engine.engine.triton_backend import TritonBackend

ROWS, COLUMNS, LAYERS = 24, 40, 12
SHAPES = {f"model.layers.{i}.q_proj": (ROWS, COLUMNS) for i in range(LAYERS)}
EACH = ROWS * COLUMNS * 2  # bytes of a module in bfloat16
FACTORS = 2 * (4 * 16 * (ROWS + COLUMNS) + 4)  # and of its two adapters, packed to rank 16 in float32, with scalings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("flight")
    base = save_base(root / "base", shapes=SHAPES)
    return base, [save_adapter(root / name, seed, SHAPES, SHAPES) for seed, name in enumerate("ab")]


def merged(model, out, monkeypatch, copies, **recipe):
    monkeypatch.setattr(into_merge, "choose", lambda backend: TritonBackend(torch.device("cpu"), copies))
    merge_engine.merge_into(*model, out, **recipe)
    return bytes_of(out)


@pytest.mark.parametrize("recipe", [{"method": "linear"}, {"method": "linear", "space": "factors"}], ids=str)
def test_results_are_waited_for(model, tmp_path, monkeypatch, recipe):
    """They are NaN before, which no merge would write."""
    want = merged(model, tmp_path / "want", monkeypatch, None, **recipe)
    assert merged(model, tmp_path / "late", monkeypatch, LateCopies(), **recipe) == want


@pytest.mark.quick
def test_what_is_in_flight_is_bounded(model, tmp_path, monkeypatch):
    """Groups of two modules: one is merged, one waits, one is read. A result is made, one waits, one is written."""
    monkeypatch.setattr(write, "GROUP_BYTES", 2 * EACH)
    copies = LateCopies()
    got = merged(model, tmp_path / "small", monkeypatch, copies, method="linear")
    assert copies.most["up"] <= 3 * 2 * (EACH + FACTORS) and copies.most["down"] <= 3 * EACH
    monkeypatch.undo()
    whole = LateCopies()
    assert merged(model, tmp_path / "large", monkeypatch, whole, method="linear") == got
    assert whole.most["up"] == LAYERS * (EACH + FACTORS)


@pytest.mark.quick
@settings(max_examples=30)
@given(groups=st.lists(st.lists(st.integers(0, 9), min_size=1), max_size=4), most=st.integers(1, 20))
def test_groups_within_a_number_of_bytes(groups, most):
    cut = within(groups, int, most)
    assert [size for group in cut for size in group] == [size for group in groups for size in group]
    assert all(len(group) > 0 and (sum(group) <= most or len(group) == 1) for group in cut)
    ends = {sum(map(len, groups[: i + 1])) for i in range(len(groups))}
    place = 0
    for group, following in pairwise(cut):
        place += len(group)
        # A group ends where one ended before, or where the next module would be too much.
        assert place in ends or sum(group) + following[0] > most
