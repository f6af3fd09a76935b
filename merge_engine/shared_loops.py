"""The innermost loop of merges that differ in weights only, compiled by Numba: see `loops`, whose bits it gives."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import numpy as np

from merge_engine.loops import _F0, _F1, _compiled, _cut


@_compiled
def merge_weighted(values, below, above, row, column, elects, by_sign, tied_plus, counts, weights, out):
    """out[s] = sum_i weights[s, i] x_i over what agrees with the vote of all x, and over its count.

    values: [n, rows, columns]; x_i is what a trim leaves of values[i], by its limits as in `loops.add_kept`, one of
    each an adapter. weights: [s, n]. out: [s, rows, columns]. elects: whether there is a vote at all; by_sign,
    tied_plus, counts: by what, who wins a tie, and whether the sum is divided by how many agree.
    """
    n, columns = values.shape[0], values.shape[2]
    kept, votes, count = (
        np.empty((n, columns), np.float32),
        np.empty(columns, np.float32),
        np.empty(columns, np.float32),
    )
    for i in range(values.shape[1]):
        votes[:] = _F0
        count[:] = _F0
        for k in range(n):
            cut = _cut(i, row[k], column[k], columns)
            for start, stop, limit in ((0, cut, below[k]), (cut, columns, above[k])):
                _vote(values[k, i, start:stop], limit, by_sign, votes[start:stop], kept[k, start:stop])
        if elects:
            for k in range(n):
                _agree(votes, tied_plus, kept[k], count)
        for s in range(weights.shape[0]):
            total = out[s, i]
            total[:] = _F0
            for k in range(n):
                _add(kept[k], weights[s, k], total)
            if counts:
                _divide(total, count)


@_compiled
def _vote(t, limit, by_sign, votes, kept):
    for j in range(len(t)):
        x = t[j] if abs(t[j]) > limit else _F0
        kept[j] = x
        votes[j] += np.float32(x > _F0) - np.float32(x < _F0) if by_sign else x


@_compiled
def _agree(votes, tied_plus, kept, count):
    for j in range(len(kept)):
        x = kept[j]
        elects_plus = (votes[j] > _F0) | ((votes[j] == _F0) & tied_plus)
        agrees = (x > _F0) & elects_plus | (x < _F0) & (not elects_plus)
        kept[j] = x if agrees else _F0
        count[j] += np.float32(agrees)


@_compiled
def _add(kept, weight, total):
    for j in range(len(kept)):
        total[j] += kept[j] * weight


@_compiled
def _divide(total, count):
    for j in range(len(total)):
        total[j] /= count[j] if count[j] != _F0 else _F1
