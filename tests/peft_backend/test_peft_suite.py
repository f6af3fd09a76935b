"""PEFT's own tests of merging end with the drop-in as they end without it."""

import subprocess

import pytest
from peft import __version__
from peft_suite import compare, fetch

AT_LEAST = 300  # stock PEFT 0.21.2 passes 329


@pytest.mark.peft_suite
def test_every_outcome_is_stocks(tmp_path):
    """With the installed PEFT, and with the newest one."""
    compared = set()
    for version in (__version__, ""):
        folder = tmp_path / f"peft {version}"
        folder.mkdir()
        try:
            source = fetch(folder, version)
        except subprocess.CalledProcessError:
            pytest.skip("PEFT's source distribution cannot be downloaded here")
        if source.name not in compared:
            compared.add(source.name)
            stock, ours = compare(source, folder / "hub")
            assert list(stock.values()).count("passed") > AT_LEAST
            assert ours == stock
