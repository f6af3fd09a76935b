"""Adapters to sweep over, evaluations that say what they are told to, and what a sweep leaves."""

import csv

import torch
from lora_files import save_factors
from safetensors.torch import load_file

import merge_engine
from merge_engine.sweeps.goal import Goal
from merge_engine.sweeps.score import Evaluation

MODULES = ("layers.0.q_proj", "layers.1.q_proj")


def save_lora(folder, seed, rank=3, rows=10, columns=12):
    """A LoRA of whole numbers: its deltas have equal magnitudes and columns that vote 0."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (rank, columns), (rows, rank)
    factors = {name: [torch.randint(-2, 3, shape, generator=generator).float() for shape in shapes] for name in MODULES}
    return save_factors(folder, factors, lora_alpha=rank)


def factors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same(folder, adapters, **recipe):
    """The folder holds the bits of a single merge."""
    alone = folder.parent.parent / "alone"
    merge_engine.merge(adapters, alone, overwrite=True, **recipe)
    one, other = factors_of(folder), factors_of(alone)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def rows_of(output):
    with open(output / "sweep.csv", newline="") as file:
        return {row["folder"]: row for row in csv.DictReader(file)}


class Scores:
    """An evaluation that is told what to say of each folder, and remembers what it was asked."""

    def __init__(self, say=lambda folder: 1.0, text="scores"):
        self.say, self.text, self.asked = say, text, []

    def __call__(self, **goal):
        return Evaluation(self.text, self._measure, Goal(**goal))

    def _measure(self, folder):
        self.asked.append(folder.name)
        said = self.say(folder)
        return said if isinstance(said, dict) else {"score": said}
