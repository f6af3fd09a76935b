"""Where the drop-in takes the place of PEFT's method, and how that is undone."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from merge_engine.peft_backend.drop_in import add_weighted_adapter
from merge_engine.peft_backend.tuner import METHOD, has_lora

# Classes of models that have `add_adapter` and no PeftModel, by module: those that are imported get the method.
MIXINS = {"transformers.integrations.peft": "PeftAdapterMixin", "diffusers.loaders.peft": "PeftAdapterMixin"}


def enable() -> None:
    """Replace ``add_weighted_adapter`` of all PEFT LoRA models by ours. Calling this again changes nothing.

    Touched are the method of ``peft.tuners.lora.LoraModel``, and the classes of transformers' and diffusers' models
    (``PeftAdapterMixin``), where these are imported: their models get the method once they have LoRA adapters, so that
    it can be called after their ``add_adapter``. Nothing else is: IA3 and all other tuners keep their own.
    """
    _state.hold(enabled=True)


def disable() -> None:
    """Restore PEFT's own method, and take it from other models, unless a ``with enabled():`` is still open.

    Calling this again changes nothing.
    """
    _state.hold(enabled=False)


@contextmanager
def enabled() -> Iterator[None]:
    """As `enable` inside the block, in all threads. Blocks may nest, and overlap between threads."""
    _state.hold(blocks=1)
    try:
        yield
    finally:
        _state.hold(blocks=-1)


class _OfModelsWithLora:
    """The method of models that have LoRA adapters; others do not have it."""

    def __get__(self, model: Any, owner: type) -> Any:
        if model is None:
            return add_weighted_adapter
        if not has_lora(model):
            raise AttributeError(f"{owner.__name__!r} object has no attribute {METHOD!r}")
        return add_weighted_adapter.__get__(model, owner)


class _State:
    """Whether PEFT's method is replaced: it is after `enable`, and while a block is open."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.enabled = False
        self.blocks = 0
        self.stock: Callable[..., Any] | None = None
        self.mixins: list[type] = []

    def hold(self, *, enabled: bool | None = None, blocks: int = 0) -> None:
        from peft.tuners.lora import LoraModel

        with self.lock:
            self.enabled = self.enabled if enabled is None else enabled
            self.blocks += blocks
            if self.enabled or self.blocks > 0:
                if self.stock is None:
                    self.stock = LoraModel.add_weighted_adapter
                    setattr(LoraModel, METHOD, add_weighted_adapter)
                self._add_to_mixins()
            elif self.stock is not None:
                setattr(LoraModel, METHOD, self.stock)
                self.stock = None
                while self.mixins:
                    delattr(self.mixins.pop(), METHOD)

    def _add_to_mixins(self) -> None:
        for module, name in MIXINS.items():
            mixin = getattr(sys.modules.get(module), name, None)
            if mixin is not None and not hasattr(mixin, METHOD):
                setattr(mixin, METHOD, _OfModelsWithLora())
                self.mixins.append(mixin)


_state = _State()
