"""Methods that compare models before they merge them: Model Stock, SCE, NearSwap, Arcee Fusion and RAM.

Sources: Jang et al. 2024 (arXiv:2403.19522), Wan et al. 2024 (arXiv:2408.07990, SCE), Yuan et al. (arXiv:2601.13572,
RAM), the card of alchemonaut/QuartetAnemoi-70B-t0.0001 (NearSwap), and the behaviour of mergekit 0.1.5.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from merge_engine.cpu.keep import Trim
from merge_engine.cpu.select import trims_of_each
from merge_engine.cpu.source import Dense, at, filled, for_each_tile
from merge_engine.cpu.tile_grid import Tile, parts_of
from merge_engine.loops import door
from merge_engine.runtime.memory import new_tensor, scratch
from merge_engine.whole_tensors.group import BLOCK, Group, block, differences, flat, gram, sweep, widened

FLOOR = 1e-6  # of mergekit: norms, sums of weights and distances are not taken for smaller than this


def model_stock(group: Group) -> None:
    """t mean(x) + (1 - t) base, t = n c / (1 + (n - 1) c), c the mean cosine between the n differences.

    filter_wise: for every row (last dimension) on its own. t = 0 where the denominator is below 1e-6.
    mergekit's convention: products of two norms count as 1e-6 at least.
    """
    assert group.base is not None
    rows = group.options["filter_wise"] and group.out.ndim > 0
    base = group.rows_of(group.base) if rows else group.base.reshape(1, -1)
    models = [each.reshape(base.shape) for each in group.tensors]
    count, out = len(models), group.out.reshape(base.shape)
    if rows:
        found = sweep(base.shape, lambda part: _grams([block(each, part, base) for each in models]))
        products = np.concatenate(found) if found else np.zeros((0, count, count))
    else:
        products = gram(models, base)[None]
    shares = _stock_shares(products, 0.0 if group.published else FLOOR).astype(np.float32)
    lines = [each if rows else each.reshape(-1) for each in (*models, base, out)]

    def combine(part: slice) -> None:
        share = torch.from_numpy(shares[part, None]) if rows else float(shares[0])
        total = widened(lines[0], part, "total")
        for line in lines[1:count]:
            total.add_(widened(line, part, "block"))
        under = widened(lines[count], part, "base").mul_(1 - share)
        lines[-1][part] = total.div_(count).mul_(share).add_(under)

    sweep(base.shape, combine) if rows else flat(group, combine)


def _grams(values: Sequence[Tensor]) -> np.ndarray:
    """float64 [rows, n, n]: the inner products of n tensors, row by row."""
    stacked = torch.stack(list(values), 1).double()
    return (stacked @ stacked.transpose(1, 2)).numpy()


def _stock_shares(products: np.ndarray, floor: float) -> np.ndarray:
    """t of each row, from the inner products of the differences [rows, n, n]."""
    count = products.shape[1]
    norms = np.sqrt(products.diagonal(axis1=1, axis2=2))
    first, second = np.triu_indices(count, 1)
    size = np.maximum(norms[:, first] * norms[:, second], floor)
    between = np.divide(products[:, first, second], size, out=np.zeros_like(size), where=size > 0)
    cosine = np.clip(between, -1, 1).mean(1)
    divisor = 1 + (count - 1) * cosine
    singular = np.abs(divisor) < 1e-6
    return np.where(singular, 0.0, count * cosine / np.where(singular, 1.0, divisor))


class Variance:
    """The variance over models of their differences from the base [rows, columns], in float32."""

    def __init__(self, models: Sequence[Tensor], base: Tensor) -> None:
        self.models, self.base = models, base
        self.rows, self.columns = base.shape

    def fill(self, tile: Tile, out: Tensor) -> None:
        for part in parts_of(tile, BLOCK):
            rows = slice(part.top - tile.top, part.bottom - tile.top)
            columns = slice(part.left - tile.left, part.right - tile.left)
            _variance(self.differences(part), out[rows, columns])

    def differences(self, tile: Tile) -> Tensor:
        """float32 [n, rows, columns] of a tile, in this thread's buffer."""
        return differences(self.models, (slice(tile.top, tile.bottom), slice(tile.left, tile.right)), self.base)

    def part(self, rows: Tensor, columns: Tensor) -> Tensor:
        base = at(self.base, rows, columns)
        found = torch.stack([at(model, rows, columns) - base for model in self.models])
        return _variance(found, torch.empty_like(base))


