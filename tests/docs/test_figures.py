"""Figures in README and docs are those of bench/results."""

import re

import pytest
from docs_scripts import script

figures = script("figures")
# What no file of bench/results has, by page: sizes of caches, limits that are wanted, what papers report, and what was
# measured once.
TYPED = {
    "benchmarks.md": ["1 MiB", "2 MiB", "25 s", "5 %"],
    "methods.md": ["6 points", "0.3 points", "8.3 points"],
}
_CODE = re.compile(r"```.*?```|`[^`\n]*`|\]\([^)]*\)", re.DOTALL)
_UNITS = "ns|ms|s|seconds|minutes|hours|KiB|MiB|GiB|MB|GB|CPU-seconds|points|times"
_MEASURED = re.compile(rf"\d[\d.,]*(?:\s?(?:{_UNITS})\b|x\b(?! \d)|\s?%)")


@pytest.mark.quick
@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.name)
def test_a_page_has_the_figures_of_the_results(page):
    text = page.read_text()
    assert text == figures.written(text), "python docs/make/figures.py writes the pages anew"


@pytest.mark.quick
@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.name)
def test_no_figure_is_typed_by_hand(page):
    text = _CODE.sub("", figures.MARK.sub("", page.read_text()))
    assert [found[0] for found in _MEASURED.finditer(text)] == TYPED.get(page.name, [])


def test_every_figure_is_shown():
    shown = {name for page in figures.PAGES for _, name, _ in figures.MARK.findall(page.read_text())}
    assert set(figures.FIGURES) - shown == set()


@pytest.mark.parametrize("mark", ["cpu nothing", "nothing ties_faster", "xeon whole_lost"])
def test_a_figure_that_is_not_there_is_an_error(mark, monkeypatch):
    monkeypatch.setitem(figures.FIGURES, "whole_lost", figures.time(kind="whole", contestant="nobody"))
    with pytest.raises(LookupError, match=r"wanted (a figure of|one row)"):
        figures.written(f"It takes <!--={mark}-->1 s<!--/-->.")


def test_a_figure_follows_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    monkeypatch.setitem(figures.FIGURES, "faster", figures.ratio("old", "new", kind="a"))
    (tmp_path / "run.csv").write_text("kind,contestant,seconds\na,old,3\na,new,0.04\nb,new,1\n")
    page = "So: <!--=run faster-->2<!--/--> times."
    assert figures.written(page) == "So: <!--=run faster-->75.0<!--/--> times."
    assert [figures.digits(number) for number in (0.0123, 1.234, 99.94, 99.96, 391.6)] == [
        *("0.0123", "1.23", "99.9", "100", "392"),
    ]
