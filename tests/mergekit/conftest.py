"""Models and adapters that mergekit's recipes name."""

import pytest
from mergekit_oracle import save_home


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    return save_home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def here(home, monkeypatch):
    monkeypatch.chdir(home)
    return home