def _variance(found: Tensor, out: Tensor) -> Tensor:
    """The variance over the first dimension into out. Five times as fast as `torch.var`."""
    if loops := door.whole_loops(found.numel()):
        loops.variances(found.view(len(found), -1).numpy(), out.view(-1).numpy())
        return out
    mean, apart = scratch("mean", out.shape).copy_(found[0]), scratch("apart", out.shape)
    for values in found[1:]:
        mean.add_(values)
    mean.div_(len(found))
    out.zero_()
    for values in found:
        torch.sub(values, mean, out=apart)
        out.addcmul_(apart, apart)
    return out.div_(len(found))


def sce(group: Group) -> None:
    """base + sum_i w_i x_i [agrees] / sum_i w_i [agrees], x_i the differences where they vary most between models.

    select: the int(select_topk m) elements of largest variance, m those that vary at all; weights w_i: the mean square
    of x_i, divided by their sum; agrees: with the sign of the sum of all x_i, + for 0.
    mergekit's convention: equal weights where the mean squares sum to less than 1e-6, and a divisor of at least 1e-6.
    """
    assert group.base is not None
    base, out = group.rows_of(group.base), group.rows_of(group.out)
    variance = Variance([group.rows_of(each) for each in group.tensors], base)
    trim, count = _select(group, variance), len(group.tensors)

    def tasks(tile: Tile) -> Tensor:
        found = variance.differences(tile)
        if trim is not None:
            _choose(found, trim.apply(_variance(found, scratch("variance", tile.shape)), tile))
        return found

    def squares(tile: Tile) -> np.ndarray:
        total = np.zeros(count)
        for part in parts_of(tile, BLOCK):
            wide = scratch("float64", (count, math.prod(part.shape)), torch.float64)
            wide.copy_(tasks(part).reshape(count, -1))
            total += [float(values @ values) for values in wide]
        return total

    floor = 0.0 if group.published else FLOOR
    total = sum(for_each_tile(variance, squares), np.zeros(count)) / max(1, base.numel())
    if total.sum() <= floor or not total.sum():
        total = np.ones(count)
    weights = (total / total.sum()).astype(np.float32)

    def combine(tile: Tile) -> None:
        for part in parts_of(tile, BLOCK):
            found, under = tasks(part), scratch("base", part.shape)  # where `differences` left the base
            place = (slice(part.top, part.bottom), slice(part.left, part.right))
            out[place] = _onto_agreeing(under, found, weights, floor)

    for_each_tile(variance, combine)


def _choose(found: Tensor, chosen: Tensor) -> None:
    """found [n, rows, columns] where chosen is above 0, else 0, in place. chosen is overwritten."""
    if loops := door.whole_loops():
        loops.select(found.view(len(found), -1).numpy(), chosen.view(-1).numpy())
        return
    chosen.sign_()
    for values in found:
        values.mul_(chosen)


def _onto_agreeing(base: Tensor, found: Tensor, weights: np.ndarray, floor: float) -> Tensor:
    """base + sum_i w_i x_i / sum_i w_i over the x_i [n, rows, columns] with the sign of their sum, + for 0; in place.

    A sum of weights counts as floor at least; one of 0 as 1 where the floor is 0. found is overwritten.
    """
    if loops := door.whole_loops():
        loops.add_agreeing(found.view(len(found), -1).numpy(), weights, np.float32(floor), base.view(-1).numpy())
        return base
    names = ("elected", "agrees", "divisor", "merged")
    elected, agrees, divisor, merged = (scratch(name, found.shape[1:]).zero_() for name in names)
    for values in found:
        elected.add_(values)
    elected.sign_().add_(0.5).sign_()  # 0 becomes +
    for values, weight in zip(found, weights, strict=True):
        torch.sign(values, out=agrees).mul_(elected).clamp_(min=0).mul_(float(weight))
        divisor.add_(agrees)
        merged.add_(values.mul_(agrees))
    divisor = divisor.clamp_(min=floor) if floor else divisor.masked_fill_(divisor == 0, 1.0)
    return base.add_(merged.div_(divisor))


