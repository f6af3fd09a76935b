"""The norm of a large matrix, and its products with a few vectors.

On a CPU with one thread, compiled loops compute them where Numba is installed and the matrix is not small; else torch's
operators do. BLAS is made for square blocks: with sixteen vectors it reaches less than half of its best speed. The
loops keep the sums of several rows and vectors in registers, and read the matrix once for every four vectors, mostly
from a cache.
"""

from types import ModuleType

import torch
from torch import Tensor

from merge_engine.loops import door

_SMALL = 1 << 16  # elements of a matrix up to which operators do: the loops need not be loaded, nor compiled
_MOST = 64  # vectors that loops multiply with columns, at most: the sums of more do not fit the L2 cache
_LONGEST = 1 << 21  # elements of vectors that loops multiply with rows, at most: they are read for every six rows


def times(block: Tensor, matrix: Tensor) -> Tensor:
    """block [p, N] @ matrix.T in float64: matrix is float32 [M, N], block of any float dtype.

    On a GPU sums are in float64, by BLAS in float32, and in the loops in float32 up to some hundred terms. The error is
    some 2**-21 |block| |matrix| for N of some thousands, or less.
    """
    if matrix.is_cuda:
        return _in_float64(block, matrix)
    narrow, loops = block.float(), _loops(matrix)
    if loops is None:
        return (narrow @ matrix.T).double()
    vectors = torch.nn.functional.pad(narrow, (0, 0, 0, -len(narrow) % 4)).contiguous()  # in fours
    if matrix.is_contiguous() and len(matrix) >= loops.DOTS and vectors.numel() <= _LONGEST:
        out = torch.empty(len(vectors), len(matrix), dtype=torch.float64)
        loops.times_rows(vectors.numpy(), matrix.numpy(), out.numpy())
    elif matrix.T.is_contiguous() and len(vectors) <= _MOST:
        columns = matrix.T
        even = len(columns) // loops.SUMS * loops.SUMS
        out = torch.empty(len(vectors), len(matrix), dtype=torch.float64)
        part = torch.empty(out.shape, dtype=torch.float32)
        loops.times_columns(vectors[:, :even].contiguous().numpy(), columns[:even].numpy(), part.numpy(), out.numpy())
        out += vectors[:, even:] @ columns[even:]
    else:
        return (narrow @ matrix.T).double()
    return out[: len(narrow)]


def _in_float64(block: Tensor, matrix: Tensor) -> Tensor:
    """block @ matrix.T, some rows at a time. In float32 a GPU would use TF32, of 10 bits, if the program allows it."""
    wide = block.double()
    return torch.cat([wide @ rows.double().T for rows in matrix.split(512)], dim=1)


def squared_norm(matrix: Tensor) -> float:
    """|D|_F^2 of a float32 matrix, summed in float64."""
    if (loops := _loops(matrix)) and matrix.is_contiguous():
        return float(loops.squared_norm(matrix.flatten().numpy()))
    total = torch.zeros((), dtype=torch.float64, device=matrix.device)
    for rows in matrix.split(max(1, 2**17 // matrix.shape[1])):
        wide = rows.double().flatten()
        total += wide.dot(wide)
    return float(total)


def _loops(matrix: Tensor) -> ModuleType | None:
    large = matrix.device.type == "cpu" and matrix.numel() > _SMALL and torch.get_num_threads() == 1
    return door.matrix_loops() if large else None
