"""Faults to plant, in tables by the folders of the package: see `planted_faults`."""

from planted import commands, compute, disk, kernels, layouts, lowrank, merges, models
from planted.fault import Fault

FAULTS: list[Fault] = [
    fault for table in (compute, lowrank, kernels, disk, layouts, models, merges, commands) for fault in table.FAULTS
]
