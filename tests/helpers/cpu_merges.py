"""What tests of the CPU backend share: random factors, and the keeps and masks of one merge."""

import torch

from merge_engine.cpu.keep import Drop
from merge_engine.cpu.mask import keep_mask
from merge_engine.cpu.merge import l1_factor
from merge_engine.cpu.select import trims

METHODS = ["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"]
U = 2**-24  # unit roundoff of float32
SEED = 2**40 + 7


def factors(generator, rows, columns, rank, dtype, integers):
    def draw(*shape):
        if integers:  # small whole numbers: products are exact, and thousands of them are equal
            return torch.randint(-2, 3, shape, generator=generator).to(dtype)
        return torch.randn(*shape, generator=generator).to(dtype)

    return draw(rank, columns), draw(rows, rank)


def keeps_of(rule, sources, density, stream=5):
    if rule.keep == "magnitude":
        numel = sources[0].rows * sources[0].columns
        return [trims([s], rule.kept(density, numel), rule.trim_ties)[0] for s in sources]
    if rule.keep == "bernoulli":
        drops = [Drop(density, SEED, stream, i) for i in range(len(sources))]
        if rule.l1_rescale:
            return [
                Drop(density, SEED, stream, i, l1_factor(s, d))
                for i, (s, d) in enumerate(zip(sources, drops, strict=True))
            ]
        return drops
    return [None] * len(sources)


def masks_of(rows, columns, count, density, stream=5):
    return {
        i: keep_mask(density, seed=SEED, stream=stream, adapter=i, rows=range(rows), columns=range(columns))
        for i in range(count)
    }
