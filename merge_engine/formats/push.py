"""An output on the hub: the same files, and a card that loads them from there."""

from pathlib import Path

from merge_engine.errors import OutputError
from merge_engine.files.hub import push
from merge_engine.formats.licence import CARD
from merge_engine.report.card import moved


def push_output(path: Path | None, repo: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Send a merged adapter or model to ``user/repo``; the address. path: its folder or file; None: it has none.

    Raises OutputError: there is nothing on the disk, or the hub does not take it.
    """
    if path is None:
        raise OutputError("push: wanted a merge that was written to a folder, got one that was kept in memory")
    card = path / CARD
    texts = {CARD: moved(card.read_text(encoding="utf-8"), repo)} if card.is_file() else {}
    return push(path, repo, texts, private=private, token=token)
