"""A base, and three models tuned from it."""

import pytest
from toy_vocabularies import save_toys
from tuned_models import save_model, save_three


@pytest.fixture
def base(tmp_path):
    return save_model(tmp_path / "base", 0)


@pytest.fixture
def three(base):
    return save_three(base)


@pytest.fixture
def toys(tmp_path):
    return save_toys(tmp_path)
