"""Adapters that PEFT saved."""

import pytest
from peft_adapters import save_adapter


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return [save_adapter(root / name, seed) for seed, name in enumerate(["sql", "chat", "ads"])]


@pytest.fixture(scope="session")
def uneven(tmp_path_factory):
    """Three adapters of different ranks, scalings and modules."""
    root = tmp_path_factory.mktemp("uneven")
    return [
        save_adapter(root / "a", 1, r=2, rank_pattern={"up_proj": 5}, alpha_pattern={"k_proj": 1}),
        save_adapter(root / "b", 2, r=7, use_rslora=True),
        save_adapter(root / "c", 3, r=4, target_modules=["q_proj", "up_proj"]),
    ]
