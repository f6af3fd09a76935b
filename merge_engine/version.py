"""The versions of this package and of what it computes with."""

__version__ = "0.2.0"


def versions() -> dict[str, str]:
    """What a report says of the versions that made a result."""
    import safetensors
    import torch

    return {"torch": str(torch.__version__), "merge-engine": __version__, "safetensors": safetensors.__version__}
