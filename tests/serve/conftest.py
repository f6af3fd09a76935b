"""A folder of five adapters to serve."""

import pytest
from sweeps import save_lora


@pytest.fixture
def served(tmp_path):
    for seed, name in enumerate(["sql", "chat", "ads", "law", "math"]):
        save_lora(tmp_path / "adapters" / name, seed)
    return tmp_path / "adapters"
