"""The pages of reference say all that the command knows."""

import pytest
from docs_scripts import script

commands = script("commands")


@pytest.mark.parametrize("name", commands.parsers())
def test_every_option_has_a_row(name):
    page = commands.command_page()
    section = page.partition(f"## merge-engine {name}\n")[2].partition("\n## merge-engine")[0]
    for action in commands.parsers()[name]._actions:
        for flag in action.option_strings:
            assert f"`{flag}`" in section


def test_keys_of_recipe_files_are_options_of_merge():
    rows = [line for line in commands.recipe_page().splitlines() if line.startswith("| `")]
    assert {row.split("`")[1] for row in rows} >= {
        "output",
        "method",
        "weights",
        "density",
        "min_tasks",
        "best",
        "into",
    }
    (row,) = (row for row in rows if row.startswith("| `trim_ties`"))
    assert "`exact`, `keep`" in row


@pytest.mark.parametrize("text", [commands.command_page(), commands.recipe_page()], ids=["command", "recipe"])
def test_rows_of_a_table_have_as_many_cells_as_its_head(text):
    width = 0
    for line in text.splitlines():
        cells = line.replace("\\|", "").count("|")
        if line.startswith("| ---"):
            width = cells
        elif line.startswith("| `"):
            assert cells == width, line
