"""Figures of a comparison, as a table, as JSON and as notes."""

import json
import math

import pytest
import torch
from compared import HEAD, Q, V, invented
from lora_files import save_factors

import merge_engine
from merge_engine.compare.figures import CAVEAT, SHOWN, figure, upper


@pytest.mark.quick
def test_table_has_the_most_conflicting_first(three):
    result = merge_engine.interference(three, density=0.2)
    assert [name for name, _ in result.ranked()] == [Q, HEAD, V]
    pairs = result.pairs()
    conflicts = [result.overall.conflict[pair.one, pair.other] for pair in pairs]
    assert [pair.conflict for pair in pairs] == conflicts == sorted(conflicts, reverse=True)
    table = result.table()
    assert CAVEAT in table and "conflict 50.0 %, overlap 11.1 %" in table
    places = [table.index(f"{result.adapters[pair.one]}, {result.adapters[pair.other]}") for pair in pairs]
    assert places == sorted(places) and table.index(Q) < table.index(HEAD) < table.index(V)
    row = next(line for line in table.splitlines() if line.startswith(Q)).split()
    figures = result.modules[Q]
    wanted = [f"{100 * figures.conflict_rate:.1f}", "%", f"{100 * figures.contested / 1200:.1f}", "%", "-1.000"]
    assert row[1:] == wanted


def test_modules_without_a_figure_come_last(tmp_path):
    """As those of one adapter, which nothing can conflict with."""
    ones = torch.ones(1, 3), torch.ones(3, 1)
    save_factors(tmp_path / "a", {"alone": ones, "q": ones, "v": ones})
    save_factors(tmp_path / "b", {"q": ones, "v": (ones[0], -ones[1])})
    result = merge_engine.interference([tmp_path / "a", tmp_path / "b"], density=1.0)
    assert [(name, figures.conflict_rate) for name, figures in result.ranked()][:2] == [("v", 1.0), ("q", 0.0)]
    assert result.ranked()[2][0] == "alone" and math.isnan(result.ranked()[2][1].conflict_rate)


def test_table_stays_short():
    table = invented(30, [f"layers.{i}.up_proj" for i in range(40)]).table()
    for head in ("adapter (the first 10 of 30)", "pair (the first 10 of 435)", "module (the first 10 of 40)"):
        assert head in table
    assert sum("up_proj" in line for line in table.splitlines()) == SHOWN


def test_json_says_what_the_figures_say(three):
    result = merge_engine.interference(three, density=[0.1, 0.2, 0.3])
    told = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert told["adapters"] == ["sql", "chat", "ads"] and told["sources"] == [str(path) for path in three]
    assert told["density"] == [0.1, 0.2, 0.3] and told["modules"][HEAD]["shape"] == [20, 40]
    figures = result.modules[HEAD]
    for key in ("cosine", "conflict", "overlap"):
        assert told["modules"][HEAD][key][0][1] == getattr(figures, key)[0, 1]
        assert told["modules"][HEAD][key][0][2] is None
    assert told["modules"][HEAD]["kept"] == [80, 160, 0]
    assert told["overall"]["conflict_rate"] == result.overall.conflict_rate


def test_numbers_as_text():
    assert [figure(value, ".2f") for value in (-0.001, 0.126, -0.126, math.nan)] == ["0.00", "0.13", "-0.13", "-"]


def test_sums_over_modules_weigh_by_what_they_count():
    one, other = invented(2, ["a", "b"]).modules.values()
    both = one + other
    assert both.conflict_rate == (one.conflicting + other.conflicting) / 800
    assert upper(both.conflict) == [(one.opposed + other.opposed)[0, 1] / (one.shared + other.shared)[0, 1]]
    assert upper(both.cosine) == pytest.approx([(one.inner + other.inner)[0, 1] / 2], rel=1e-12)
