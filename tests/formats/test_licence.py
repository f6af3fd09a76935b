"""The licence of what is merged: said where all inputs say the same."""

import pytest

from merge_engine.formats.licence import agreed_licence


def card(folder, text):
    folder.mkdir()
    (folder / "README.md").write_text(text)
    return folder


def test_all_agree_or_nothing_is_said(tmp_path):
    mit = [card(tmp_path / name, "---\nlicense: mit\ntags: [x]\n---\n# a\n") for name in "ab"]
    assert agreed_licence(mit) == agreed_licence(mit[:1]) == {"license": "mit"}
    other = card(tmp_path / "c", "---\nlicense: apache-2.0\n---\n")
    assert agreed_licence([*mit, other]) == agreed_licence([*mit, tmp_path]) == agreed_licence([]) == {}


def test_a_licence_of_its_own_has_a_name_and_a_link(tmp_path):
    front = "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n"
    two = [card(tmp_path / "a", front), card(tmp_path / "b", front)]
    assert agreed_licence(two) == {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}
    renamed = card(tmp_path / "c", front.replace("llama3", "gemma"))
    assert agreed_licence([*two, renamed]) == {}


@pytest.mark.parametrize(
    "text", ["", "# no front\n", "---\nlicense: mit\n", "---\n: [\n---\n", "---\n- 1\n---\n", "---\nlicense:\n---\n"]
)
def test_cards_that_say_nothing(tmp_path, text):
    assert agreed_licence([card(tmp_path / "a", text)]) == {}
