"""Parts of torch that a merge of full models does not use, imported only when something asks for them.

``import torch`` takes about a second, a quarter of it for kernels of tensors without data (of torch.compile,
torch.export and the device "meta") that torch registers from Python. A merge of small full models spends much of its
time on this import. The command's own process puts empty modules in the place of these parts. One is filled when one of
its attributes is asked for, and all are before the import of a package that uses such tensors. Only for versions of
torch with which the tests have run: another one may need what is registered elsewhere, as torch.Generator does.
"""

import importlib.machinery
import sys
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

POSTPONED = (
    "torch._meta_registrations",
    "torch.export",
    "torch.distributions",
    "torch.quantization",
    "torch.utils.data",
)
TESTED = "2.13."  # how the versions begin
# These have to find all parts there.
USERS = ("torch._dynamo", "torch._inductor", "transformers", "diffusers", "peft", "accelerate")

_lock = threading.RLock()


class _Empty(ModuleType):
    """A module that was found, and is not executed yet."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # as `inspect` asks of every module
            raise AttributeError(name)
        _fill(self)
        return ModuleType.__getattribute__(self, name)


class _Later:
    """Makes the empty module; loader: the real one."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: see `_fill`."""


class _Finder:
    """Goes before the finders of Python."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name in USERS:
            fill()
        if name not in POSTPONED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Later(spec.loader)  # type: ignore[assignment]
        return spec


_allowed = False


def allow() -> None:
    """Called in a process of the command's own: in others, what torch is to be is not ours to say."""
    global _allowed
    _allowed = True


def postpone() -> None:
    """From now on, where it is allowed and torch is not imported yet."""
    if _allowed and "torch" not in sys.modules and _Finder not in sys.meta_path and _torch().startswith(TESTED):
        sys.meta_path.insert(0, _Finder)


def _torch() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def fill() -> None:
    """Execute what was postponed, and postpone nothing more."""
    if _Finder in sys.meta_path:
        sys.meta_path.remove(_Finder)
    for name in POSTPONED:
        if isinstance(module := sys.modules.get(name), _Empty):
            _fill(module)


def _fill(module: _Empty) -> None:
    """Execute the module's code: once, and other threads wait for it."""
    with _lock:
        loader = None if module.__spec__ is None else module.__spec__.loader
        if isinstance(loader, _Later):  # else it is executed, or being executed by this thread
            assert module.__spec__ is not None
            module.__spec__.loader = module.__loader__ = loader.loader
            loader.loader.exec_module(module)
            module.__class__ = ModuleType
