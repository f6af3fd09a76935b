"""NaN and Inf are found wherever they are, and named."""

import pytest
import torch

from merge_engine.runtime.finite import finite, what_is_wrong


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_finite_sees_each_element(dtype):
    largest = torch.finfo(dtype).max
    tensor = torch.full((37, 41), largest, dtype=dtype)
    tensor[::2] = -largest
    assert finite(tensor) and finite(tensor.T) and finite(tensor[:0]) and finite(tensor[3, 5])
    for place in ((0, 0), (36, 40), (17, 23)):
        for value in (float("nan"), float("inf"), -float("inf")):
            other = tensor.clone()
            other[place] = value
            assert not finite(other) and not finite(other.T)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_is_wrong_is_named(dtype):
    nan, inf = float("nan"), float("inf")
    for values, name in (([1, 2], None), ([1, inf], "Inf"), ([-inf, 2], "Inf"), ([nan, 2], "NaN"), ([inf, nan], "NaN")):
        tensor = torch.tensor(values, dtype=dtype).repeat(5, 3)
        assert what_is_wrong(tensor) == what_is_wrong(tensor.T) == name
    assert what_is_wrong(torch.empty(0, 3, dtype=dtype)) is None
