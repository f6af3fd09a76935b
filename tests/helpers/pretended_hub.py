"""A hub in memory, in place of huggingface_hub's HfApi: what is committed to it, and what it refuses."""

import inspect
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi as Real


@dataclass
class Commit:
    repo: str
    private: bool | None
    token: str | None
    files: dict[str, bytes]


@dataclass
class PretendedHub:
    """commits: in order. refuses: the text of the error that every question ends in; None: none does."""

    commits: list[Commit] = field(default_factory=list)
    refuses: str | None = None

    def api(self, token=None):
        hub, made = self, {}

        class Api:
            def whoami(self):
                if hub.refuses is not None:
                    raise RuntimeError(hub.refuses)
                return {"name": "user"}

            def create_repo(self, repo_id, *, private=None, exist_ok=False):
                self.whoami()
                assert exist_ok
                inspect.signature(Real.create_repo).bind(self, repo_id, private=private, exist_ok=exist_ok)
                made[repo_id] = private
                return f"https://huggingface.co/{repo_id}"

            def create_commit(self, repo_id, operations, *, commit_message):
                assert commit_message
                inspect.signature(Real.create_commit).bind(self, repo_id, operations, commit_message=commit_message)
                files = {}
                for each in operations:
                    content = each.path_or_fileobj
                    files[each.path_in_repo] = content if isinstance(content, bytes) else Path(content).read_bytes()
                hub.commits.append(Commit(repo_id, made[repo_id], token, files))

        return Api()
