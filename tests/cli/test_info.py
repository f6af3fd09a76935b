"""merge-engine info."""

import pytest
from command_line import run_cli

from merge_engine.formats.open import open_adapter


def test_info_shows_what_an_adapter_is(three, capsys):
    code, out, err = run_cli(capsys, "info", three[0])
    assert (code, err) == (0, "")
    adapter = open_adapter(three[0])
    for name in adapter.modules:
        A, B = adapter.factors(name)
        line = next(line for line in out.splitlines() if name in line)
        assert line.split()[1:-1] == ["linear", "24", "x", "40", "4", "2"]
        assert float(line.split()[-1]) == pytest.approx(2 * (B.double() @ A.double()).norm().item(), rel=1e-3)
    assert "base model  base" in out and "modules     2, rank 4" in out and "size        0.00 MB" in out
