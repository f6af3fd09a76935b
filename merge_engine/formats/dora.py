"""DoRA's magnitudes: one number for each output of a layer, beside its factors."""

from collections.abc import Mapping
from math import prod
from typing import Any

from merge_engine.errors import AdapterError
from merge_engine.files.weights import StoredTensor
from merge_engine.formats.adapter import Module


def magnitudes_of(
    adapter: str,
    found: Mapping[str, Mapping[str, StoredTensor]],
    modules: Mapping[str, Module],
    config: Mapping[str, Any],
) -> dict[str, StoredTensor]:
    """{module: its magnitudes [M]} of an adapter with use_dora; found: its tensors by module and side.

    A convolution's are stored as [1, M, 1, 1]. Raises AdapterError where some are missing, have another size, or are
    there without use_dora.
    """
    magnitudes = {name: sides["magnitude"] for name, sides in found.items() if "magnitude" in sides}
    for name, stored in magnitudes.items():
        if not config.get("use_dora"):
            raise AdapterError(f"{adapter}: tensor {stored.key} is DoRA's, wanted use_dora with it")
        rows = modules[name].rows
        if prod(stored.shape) != rows or not stored.dtype.is_floating_point:
            raise AdapterError(f"{adapter}: {stored.key} is {list(stored.shape)}, wanted [{rows}]")
    if config.get("use_dora"):
        for name in modules:
            if name not in magnitudes:
                raise AdapterError(
                    f"{adapter}: use_dora is set in adapter_config.json; wanted a lora_magnitude_vector of each layer, "
                    f"got none of {name}"
                )
    return magnitudes
