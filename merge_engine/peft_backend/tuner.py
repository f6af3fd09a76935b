"""Which part of a model holds its LoRA adapters: a PEFT model, or a model that adapters were injected into."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from merge_engine.errors import AdapterError

METHOD = "add_weighted_adapter"


def tuner_of(model: Any) -> Any:
    """The LoraModel of a model: PEFT's own, or one around a model that has adapters but no PeftModel.

    Such are models of transformers and diffusers after their ``add_adapter``, and all after PEFT's
    ``inject_adapter_in_model``. Wrappers of any kind (torch.compile, DistributedDataParallel) may be around it.

    Raises TypeError, in PEFT's words, for a model whose adapters are of other kinds, and AdapterError for one without
    adapters, or with several parts that have some.
    """
    if not isinstance(model, nn.Module):
        parts = getattr(model, "components", {})  # of a pipeline of diffusers
        found = [name for name, part in parts.items() if isinstance(part, nn.Module) and next(_holders(part), None)]
        wanted = f"one of its models with adapters ({', '.join(found)})" if found else "a model with LoRA adapters"
        raise AdapterError(f"model: wanted {wanted}, got a {type(model).__name__}")
    holders = list(_holders(model))
    if not holders:
        raise AdapterError(f"model: wanted one with LoRA adapters, got a {type(model).__name__} without any")
    if len(holders) > 1:
        names = ", ".join(type(holder).__name__ for holder in holders)
        raise AdapterError(f"model: wanted one part with adapters, got several: {names}")
    return _tuner(holders[0])


def has_lora(model: nn.Module) -> bool:
    """Whether a model has LoRA adapters, and a configuration of each."""
    from peft import LoraConfig

    configs = model.__dict__.get("peft_config")
    return isinstance(configs, dict) and any(type(config) is LoraConfig for config in configs.values())


def _holders(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that hold adapters."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    if isinstance(module, PeftModel | BaseTuner) or isinstance(module.__dict__.get("peft_config"), dict):
        yield module
    else:
        for child in module.children():
            yield from _holders(child)


def _tuner(holder: nn.Module) -> Any:
    from peft import PeftModel
    from peft.tuners.lora import LoraModel
    from peft.tuners.tuners_utils import BaseTuner

    tuner: Any = holder.base_model if isinstance(holder, PeftModel) else holder
    if isinstance(tuner, BaseTuner):
        overridden = getattr(type(tuner), METHOD, None) is not getattr(LoraModel, METHOD)
        if not isinstance(tuner, LoraModel) or overridden:
            raise TypeError(f"{type(tuner).__name__} does not support add_weighted_adapter method.")
        return tuner
    if not has_lora(holder):
        raise TypeError(f"{type(holder).__name__} does not support add_weighted_adapter method.")
    around: Any = LoraModel.__new__(LoraModel)  # its __init__ would inject an adapter
    nn.Module.__init__(around)
    around.model, around.peft_config = tuner, tuner.peft_config
    return around
