"""What inputs are called in texts that others read."""

import pytest

from merge_engine.files.local_names import names_of_paths, renamed, shown_name, shown_names

pytestmark = pytest.mark.quick


def test_local_folders_have_their_own_names_and_hub_ids_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "base").mkdir(parents=True)
    assert shown_names(["/home/me/sql", "user/chat", "user/x:a.safetensors", "../b.safetensors", "org/base"]) == [
        "sql",
        "user/chat",
        "user/x:a.safetensors",
        "b.safetensors",
        "base",
    ]
    assert shown_name(".") == tmp_path.name and shown_name("~/sql") == "sql" and shown_name("gpt2") == "gpt2"


def test_as_many_folders_as_tell_them_apart():
    names = shown_names(["/a/one/last", "/a/two/last", "/b/one/last", "/last", "/a/one/last"])
    assert names == ["a/one/last", "two/last", "b/one/last", "last", "a/one/last"]
    assert shown_names(["/x/base+/y/lora", "/x/base", "user/m+/z/base"]) == ["x/base+lora", "x/base", "user/m+z/base"]


def test_paths_are_found_and_replaced_wherever_they_are():
    value = {"a": ["/home/me/sql", {"b": "~/chat"}], "/home/me/sql": 1, "c": "up/../down", "n": None, "d": "/x\ny"}
    names = names_of_paths([value, ["/home/you/sql"]])
    assert names == {"/home/me/sql": "me/sql", "~/chat": "chat", "/home/you/sql": "you/sql"}
    assert renamed(value, names) == {**value, "a": ["me/sql", {"b": "chat"}]}
