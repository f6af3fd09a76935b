"""All that an error may not change in a PEFT model."""

import copy

import torch
from peft_zoo import layers


def snapshot(model):
    """All that an error may not change: tensors, who is trainable, configurations, slots, active adapters."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: copy.deepcopy(config.to_dict()) for name, config in model.peft_config.items()},
        {
            name: {slot: list(getattr(layer, slot)) for slot in (*layer.adapter_layer_names, *layer.other_param_names)}
            for name, layer in layers(model).items()
        },
        {name: list(layer.active_adapters) for name, layer in layers(model).items()},
        list(model.active_adapters),
        [name for name, _ in model.named_modules()],
    )


def assert_unchanged(model, before):
    now = snapshot(model)
    assert now[1:] == before[1:]
    assert now[0].keys() == before[0].keys() and all(torch.equal(now[0][name], before[0][name]) for name in now[0])
