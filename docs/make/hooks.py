"""What the site has beyond docs/: pages made from the code and from bench/results, and links to files outside docs/.

`mkdocs build --strict` runs this. Nothing here imports torch, so that the site is built in seconds.
"""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import commands  # noqa: E402
import figures  # noqa: E402
import measured  # noqa: E402

# {a page that is made: what makes its text}
PAGES: dict[str, Callable[[], str]] = {
    "reference/command.md": commands.command_page,
    "reference/recipe.md": commands.recipe_page,
    "measured.md": partial(measured.page, ROOT / "bench" / "results"),
    "changelog.md": (ROOT / "CHANGELOG.md").read_text,
    "contributing.md": (ROOT / "CONTRIBUTING.md").read_text,
}
SHOWN = ("*.png", "*.csv")  # of bench/results
MOVED = {"../CHANGELOG.md": "changelog.md", "../CONTRIBUTING.md": "contributing.md", "../README.md": "index.md"}
_LINK = re.compile(r"(?<=\]\()\.\./[^)\s#]+")


def on_files(files: "Files", config: Any) -> "Files":
    """Add the pages that are made, and the files of bench/results that pages show."""
    from mkdocs.structure.files import File  # not at the top: tests read PAGES without mkdocs

    for name, make in PAGES.items():
        files.append(File.generated(config, name, content=make()))
    for path in shown():
        files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files


def shown() -> list[Path]:
    """The files of bench/results that the site has, under the same path."""
    return [path for pattern in SHOWN for path in sorted((ROOT / "bench" / "results").glob(pattern))]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links from docs/ to files of the repository lead to where the site has them; figures lose their marks."""
    if ROOT / "docs" / page.file.src_uri in figures.PAGES:  # contributing.md shows a mark
        markdown = figures.MARK.sub(r"\3", markdown)
    if "/" in page.file.src_uri:
        return markdown
    return _LINK.sub(lambda found: MOVED.get(found[0], found[0].removeprefix("../")), markdown)
