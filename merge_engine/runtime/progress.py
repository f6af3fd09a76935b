"""A progress bar on standard error: how much of the work is done, and how many modules."""

from types import TracebackType
from typing import Any

_FORMAT = "{percentage:3.0f}% |{bar}| {desc}, {elapsed} passed, about {remaining} left"


class Bar:
    """Per cent of the work, and "12 of 44 modules". Use it in a ``with`` statement.

    work: all there is to do, in any unit. count: how many modules (or what `unit` says) that is.
    shown: None shows it on a terminal only.
    """

    def __init__(self, work: int, count: int, shown: bool | None, unit: str = "modules") -> None:
        from tqdm import tqdm

        self._work, self._count, self._unit = work, count, unit
        self._done = self._finished = 0
        self._bar: Any = tqdm(
            total=work, disable=None if shown is None else not shown, bar_format=_FORMAT, desc=self._text()
        )

    def update(self, work: int) -> None:
        """So much work is done."""
        self._done += work
        self._bar.update(work)

    def finished(self, work: int, count: int = 1) -> None:
        """So many modules are finished, and this work with them."""
        self._finished += count
        self._bar.set_description_str(self._text(), refresh=False)
        self.update(work)

    def reach(self, work: int, count: int) -> None:
        """At least this is done: what failed, or was left out, is not waited for."""
        self.finished(max(0, work - self._done), max(0, count - self._finished))

    def _text(self) -> str:
        return f"{self._finished} of {self._count} {self._unit}"

    def __enter__(self) -> "Bar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._bar.close()
