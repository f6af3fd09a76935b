"""A machine with GPUs, as torch.cuda and torchrun describe it."""

from types import SimpleNamespace

import torch


def pretend_gpus(monkeypatch, gpus, current, local, capability=(9, 0)):
    """gpus: how many. current: the device that the caller made current. local: the rank on this machine, or None.

    capability: of each, (major, minor).
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    major, minor = capability
    properties = SimpleNamespace(major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", str(local))
