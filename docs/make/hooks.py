"""What the site has beyond docs/: pages made from the code and from bench/results, and links to files outside docs/.

`mkdocs build --strict` runs this. Nothing here imports torch, so that the site is built in seconds.
"""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import commands  # noqa: E402
import figures  # noqa: E402
import measured  # noqa: E402

SHOWN = ("*.png", "*.csv")  # of bench/results
MOVED = {"../CHANGELOG.md": "changelog.md", "../CONTRIBUTING.md": "contributing.md", "../README.md": "index.md"}
_LINK = re.compile(r"(?<=\]\()\.\./[^)\s#]+")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made, and the files of bench/results that pages show."""
    pages = {
        "reference/command.md": commands.command_page(),
        "reference/recipe.md": commands.recipe_page(),
        "measured.md": measured.page(ROOT / "bench" / "results"),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for pattern in SHOWN:
        for path in sorted((ROOT / "bench" / "results").glob(pattern)):
            files.append(File.generated(config, f"bench/results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links from docs/ to files of the repository lead to where the site has them; figures lose their marks."""
    if ROOT / "docs" / page.file.src_uri in figures.PAGES:  # contributing.md shows a mark
        markdown = figures.MARK.sub(r"\3", markdown)
    if "/" in page.file.src_uri:
        return markdown
    return _LINK.sub(lambda found: MOVED.get(found[0], found[0].removeprefix("../")), markdown)
