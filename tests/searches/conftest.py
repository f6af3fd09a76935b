"""Three adapters to search over."""

import pytest
from sweeps import save_lora


@pytest.fixture
def three(tmp_path):
    return [save_lora(tmp_path / name, seed) for seed, name in enumerate(["sql", "chat", "ads"])]
