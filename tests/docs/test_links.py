"""Links between files of the repository lead somewhere, to a heading too, and the site's navigation has every page."""

import re
import sys
import unicodedata
from collections.abc import Iterator

import pytest
import yaml
from docs_scripts import ROOT, script

DOCS = ROOT / "docs"
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ +(.+?)(?: +#+)?$", re.MULTILINE)
_OBJECT = re.compile(r"^::: (\S+)$", re.MULTILINE)  # mkdocstrings gives it an anchor of its name


_path = list(sys.path)  # which the hooks extend
hooks = script("hooks")
sys.path[:] = _path
MADE = {DOCS / name: make for name, make in hooks.PAGES.items()}  # {page that only the site has: what makes its text}
SHOWN = {DOCS / path.relative_to(ROOT) for path in hooks.shown()}  # files that only the site has there


def on_github(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def on_the_site(heading):
    """The same of mkdocs."""
    plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def anchors(path, text):
    """The anchors of a page: those that it has wherever it is shown, of headings that are there once."""
    found = _HEADING.findall(_FENCED.sub("", text))
    headings = [re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading) for heading in found]
    places = ([on_github] if path not in MADE else []) + ([on_the_site] if DOCS in path.parents else [])
    slugs = [[slug(heading) for heading in headings] for slug in places]
    return {one for one in slugs[0] if all(each.count(one) == 1 for each in slugs)} | set(_OBJECT.findall(text))


def broken(page, text):
    """The relative links of a page that lead to no file, or to no heading of it."""
    return [link for link in _LINK.findall(text) if "://" not in link and not leads(page, *link.split("#"))]


def leads(page, link, anchor=None):
    path = (page.parent / link).resolve() if link else page
    if path not in MADE and path not in SHOWN and not path.exists():
        return False
    return anchor is None or anchor in anchors(path, MADE[path]() if path in MADE else path.read_text())


def entries(nav) -> Iterator[str]:
    """The pages of a navigation, which has lists in lists."""
    for entry in nav:
        for value in entry.values():
            if isinstance(value, str):
                yield value
            else:
                yield from entries(value)


@pytest.mark.quick
@pytest.mark.parametrize("page", FILES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    assert broken(page, page.read_text()) == []


@pytest.mark.parametrize("page", MADE, ids=lambda page: page.name)
def test_links_of_pages_that_are_made(page):
    assert broken(page, MADE[page]()) == []


@pytest.mark.quick
def test_the_navigation_has_every_page_once():
    nav = list(entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    pages = [*DOCS.rglob("*.md"), *MADE]
    assert sorted(nav) == sorted(str(page.relative_to(DOCS)) for page in pages)


def test_a_link_to_nothing_is_found():
    text = "[a](docs/methods.md#spaces) [b](docs/nothing.md) [c](https://a.b/c) [d](docs/methods.md#x) [e](#x)"
    assert broken(ROOT / "README.md", text) == ["docs/nothing.md", "docs/methods.md#x", "#x"]
    text = "[a](reference/command.md) [b](changelog.md#x) [c](reference/api.md#merge_engine.Recipe)"
    assert broken(DOCS / "start.md", text) == ["changelog.md#x"]


def test_anchors_are_those_of_github_and_of_mkdocs():
    text = "# `linear`, or a [sum](x.md)\n```\n# none\n```\n## mergekit's *recipes*\n## A -- b\n## Twice\n## Twice\n"
    assert anchors(DOCS / "page.md", text) == {"linear-or-a-sum", "mergekits-recipes"}
    assert "a----b" in anchors(ROOT / "README.md", text) and "a-b" in anchors(DOCS / "measured.md", text)
