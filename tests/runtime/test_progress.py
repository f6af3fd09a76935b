"""The bar says how much is done, and ends at 100 per cent."""

import re

import pytest
from plain_adapters import save_three

import merge_engine
from merge_engine.runtime.progress import Bar


def lines(capsys):
    """[(per cent, text)] of each time that the bar was drawn."""
    found = re.findall(r"\s*(\d+)% \|[^|]*\| ([^,\r\n]+),", capsys.readouterr().err)
    return [(int(percent), text) for percent, text in found]


def test_work_and_modules_are_counted_apart(capsys):
    with Bar(200, 2, True) as bar:
        bar.update(100)
        bar.finished(50)
        bar.reach(200, 2)
    drawn = lines(capsys)
    assert drawn[0] == (0, "0 of 2 modules")
    assert drawn[-1] == (100, "2 of 2 modules")


def test_it_is_silent_where_there_is_no_terminal(capsys):
    with Bar(1, 1, None) as bar:
        bar.finished(1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("recipe", [{"method": "ties"}, {"method": "ties", "convention": "paper"}])
def test_a_merge_ends_at_all_of_it(tmp_path, capsys, recipe):
    adapters = save_three(tmp_path)
    count = len(merge_engine.merge(adapters, progress=True, **recipe).ranks)
    assert lines(capsys)[-1] == (100, f"{count} of {count} modules")


def test_many_merges_end_at_all_of_it(tmp_path, capsys):
    adapters = save_three(tmp_path)
    recipes = [{"method": "ties"}, {"method": "ties", "scope": "model"}, {"method": "linear", "rank": 2}]
    merged = list(merge_engine.merge_many(adapters, recipes, progress=True))
    count = sum(len(each.ranks) for each in merged)
    assert lines(capsys)[-1] == (100, f"{count} of {count} modules")


def test_what_fails_is_not_waited_for(capsys):
    with Bar(10, 2, True) as bar:
        bar.finished(3)
        bar.reach(10, 2)
        bar.reach(10, 2)
    assert lines(capsys)[-1] == (100, "2 of 2 modules")
