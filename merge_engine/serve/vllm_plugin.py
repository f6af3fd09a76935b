"""A LoRA resolver for vLLM: a request for the model ``merge:sql+chat@ties,density=0.2`` loads that merge.

vLLM finds it by the entry point "vllm.general_plugins". It needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=true, and
MERGE_ENGINE_ADAPTERS, the folder of the adapters; MERGE_ENGINE_CACHE, MERGE_ENGINE_CACHE_LIMIT and
MERGE_ENGINE_MAX_RANK (that of --max-lora-rank) are optional.
Source: vllm/lora/resolver.py and vllm/plugins/lora_resolvers/filesystem_resolver.py of vLLM 0.33.
"""

import asyncio
import json
import logging
import os
import zlib
from pathlib import Path
from typing import Any

from merge_engine.errors import MergeError, RecipeError
from merge_engine.serve.names import PREFIX
from merge_engine.serve.resolver import Resolver

logger = logging.getLogger(__name__)
NAME = "merge-engine"


def register() -> None:
    """Register the resolver with vLLM; without MERGE_ENGINE_ADAPTERS, nothing."""
    folder = os.environ.get("MERGE_ENGINE_ADAPTERS")
    if not folder:
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    cache = os.environ.get("MERGE_ENGINE_CACHE") or str(Path.home() / ".cache" / "merge-engine")
    rank = os.environ.get("MERGE_ENGINE_MAX_RANK")
    if rank and not rank.isdecimal():
        raise RecipeError(f"MERGE_ENGINE_MAX_RANK: wanted a whole number, got {rank!r}")
    limit = os.environ.get("MERGE_ENGINE_CACHE_LIMIT") or "20GB"
    resolver = Resolver(folder, cache, limit=limit, max_rank=int(rank) if rank else None)
    LoRAResolverRegistry.register_resolver(NAME, resolver_class()(resolver))


def resolver_class() -> Any:
    """The class, which needs vLLM to be there."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    class MergeResolver(LoRAResolver):
        """Names that begin with ``merge:``; None, so that other resolvers are asked, for the rest."""

        def __init__(self, resolver: Resolver) -> None:
            self.resolver = resolver

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            if not lora_name.startswith(PREFIX):
                return None
            try:
                path = await asyncio.to_thread(self.resolver.resolve, lora_name)
            except MergeError as error:
                logger.warning("%s", error)
                return None
            base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
            if base != base_model_name:
                logger.warning("%s is for %s, the server has %s", lora_name, base, base_model_name)
                return None
            number = zlib.crc32(path.name.encode()) + 1  # the same for the same merge in every process, and above 0
            return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(path))

    return MergeResolver
