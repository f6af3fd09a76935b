"""Links between files of the repository lead somewhere."""

import re

import pytest
from docs_scripts import ROOT

MADE = {"changelog.md", "contributing.md", "measured.md", "reference/command.md", "reference/recipe.md", "command.md"}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def broken(page, text):
    """The relative links of a page that lead to no file."""
    links = [link.partition("#")[0] for link in _LINK.findall(text) if "://" not in link]
    return [link for link in links if link and link not in MADE and not (page.parent / link).exists()]


@pytest.mark.quick
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    assert broken(page, page.read_text()) == []


def test_a_link_to_nothing_is_found():
    assert broken(ROOT / "README.md", "[a](docs/methods.md#x) [b](docs/nothing.md) [c](https://a.b/c)") == [
        "docs/nothing.md"
    ]
