"""One fault, as a row of the tables beside this file."""

from typing import NamedTuple


class Fault(NamedTuple):
    """In `file`, `text`, which is there once, becomes `fault`; `tests`, pytest's arguments, are to notice it.

    why: what goes wrong then. harmless: why no test can notice it; the run fails if one does after all.
    """

    file: str
    text: str
    fault: str
    tests: str
    why: str
    harmless: str = ""

    @property
    def folder(self) -> str:
        """The folder of the package, or "kernels"."""
        parts = self.file.split("/")
        return parts[0] if parts[0] == "kernels" else parts[1]
