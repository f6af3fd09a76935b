"""Three adapters, two of which conflict."""

import pytest
from compared import HEAD, Q, V, normal, save_lora


@pytest.fixture
def three(tmp_path):
    """Q conflicts more than V, and only two of the three have the head."""
    A, B = normal(0, 2, 30, 40)
    modules = [
        {Q: (A, B), V: (A, B), HEAD: normal(1, 2, 20, 40)},
        {Q: (A, -B), V: (A, B), HEAD: normal(2, 2, 20, 40)},
        {Q: normal(3, 2, 30, 40), V: normal(4, 2, 30, 40)},
    ]
    return [save_lora(tmp_path / n, each) for n, each in zip(["sql", "chat", "ads"], modules, strict=True)]
