"""The check of results: it passes what is right, and sees one wrong element."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.harness.agreement import Arithmetic, Disagreement, check_kth, check_merge
from bench.harness.suite import agreed
from bench.harness.workloads import Task, Workload
from bench.kinds.deltas import tiled_merge
from bench.kinds.table import KINDS
from merge_engine.rules import reference

METHODS = ["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"]
SMALL = Workload("deltas", "ties", 48, 80)


@given(
    method=st.sampled_from(METHODS),
    rows=st.integers(1, 70),
    columns=st.integers(16, 90),
    adapters=st.integers(1, 5),
    rank=st.sampled_from([1, 4, 17]),
    density=st.sampled_from([0.1, 0.2, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
@settings(max_examples=40)
def test_results_of_every_shape_agree(method: str, **fields: Any) -> None:
    agreed(Workload("deltas", method, only=("tiled", "reference"), **fields), KINDS["deltas"], "cpu")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_contestants_agree(method: str, dtype: str) -> None:
    agreed(replace(SMALL, method=method, dtype=dtype), KINDS["deltas"], "cpu")


@pytest.mark.quick
@pytest.mark.parametrize("method", METHODS)
def test_one_wrong_element_is_a_disagreement(method: str) -> None:
    task = Task(replace(SMALL, method=method))
    right = tiled_merge(task)
    check_merge({"right": right}, task)
    place = right.abs().flatten().argmax()
    for wrong in (0.0, math.nan, float(right.flatten()[place]) * (1 + 1e-4)):
        off = right.clone()
        off.flatten()[place] = wrong
        with pytest.raises(Disagreement, match="off is wrong in 1 elements"):
            check_merge({"right": right, "off": off}, task)


def test_another_density_method_or_convention_is_a_disagreement() -> None:
    task = Task(replace(SMALL, rows=96))
    rivals = [replace(task.workload, density=0.25), replace(task.workload, method="magnitude_prune")]
    for rival in rivals:
        with pytest.raises(Disagreement):
            check_merge({"rival": tiled_merge(Task(rival))}, task)
    with pytest.raises(Disagreement):  # mergekit divides by the sum of the weights
        check_merge({"rival": tiled_merge(task)}, task, {"rival": Arithmetic("mergekit")})


def test_arithmetic_so_coarse_that_nothing_is_decided_is_a_disagreement() -> None:
    task = Task(SMALL)
    with pytest.raises(Disagreement, match="are decided"):
        check_merge({"coarse": tiled_merge(task)}, task, {"coarse": Arithmetic(unit=1.0)})


@pytest.mark.quick
def test_the_kth_magnitude_is_checked() -> None:
    task = Task(Workload("select", "magnitude_prune", 40, 60, adapters=1))
    order = reference.delta(*task.pairs[0], 2.0).abs().flatten().sort(descending=True).values
    check_kth(float(order[task.kept - 1]), task, "sort")
    for wrong in (order[task.kept - 2], order[task.kept]):
        with pytest.raises(Disagreement):
            check_kth(float(wrong), task, "sort")
