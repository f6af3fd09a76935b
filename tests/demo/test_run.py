"""The demo shows what it is there to show."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from merge_engine.demo import measure, run, sets
from merge_engine.demo.sets import DEMO_SETS


@pytest.fixture(scope="session")
def rows():
    return run.run(lambda line: None)


@pytest.fixture
def short(monkeypatch):
    """A demo of two methods and two scales."""
    merges = {name: sets.MERGES[name] for name in ("linear", "ties d=.2")}
    monkeypatch.setattr(run, "DEMO_SETS", {name: replace(shown, merges=merges) for name, shown in DEMO_SETS.items()})
    monkeypatch.setattr(run, "SCALES", (0.35, 1.0))


def relative(rows):
    return {row.name: row for row in rows if row.kind == "relative"}


@pytest.mark.slow
@pytest.mark.xdist_group("demo")
def test_demo_shows_what_the_methods_do(rows):
    table = relative(rows)
    assert table["ties d=.2"].mean >= table["linear"].mean + 10
    assert table["dare_linear d=.2"].mean < table["linear"].mean
    untouched = table["base, no adapter"].mean
    for name, row in table.items():
        if row.best_scale is not None and "factors" not in name:
            assert row.best_mean >= untouched + 2, name
    assert table["linear, factors"].best_mean <= table["linear"].best_mean - 2


@pytest.mark.slow
@pytest.mark.xdist_group("demo")
def test_methods_on_cores_and_the_automatic_scale_do_what_the_readme_says(rows):
    """Bounds that held in all of four trainings from other seeds, with room: see docs/methods.md."""
    by_name = relative(rows)
    linear, auto = by_name["linear"], by_name["linear, auto"]
    assert by_name["tsv"].best_mean >= linear.best_mean + 0.5
    assert by_name["actmat, ridge .3"].best_mean >= linear.best_mean + 1.2
    assert auto.mean >= linear.mean + 10 and abs(auto.mean - linear.best_mean) <= 1
    assert by_name["iso_c"].mean >= by_name["ties d=.2"].mean + 0.5


def test_demo_prints_each_row_and_every_column_lines_up(short):
    from transformers.utils import logging as chatter

    def settings():
        return chatter.get_verbosity(), chatter.is_progress_bar_enabled(), torch.get_num_threads()

    printed, before = [], settings()
    found = run.run(printed.append)
    assert settings() == before
    lines = "\n".join(printed).splitlines()
    assert [row.name for row in found[-2:]] == ["linear", "ties d=.2"] and len(found) == 5
    for row in found:
        assert any(line.startswith(row.name) and f"{row.mean:.1f}" in line for line in lines)
    head = next(line for line in lines if line.startswith("% of"))
    line = next(line for line in lines if line.startswith("linear "))
    assert len(line) == len(head)
    assert max(map(len, lines)) <= 120


def test_demo_of_the_set_unknown_prints_both_kinds_beside_what_the_base_knows(short, monkeypatch):
    monkeypatch.setattr(measure, "COUNT", dict.fromkeys(measure.COUNT, 16))
    printed = []
    found = run.run(printed.append, "unknown")
    lines = "\n".join(printed).splitlines()
    assert max(map(len, lines)) <= 120
    assert not any(line.startswith(("knots", "rank 8", "auto")) for line in lines)
    heads = [line for line in lines if line.startswith(("replay: %", "alone: %"))]
    merged = [row for row in found if row.best_scale is not None]
    assert [(row.group, row.name) for row in merged] == [
        (kind, name) for kind in ("replay", "alone") for name in ("linear", "ties d=.2")
    ]
    for head, kind in zip(heads, ("replay", "alone"), strict=True):
        below = lines[lines.index(head) + 2]
        row = next(row for row in merged if row.group == kind)
        assert len(below) == len(head) and below.startswith("linear ")
        assert below.split()[-4:] == [
            f"{row.mean:.1f}",
            f"{row.best_scale:g}",
            f"{row.best_mean:.1f}",
            f"{row.known:.1f}",
        ]


@pytest.mark.quick
def test_the_best_scale_is_chosen_on_one_sample_and_measured_on_the_other(monkeypatch, tmp_path):
    @contextmanager
    def scaled(model, scale):
        model.scale = scale
        yield

    def marks(shown, model, seed):
        best = {measure.TUNING: 0.5, measure.REPORTED: 1.4}[seed]
        return {"swap": 80 - 10 * abs(model.scale - best)}

    monkeypatch.setattr(measure, "load", lambda shown, adapter: SimpleNamespace(scale=None))
    monkeypatch.setattr(measure, "scaled", scaled)
    monkeypatch.setattr(measure, "marks", marks)
    monkeypatch.setattr(measure, "known_mark", lambda shown, model: model.scale)
    own = {measure.TUNING: {"swap": 40.0}, measure.REPORTED: {"swap": 80.0}}
    row = run._measure(DEMO_SETS["unknown"], "", "linear", tmp_path, own)
    assert (row.best_scale, row.known) == (0.5, 0.5)
    assert row.figures == {"swap": pytest.approx(95)} and row.best == {"swap": pytest.approx(88.75)}


@pytest.mark.parametrize("name", sets.MERGES)
def test_the_name_of_every_row_fits_its_column(name):
    assert len(name) < run.NAME_WIDTH


def test_demo_leaves_settings_as_they_were():
    from transformers.utils import logging as chatter

    before = chatter.get_verbosity(), chatter.is_progress_bar_enabled(), torch.get_num_threads()
    with pytest.raises(KeyError), measure.quiet():
        assert chatter.get_verbosity() == chatter.ERROR
        raise KeyError
    assert before == (chatter.get_verbosity(), chatter.is_progress_bar_enabled(), torch.get_num_threads())


def test_demo_says_what_to_install(monkeypatch):
    monkeypatch.setattr(measure, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"demo: needs transformers and peft: pip install 'merge-engine\[peft\]'"):
        run.run(str)
