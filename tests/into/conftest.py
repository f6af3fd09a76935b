"""A base with three adapters, and a larger one that takes a moment to merge."""

import pytest
from toy_models import save_adapter, save_base
from toy_vocabularies import save_toys


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path / "base")


@pytest.fixture
def three(tmp_path):
    return [save_adapter(tmp_path / name, seed) for seed, name in enumerate(["sql", "chat", "ads"], 1)]


BIG = {f"model.layers.{i}.up_proj": (257, 192) for i in range(24)}


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A base and two adapters that take a moment."""
    root = tmp_path_factory.mktemp("big")
    base = save_base(root / "base", shapes=BIG)
    adapters = [save_adapter(root / name, seed, BIG, BIG, whole=False) for seed, name in enumerate("ab")]
    return base, adapters


@pytest.fixture
def toys(tmp_path):
    return save_toys(tmp_path)
