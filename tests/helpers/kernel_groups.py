"""Groups of random adapters for the kernels, and what is made of them against the textbook in float64.

Two things are checked apart, since a trim is not continuous. What is kept is checked to the bit, on the task tensors
that the kernels themselves see; these, and what is made of what is kept, within derived bounds.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from merge_engine.kernels.merge import merge_deltas
from merge_engine.kernels.select import l1_factors
from merge_engine.kernels.source import Dense, Drop, Keep, Lora, Source, Trim, pack
from merge_engine.kernels.trims import trims
from torch import Tensor

from merge_engine.cpu.mask import keep_mask
from merge_engine.rules import reference
from merge_engine.rules.philox import stream_id
from merge_engine.rules.rule import Rule

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
U32 = 2.0**-24
U_OUT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
WEIGHTS = [1.0, -0.5, 0.75]
DENSITY = 0.4
SEED = 0x123456789ABCDEF0


def group(
    shape: tuple[int, int] = (37, 70),
    *,
    ranks: Sequence[int] = (8, 8, 8),
    modules: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Lora:
    """A group of random adapters with entries about 1."""
    generator = torch.Generator().manual_seed(7)
    rows, columns = shape

    def factor(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    pairs = [[(factor(rank, columns), factor(rows, rank)) for rank in ranks] for _ in range(modules)]
    scaling = [[0.5 + 0.3 * i for i in range(len(ranks))] for _ in range(modules)]
    return pack(pairs, scaling, device=device)


def source_of(kind: str, dtype: torch.dtype, device: torch.device) -> Source:
    """The three things a rule merges: deltas, finetuned - base, and factors (here those named A, as they lie)."""
    lora = group(dtype=dtype, device=device)
    if kind == "lora":
        return lora
    if kind == "factors":
        return Dense(lora.A[:, :, :8])
    x = seen(lora).to(dtype)
    return Dense(x, x.mean(1) / 2)


def seen(source: Source) -> Tensor:
    """The task tensors to the bit as a kernel sees them: float32 [modules, adapters, M, N].

    Each is merged alone, with weight 1: a tile of one adapter does not depend on the others, and adding 0 to a number
    or multiplying it by 1 changes nothing, but that -0 may become +0.
    """
    alone = [merge_deltas(only(source, adapter), [[1.0]])[0] for adapter in range(source.shape[1])]
    return torch.stack(alone, 1)


def only(source: Source, adapter: int) -> Source:
    """The group with one of its adapters, padded as before."""
    one = slice(adapter, adapter + 1)
    if isinstance(source, Dense):
        return Dense(source.x[:, one], source.base)
    return Lora(source.A[:, one].contiguous(), source.B[:, one].contiguous(), source.scaling[:, one])


def exact(source: Source) -> tuple[Tensor, Tensor]:
    """The task tensors in float64, and a bound on the error of what a kernel sees."""
    if isinstance(source, Lora):
        A, B, scaling = source.A.double(), source.B.double(), source.scaling.double()[..., None, None]
        steps = source.rank + 2  # products, sums and the scaling
        return scaling * (B @ A), steps * U32 * scaling.abs() * (B.abs() @ A.abs())
    x = source.x.double()
    if source.base is None:
        return x, torch.zeros_like(x)
    t = x - source.base.double()[:, None]
    return t, U32 * t.abs()


def keep_of(rule: Rule, source: Source, device: torch.device, density: float = DENSITY) -> Keep:
    modules, adapters, rows, columns = source.shape
    if rule.keep == "magnitude":
        kept = torch.full((1, modules, adapters), rule.kept(density, rows * columns))
        return trims(source, kept, ties=rule.trim_ties)
    if rule.keep == "bernoulli":
        streams = torch.tensor([stream_id(f"layers.{i}", "delta") for i in range(modules)])
        densities = torch.full((1, modules, adapters), density, dtype=torch.float64)
        drop = Drop(densities, [SEED], streams, torch.arange(adapters))
        return replace(drop, factor=l1_factors(source, drop)) if rule.l1_rescale else drop
    return None


def kept_tensors(rule: Rule, source: Source, keep: Keep) -> Tensor:
    """keep(t) in float64, by the textbook, of the task tensors as a kernel sees them: [modules, adapters, M, N]."""
    tensors = seen(source).cpu()
    modules, adapters, rows, columns = source.shape
    kept = torch.empty(tensors.shape, dtype=torch.float64)
    for module in range(modules):
        for adapter in range(adapters):
            t = tensors[module, adapter]
            if isinstance(keep, Trim):
                kept[module, adapter] = reference.trim(t, rule.kept(DENSITY, t.numel()), rule.trim_ties).double()
            elif isinstance(keep, Drop):
                mask = mask_of(keep, module, adapter, rows, columns)
                kept[module, adapter] = reference.drop_and_rescale(t.double(), mask, DENSITY, rule.l1_rescale)
            else:
                kept[module, adapter] = t.double()
    return kept


def mask_of(drop: Drop, module: int, adapter: int, rows: int, columns: int, recipe: int = 0) -> Tensor:
    return keep_mask(
        float(drop.density[recipe, module, adapter]),
        seed=drop.seeds[recipe],
        stream=int(drop.streams[module]),
        adapter=int(drop.adapters[adapter]),
        rows=range(rows),
        columns=range(columns),
    )


def check(
    out: Tensor, kept: Tensor, weights: Sequence[float], rule: Rule, *, scale: float = 1.0, base: Tensor | None = None
) -> None:
    """out [modules, M, N] against the textbook on float64, within what float32 sums of these terms may be off by.

    A vote that rounding may turn is not checked; a vote that is 0 because nothing was kept is.
    """
    n = kept.shape[1]
    w = torch.tensor(weights, dtype=torch.float64)[:, None, None]
    for module in range(len(kept)):
        tensors = kept[module]
        want = reference.combine(list(tensors), list(weights), rule)
        sizes = (w * tensors).abs()
        # Each of n weighted terms is rounded in the rescale, the weighting and at most n sums; then halving is exact,
        # a division, the scale and the base are rounded.
        spread = sizes.sum(0)
        divisor = torch.ones_like(spread)
        if rule.divisor == "weight":
            elected = reference.vote(list(tensors), list(weights), rule).sign()
            elected[elected == 0] = 1
            divisor = ((w * tensors).sign() == elected).mul(w).sum(0).abs()
            divisor[divisor == 0] = 1
            spread = spread * (1 + n * w.abs().sum() / divisor)
        bound = (n + 8) * U32 * spread / divisor * abs(scale)
        want = scale * want
        if base is not None:
            want = want + base[module].cpu().double()
            bound = bound + U32 * want.abs()
        bound = bound + U_OUT[out.dtype] * want.abs() + SMALLEST[out.dtype]
        sure = torch.ones_like(want, dtype=torch.bool)
        if rule.elect != "none":
            votes = reference.vote(list(tensors), list(weights), rule)
            ballots = sizes if rule.vote_weighted else tensors.abs()
            doubt = torch.zeros_like(votes) if rule.elect == "frequency" else (n + 2) * U32 * ballots.sum(0)
            sure = (votes.abs() > doubt) | (ballots.sum(0) == 0) | (doubt == 0)
        assert sure.float().mean() > 0.99
        got = out[module].cpu().double()
        wrong = ~((got - want).abs() <= bound) & sure  # NaN, an element that was not written, is wrong
        assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()}, worst {(got - want)[wrong].abs().max()}"


def merge_by(
    rule: Rule, source: Source, weights: Sequence[float], keep: Keep, dtype: torch.dtype, **options: object
) -> Tensor:
    """[modules, M, N], every element of which was NaN."""
    modules, _, rows, columns = source.shape
    out = torch.full((1, modules, rows, columns), torch.nan, dtype=dtype, device=source.x.device)
    merge_deltas(
        source,
        [list(weights)],
        keep,
        elect=rule.elect,
        divisor=rule.divisor,
        vote_weighted=rule.vote_weighted,
        out=out,
        **options,  # type: ignore[arg-type]
    )
    return out[0]
