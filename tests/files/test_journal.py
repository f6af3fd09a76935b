"""Journals of unfinished outputs: what kills and other ranks left in them."""

import pytest

from merge_engine.files.journal import Journal, read_journal, remove_journal


@pytest.mark.quick
def test_a_line_that_a_kill_has_torn_costs_no_other_line(tmp_path):
    with Journal(tmp_path) as journal:
        journal.begin({"seed": 7})
        journal.finished("a", "0a")
    with (tmp_path / ".journal.0").open("a") as torn:
        torn.write('{"tensor": "b", "xx')
    with Journal(tmp_path) as journal:
        journal.finished("c", "0c")
    assert read_journal(tmp_path) == ({"seed": 7}, {"a": "0a", "c": "0c"})


@pytest.mark.quick
def test_what_every_rank_has_finished_is_read_and_removed(tmp_path):
    for rank in (0, 1, 10):
        with Journal(tmp_path, rank) as journal:
            if not rank:
                journal.begin({"seed": 7})
            journal.finished(f"of {rank}", f"0{rank}")
    assert read_journal(tmp_path) == ({"seed": 7}, {"of 0": "00", "of 1": "01", "of 10": "010"})
    remove_journal(tmp_path)
    assert list(tmp_path.iterdir()) == []