def _select(group: Group, variance: Variance) -> Trim | None:
    """The threshold of the variance; None: everything stays."""
    share = group.options["select_topk"]
    if share >= 1:
        return None
    varying = sum(for_each_tile(variance, lambda tile: int(torch.count_nonzero(filled(variance, tile)))))
    k = int(varying * share) if share > 0 else 0
    if k == 0:
        return Trim(float("inf"), variance.rows, 0)
    return trims_of_each([variance], [[k]], "exact")[0][0]


def nearswap(group: Group) -> None:
    """w x + (1 - w) base, w = t / |x - base|, at least 0 and at most 1.

    mergekit's convention: |x - base| counts as 1e-6 at least.
    """
    (x,), t, base, out = group.tensors, group.options["t"], group.base, group.out.reshape(-1)
    assert base is not None
    line, under = x.reshape(-1), base.reshape(-1)
    floor = torch.finfo(torch.float32).tiny if group.published else FLOOR

    def combine(part: slice) -> None:
        a, b = under[part].float(), line[part].float()
        share = (t / (a - b).abs_().clamp_(min=floor)).clamp_(0, 1)
        out[part] = share * b + (1 - share) * a

    flat(group, combine)


def arcee_fusion(group: Group) -> None:
    """x where it is important, else the base: importance |x - base| * KL(softmax(x) | softmax(base)) of the row.

    Important: at least median + 1.5 (third quartile - first). The quartiles are exact; mergekit estimates them from a
    million random elements where a tensor has more.
    """
    (x,), base = group.tensors, group.base
    assert base is not None
    one, under, out = (group.rows_of(each) for each in (x, base, group.out))
    importance = new_tensor(one.shape)

    def weigh(part: slice) -> None:
        a, b = block(one, part).double(), block(under, part).double()
        p, q = a.softmax(1).add_(1e-8), b.softmax(1).add_(1e-8)
        divergence = (p * (p / q).log_()).sum(1, keepdim=True).clamp_(min=0)
        importance[part] = a.sub_(b).abs_().mul_(divergence)

    sweep(one.shape, weigh)
    count = importance.numel()
    ks = [count - int(share * (count - 1)) for share in (0.25, 0.5, 0.75)]  # as ranks from the largest
    first, median, third = (np.float32(trim.value) for trim in trims_of_each([Dense(importance)], [ks], "exact")[0])
    threshold = float(median + np.float32(1.5) * (third - first))

    def combine(part: slice) -> None:
        a = block(under, part)
        difference = block(one, part, under)
        out[part] = a.add_(difference.mul_(importance[part] >= threshold))

    sweep(one.shape, combine)


def ram(group: Group) -> None:
    """base + the mean of the differences above epsilon, over the models that have one there."""
    _ram(group, [1.0] * len(group.tensors))


def ramplus_tl(group: Group) -> None:
    """ram, where the differences that only model i has are times 1 + r min(shared_i / alone_i, alpha), 0 at least.

    shared_i and alone_i count the elements of the tensor in which others have a difference, too, and have none.
    """
    options, base = group.options, group.base
    assert base is not None
    lines, under = [each.reshape(-1) for each in group.tensors], base.reshape(-1)

    def count(part: slice) -> np.ndarray:
        used = torch.stack([block(line, part, under).abs_() > options["epsilon"] for line in lines])
        several = used.sum(0) > 1
        return np.array([[int((each & several).sum()), int((each & ~several).sum())] for each in used])

    counts = sum(flat(group, count), np.zeros((len(lines), 2)))
    share = counts[:, 0] / np.maximum(counts[:, 1], options["epsilon"])
    _ram(group, list(1 + options["r"] * np.clip(share, 0, options["alpha"])))


def _ram(group: Group, alone: Sequence[float]) -> None:
    """base + sum_i x_i / count, and alone_i x_i where only model i has a difference above epsilon."""
    assert group.base is not None
    lines, under, out = [each.reshape(-1) for each in group.tensors], group.base.reshape(-1), group.out.reshape(-1)
    gains = torch.tensor(alone, dtype=torch.float32)[:, None]

    def combine(part: slice) -> None:
        found = torch.stack([block(line, part, under) for line in lines])
        used = found.abs() > group.options["epsilon"]
        count = used.sum(0)
        found.mul_(used)
        single, several = (found * gains).sum(0), found.div_(count.clamp(min=1)).sum(0)
        out[part] = torch.where(count > 1, several, single).add_(under[part].float())

    flat(group, combine)
