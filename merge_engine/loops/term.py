"""What the compiled loops read of one adapter in one module."""

import numpy as np

# b, a: addresses of B [rows, rank] and A [rank, columns], rank being a multiple of 8; where it is 0, b is that of a
# tile's values. A trim keeps |t| > below before (row, column) of the tensor and |t| > above from there on. Where drops
# is 1, a drop keeps what `cpu.mask.keep_mask` says, and then divides and multiplies it. ballot: the weight of the
# adapter's vote; share: what it adds to the divisor where it agrees.
TERM = np.dtype(
    [
        *((name, np.int64) for name in ("b", "a", "rank", "columns")),
        ("scaling", np.float32),
        *((name, np.float32) for name in ("below", "above")),
        *((name, np.int64) for name in ("row", "column", "drops")),
        *((name, np.uint64) for name in ("threshold", "stream", "adapter", "key0", "key1")),
        *((name, np.float32) for name in ("divisor", "factor", "ballot", "share")),
    ]
)
