"""What servers that load adapters want of them: vLLM's ranks, and what they refuse or leave out."""

import logging
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from merge_engine.formats.adapter import KEY_PREFIX, Module, is_base_copy
from merge_engine.formats.biases import BIAS
from merge_engine.formats.peft_tensors import EMBEDDINGS

logger = logging.getLogger(__name__)
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be
_SHOWN = 3  # names in a message


def max_lora_rank(rank: int) -> int | None:
    """The --max-lora-rank with which vLLM loads an adapter of this rank; None: it loads none so large."""
    place = bisect_left(VLLM_RANKS, rank)
    return VLLM_RANKS[place] if place < len(VLLM_RANKS) else None


def vllm_option(rank: int) -> str:
    """What to start vLLM with for an adapter of this rank, or that it loads none so large."""
    wanted = max_lora_rank(rank)
    if wanted is None:
        return f"vLLM loads ranks up to {VLLM_RANKS[-1]}, this adapter has {rank}"
    return f"vLLM loads it with --max-lora-rank {wanted}"


def trouble_of_servers(modules: Iterable[Module], extras: Sequence[str]) -> str | None:
    """What of an adapter vLLM and SGLang refuse, or leave out without a word; None if they load all of it.

    modules: its modules. extras: keys of the tensors beside the factors.
    """
    modules, found = list(modules), []
    saved = sorted(key.removeprefix(KEY_PREFIX) for key in extras if not is_base_copy(key))
    if saved:
        found.append(f"layers that are saved whole ({_first(saved)})")
    ends = sorted(
        module.name
        for module in modules
        if module.kind == "embedding" or module.name.rpartition(".")[2] in EMBEDDINGS - {"decoder", "shared"}
    )
    if ends:
        found.append(f"LoRA of embeddings and output heads ({_first(ends)})")
    biases = sorted(module.name for module in modules if module.kind == BIAS)
    if biases:
        found.append(f"lora_bias ({_first(biases)})")
    return " and ".join(found) or None


def warn_of_servers(subject: object, trouble: str | None) -> None:
    """Log in one line what servers will not load, if there is something."""
    if trouble is not None:
        logger.warning(
            "%s: has %s, which servers such as vLLM and SGLang may refuse or leave out; "
            "a full model, merged --into BASE, is served as it is",
            *(subject, trouble),
        )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
