"""Three adapters."""

import pytest
from plain_adapters import save_three


@pytest.fixture
def three(tmp_path):
    return save_three(tmp_path)
