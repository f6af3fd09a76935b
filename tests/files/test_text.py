"""Small files that appear whole or not at all, and tables that give no key twice."""

import json
import os

import pytest

from merge_engine.errors import OutputError, RecipeError
from merge_engine.files.text import TwiceError, read_yaml, replaced, unique_keys, write_text


@pytest.mark.quick
def test_a_file_takes_the_place_of_another_when_it_is_whole(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with replaced(path) as partial:
        assert partial.parent == tmp_path and partial != path
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["table.csv"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("begun", [False, True])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error, begun):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(error), replaced(path) as partial:
        if begun:
            partial.write_text("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["table.csv"]


def test_what_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"file/table\.csv cannot be written: (Not a directory|File exists)$"):
        write_text(tmp_path / "file" / "table.csv", "new")
    (tmp_path / ".full.partial").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"full cannot be written: No space left on device$"):
        write_text(tmp_path / "full", "new")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("fsync", [False, True])
def test_a_file_is_flushed_before_it_is_renamed_where_asked(tmp_path, monkeypatch, fsync):
    flush, flushed, path = os.fsync, [], tmp_path / "new" / "table.csv"

    def counted(descriptor):
        flushed.append((os.fstat(descriptor).st_size, path.exists()))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", counted)
    with replaced(path, fsync=fsync) as partial:
        partial.write_text("12345")
    assert path.read_text() == "12345" and flushed == ([(5, False)] if fsync else [])


def test_text_is_utf8_in_a_folder_that_is_made(tmp_path):
    write_text(tmp_path / "a" / "b" / "page.html", "é\n")
    assert (tmp_path / "a" / "b" / "page.html").read_bytes() == b"\xc3\xa9\n"


def test_a_key_that_comes_twice(tmp_path):
    assert json.loads('{"a": 1, "b": {"a": 2}}', object_pairs_hook=unique_keys) == {"a": 1, "b": {"a": 2}}
    with pytest.raises(TwiceError, match=r"^b$"):
        json.loads('{"a": 1, "b": 2, "b": 2}', object_pairs_hook=unique_keys)
    (tmp_path / "recipe.yaml").write_text("a: 1\nb: {c: 2, c: 2}\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml: wanted c once in a table, got it 2 times$"):
        read_yaml(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text("a: &x {c: 1}\nb: {<<: *x, c: 2}\n")
    assert read_yaml(tmp_path / "recipe.yaml") == {"a": {"c": 1}, "b": {"c": 2}}
