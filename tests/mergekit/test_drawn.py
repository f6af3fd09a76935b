"""Drawn recipes through mergekit and through merge_engine. More of them: python tests/helpers/mergekit_drawn.py 200."""

import logging

import pytest

pytest.importorskip("mergekit")

from mergekit_drawn import METHODS, compare, save_drawn_home


@pytest.fixture(scope="module")
def drawn_home(tmp_path_factory):
    return save_drawn_home(tmp_path_factory.mktemp("drawn"))


@pytest.mark.filterwarnings("ignore")  # of mergekit's dependencies
@pytest.mark.parametrize("seed", range(2 * len(METHODS)))
def test_mergekit_gives_the_same(drawn_home, monkeypatch, seed):
    monkeypatch.chdir(drawn_home)
    logging.disable(logging.CRITICAL)
    try:
        method, what, right = compare(seed, drawn_home)
    finally:
        logging.disable(logging.NOTSET)
    assert right, f"{method}: {what}"
