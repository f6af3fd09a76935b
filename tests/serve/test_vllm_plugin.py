"""The resolver of vLLM, where vLLM is installed."""

import asyncio

import pytest

pytest.importorskip("vllm")

from merge_engine.serve import vllm_plugin


def test_it_is_registered_and_resolves(served, tmp_path, monkeypatch):
    from vllm.lora.resolver import LoRAResolverRegistry

    monkeypatch.setenv("MERGE_ENGINE_ADAPTERS", str(served))
    monkeypatch.setenv("MERGE_ENGINE_CACHE", str(tmp_path / "cache"))
    vllm_plugin.register()
    resolver = LoRAResolverRegistry.get_resolver(vllm_plugin.NAME)

    def ask(name, model="base"):
        return asyncio.run(resolver.resolve_lora(model, name))

    found = ask("merge:sql+chat@ties,density=0.2")
    assert found.lora_name == "merge:sql+chat@ties,density=0.2" and found.lora_int_id >= 1
    assert found.lora_path.startswith(str(tmp_path / "cache"))
    assert ask("merge:sql+chat@ties,density=0.2").lora_int_id == found.lora_int_id
    assert ask("merge:sql+ads").lora_int_id != found.lora_int_id
    assert ask("sql") is None and ask("merge:../x") is None and ask("merge:sql+chat", "other") is None
