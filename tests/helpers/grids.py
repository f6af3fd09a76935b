"""Grids of recipes over three adapters, and what a merge of each recipe alone makes."""

import torch
from lora_files import save_factors

from merge_engine.engine.merge import merge


def save_adapter(folder, seed, shapes, rank=4, dtype=torch.float32, **more):
    """An adapter of random factors."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    factors = {name: (draw(rank, columns), draw(rows, rank)) for name, (rows, columns) in shapes.items()}
    return save_factors(folder, factors, **more)


W = [[0.9, -0.4, 1.3], [1.0, 1.0, 1.0], [2.0, 0.0, 0.25]]
GRID = [
    *({"method": "ties", "density": d, "weights": w, "rank": 5} for d in (0.1, 0.3) for w in W),
    *({"method": "ties", "density": 0.3, "weights": W[0], "rank": 5, "scale": s} for s in (0.5, -3.0, 0.0)),
    {"method": "ties", "density": [0.1, 0.3, 1.0], "weights": W[0], "election": "frequency", "energy": 0.7},
    {"method": "ties", "density": {"q": 0.3, ".*": 0.6}, "weights": W[0], "convention": "mergekit"},
    {"method": "ties", "density": 0.3, "weights": W[1], "convention": "mergekit", "rank": 3},
    {"method": "ties", "density": 0.3, "weights": W[0], "scope": "model", "rank": 3},
    {"method": "ties", "density": 0.3, "weights": W[0], "convention": "paper", "scale": 0.5},
    {"method": "ties", "density": 0.3, "weights": W[2], "convention": "paper", "scale": 0.3},
    {"method": "ties", "density": 0, "rank": 2},
    {"method": "magnitude_prune", "density": 0.3, "weights": W[0]},
    {"method": "magnitude_prune", "density": 0.3, "weights": W[0], "rank": 2, "dtype": "float16"},
    {"method": "dare_linear", "density": 0.4, "weights": W[0], "seed": 7},
    {"method": "dare_linear", "density": 0.4, "weights": W[0], "seed": 8},
    {"method": "dare_ties", "density": 0.4, "weights": W[0], "convention": "mergekit"},
    {"method": "dare_ties", "density": 0.4, "weights": W[2]},
    {"method": "dare_ties", "density": 0.4, "weights": W[2], "adapters": ["ads", "sql", "chat"]},
    {"method": "ties", "density": 0.3, "adapters": [2, 0], "weights": W[0][:2]},
    {"method": "ties", "density": 0.1, "adapters": ["sql"]},
    {"method": "linear", "weights": W[0]},
    {"method": "linear", "weights": W[0], "rank": 3, "scale": 0.7},
    {"method": "linear", "weights": W[2], "energy": 0.9},
    {"method": "cat", "weights": W[0]},
    {"method": "cat", "weights": [0.9], "scale": 2.0, "adapters": [1]},
]
FACTORS = [
    {"method": method, "density": d, "weights": w, "space": "factors", "scale": s}
    for method, d in (("ties", 0.4), ("ties", 0.2), ("dare_ties", 0.5), ("linear", None))
    for w, s in ((W[0], 1.0), (W[0], 0.5), (W[1], 2.0))
] + [{"method": "linear", "weights": W[0], "space": "factors", "rank": 2}]


def alone(adapters, recipe, output=None, **options):
    """The same by one merge of its own."""
    fields = dict(recipe)
    names = [folder.name for folder in adapters]
    chosen = [names.index(each) if isinstance(each, str) else each for each in fields.pop("adapters", range(3))]
    return merge([adapters[number] for number in chosen], output, **fields, **options)


def bits(tensor):
    return tensor.contiguous().view(torch.int32)


def identical(got, want):
    """Every bit of the factors, signs of zeros included, and all that is said of them."""
    assert got.modules.keys() == want.modules.keys()
    for name, result in want.modules.items():
        for side in ("A", "B"):
            one, other = getattr(got.modules[name], side), getattr(result, side)
            assert one.shape == other.shape and torch.equal(bits(one), bits(other)), f"{side} of {name}"
    return got.energy == want.energy and got.total_energy == want.total_energy


OWNED = [
    {"method": "ties", "density": 0.3, "rank": 5},
    {"method": "linear"},
    {"method": "cat"},
    {"method": "linear", "space": "factors"},
    {"method": "ties", "density": 0.4, "space": "factors", "rank": 2},
]


def counting(monkeypatch, owner, name):
    calls, real = [], getattr(owner, name)

    def counted(*arguments, **options):
        calls.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)
    return calls
