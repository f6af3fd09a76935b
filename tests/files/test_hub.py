"""What is sent to the hub, by a hub that is not there."""

import pytest

from merge_engine.errors import OutputError
from merge_engine.files.hub import check_push, push


def test_a_folder_is_sent_in_one_commit(tmp_path, pretended_hub):
    (tmp_path / "sub").mkdir()
    for name in ("a.bin", "sub/b.txt", "README.md"):
        (tmp_path / name).write_bytes(name.encode())
    address = push(tmp_path, "user/repo", {"README.md": "changed é"}, private=True, token="secret")
    assert address == "https://huggingface.co/user/repo"
    (commit,) = pretended_hub.commits
    assert (commit.repo, commit.private, commit.token) == ("user/repo", True, "secret")
    assert commit.files == {"a.bin": b"a.bin", "sub/b.txt": b"sub/b.txt", "README.md": "changed é".encode()}
    assert (tmp_path / "README.md").read_bytes() == b"README.md"


def test_a_file_is_sent_alone(tmp_path, pretended_hub):
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    push(tmp_path / "a.safetensors", "user/repo", {})
    assert [commit.files for commit in pretended_hub.commits] == [{"a.safetensors": b"a.safetensors"}]


def test_what_the_hub_refuses_is_one_error(tmp_path, pretended_hub):
    (tmp_path / "a").write_text("a")
    with pytest.raises(OutputError, match=r"^push: wanted a hub id user/repo, got 'repo'$"):
        check_push("repo")
    check_push("user/repo")
    pretended_hub.refuses = "401 Unauthorized\nand more"
    with pytest.raises(OutputError, match=r"^push: the hub does not say who asks: 401 Unauthorized$"):
        check_push("user/repo")
    with pytest.raises(OutputError, match=r"is complete, but could not be pushed to user/repo: 401 Unauthorized$"):
        push(tmp_path, "user/repo", {})
    with pytest.raises(OutputError, match=r"^push: wanted a hub id user/repo, got '../x'$"):
        push(tmp_path, "../x", {})
    assert pretended_hub.commits == [] and [path.name for path in tmp_path.iterdir()] == ["a"]
