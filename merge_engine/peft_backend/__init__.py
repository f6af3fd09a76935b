"""A drop-in for PEFT's ``add_weighted_adapter``: fast, exact, and a failed call leaves your model unchanged.

import merge_engine.peft_backend

merge_engine.peft_backend.enable()
model.add_weighted_adapter(["sql", "chat", "ads"], [2, 1, 1], "merged", combination_type="ties", density=0.2)
"""

from merge_engine.peft_backend.drop_in import add_weighted_adapter
from merge_engine.peft_backend.enabling import disable, enable, enabled

__all__ = ["add_weighted_adapter", "disable", "enable", "enabled"]
