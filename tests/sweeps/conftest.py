"""Three adapters, and the names of what is really merged."""

import pytest
from sweeps import save_lora

from merge_engine.many.merge_many import merge_each
from merge_engine.sweeps import run as sweep_run


@pytest.fixture
def three(tmp_path):
    return [save_lora(tmp_path / name, seed) for seed, name in enumerate(["sql", "chat", "ads"])]


@pytest.fixture
def merged(monkeypatch):
    """The names of what is really merged."""
    names = []

    def recording(*arguments, **options):
        names.extend(options["names"])
        return merge_each(*arguments, **options)

    monkeypatch.setattr(sweep_run, "merge_each", recording)
    return names
