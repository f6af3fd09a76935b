"""Adapters to compare, and comparisons with figures that nobody computed."""

import numpy as np
import torch
from lora_files import save_factors

from merge_engine.compare.figures import Figures, Interference, together

Q, V, HEAD = "model.layers.0.q_proj", "model.layers.1.v_proj", "lm_head"


def save_lora(folder, factors, alpha=None):
    """A LoRA of {module: (A [r, N], B [M, r])}; scaling is alpha / r, 1 by default."""
    ranks = {name: len(A) for name, (A, _) in factors.items()}
    r = max(ranks.values())
    alphas = {"lora_alpha": alpha} if alpha else {"lora_alpha": r, "alpha_pattern": ranks}
    return save_factors(folder, factors, r=r, rank_pattern=ranks, **alphas)


def normal(seed, rank, rows, columns):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)


def invented(count, modules, names=None):
    """A comparison of many adapters, with figures that nobody computed."""
    generator = np.random.default_rng(0)
    figures = {}
    for name in modules:
        shared = generator.integers(50, 100, (count, count))
        shared = shared + shared.T
        opposed = (shared * generator.uniform(0.3, 0.7)).astype(int) * (1 - np.eye(count, dtype=int))
        inner = generator.uniform(-0.2, 0.2, (count, count))
        figures[name] = Figures(
            *(1000, np.ones(count, int), generator.uniform(1, 8, count)),
            *((inner + inner.T) / 2 * (1 - np.eye(count)) + np.eye(count), np.ones((count, count))),
            *(
                np.full(count, 0.7),
                np.full((count, count), 200),
                shared,
                opposed,
                400,
                int(generator.integers(100, 300)),
            ),
        )
    names = tuple(names or (f"adapter-{i}" for i in range(count)))
    shapes = dict.fromkeys(modules, (25, 40))
    return Interference(names, names, 0.2, shapes, figures, together(figures.values()))
