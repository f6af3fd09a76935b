"""Sends an output to the hub."""

from collections.abc import Mapping
from pathlib import Path

from merge_engine.errors import OutputError
from merge_engine.files.locate import answer, is_hub_id


def check_push(repo: str, token: str | None = None) -> None:
    """Raise OutputError unless it is a hub id and the hub knows who asks: before a merge, not after it."""
    import huggingface_hub

    if not isinstance(repo, str) or not is_hub_id(repo):
        raise OutputError(f"push: wanted a hub id user/repo, got {repo!r}")
    try:
        answer(huggingface_hub.HfApi(token=token).whoami)
    except Exception as failure:
        raise OutputError(f"push: the hub does not say who asks: {_first_line(failure)}") from failure


def push(
    path: Path, repo: str, texts: Mapping[str, str], *, private: bool | None = None, token: str | None = None
) -> str:
    """Send a folder, or one file, to a repository of the hub, in one commit. A repository that is missing is made.

    texts: {name: text} of files that are sent otherwise than they are on the disk. private: of a new repository; None:
    as the account has it. Returns the address. Raises OutputError, and the output stays where it is on the disk.
    """
    import huggingface_hub

    if not isinstance(repo, str) or not is_hub_id(repo):
        raise OutputError(f"push: wanted a hub id user/repo, got {repo!r}")
    root = path if path.is_dir() else path.parent
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    names = [file.relative_to(root).as_posix() for file in files]
    try:
        operations = [
            huggingface_hub.CommitOperationAdd(name, texts[name].encode() if name in texts else file)
            for name, file in zip(names, files, strict=True)
        ]
        api = huggingface_hub.HfApi(token=token)
        address = answer(lambda: api.create_repo(repo, private=private, exist_ok=True))
        api.create_commit(repo, operations, commit_message="A merge by merge-engine")
    except Exception as failure:  # the hub raises its own, httpx's and OS errors
        raise OutputError(f"{path} is complete, but could not be pushed to {repo}: {_first_line(failure)}") from failure
    return str(address)


def _first_line(failure: Exception) -> str:
    return (str(failure).strip() or type(failure).__name__).splitlines()[0]
