"""How an output is loaded, in lines that run: the section on use of a model card."""

import json
import shlex
from collections.abc import Collection, Mapping
from typing import Any

from merge_engine.formats.servers import max_lora_rank
from merge_engine.report.card import HERE, code

# The class by which transformers loads a base model, by PEFT's names of tasks.
_BY_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")
_HEADS = (".score.weight", ".classifier.weight", ".classifier.out_proj.weight")  # [labels, width]


def use_of_adapter(config: Mapping[str, Any], saved: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Lines that load an adapter with PEFT. config: its adapter_config.json. saved: {key: shape} of saved layers."""
    base, loader = config.get("base_model_name_or_path"), _loader(config)
    load = f'model = PeftModel.from_pretrained(%s, "{HERE}")'
    if base is None or loader is None:
        return code("python", "from peft import PeftModel", "", f"{load % 'base_model'}  # base_model: loaded as usual")
    revision = config.get("revision")
    at = f", revision={_text(revision)}" if isinstance(revision, str) else ""
    labels = next((shape[0] for key, shape in saved.items() if key.endswith(_HEADS)), None)
    if labels is not None and loader.endswith(_CLASSIFIERS):
        at += f", num_labels={labels}"
    return code(
        "python",
        "from peft import PeftModel",
        f"from transformers import {loader}",
        "",
        f"model = {loader}.from_pretrained({_text(base)}{at})",
        load % "model",
    )


def use_on_vllm(config: Mapping[str, Any]) -> list[str]:
    """Lines that serve an adapter with vLLM; none where it is no language model's, or vLLM loads no such rank."""
    rank, base = max_lora_rank(config["r"]), config.get("base_model_name_or_path")
    loader = _loader(config) or ""
    if rank is None or base is None or config.get("rank_pattern") or not loader.endswith("ForCausalLM"):
        return []
    served = f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {rank} --lora-modules merged={HERE}"
    return ["", *code("bash", served)]


def use_of_model(config: Mapping[str, Any], files: Collection[str]) -> list[str]:
    """Lines that load a full model with transformers.

    config: its config.json. files: the names of the files beside it.
    """
    of_code, names = config.get("auto_map"), config.get("architectures")
    loader, trust = "AutoModel", ""
    if isinstance(of_code, Mapping):
        loader = next((name for name in sorted(of_code) if name.startswith("AutoModelFor")), loader)
        trust = ", trust_remote_code=True"
    elif isinstance(names, list) and names and isinstance(names[0], str) and names[0].isidentifier():
        loader = names[0]
    has_tokenizer = any(name.startswith("tokenizer") for name in files)
    return code(
        "python",
        f"from transformers import {', '.join(sorted([loader, *(['AutoTokenizer'] if has_tokenizer else [])]))}",
        "",
        f'model = {loader}.from_pretrained("{HERE}"{trust})',
        *([f'tokenizer = AutoTokenizer.from_pretrained("{HERE}"{trust})'] if has_tokenizer else []),
    )


def _loader(config: Mapping[str, Any]) -> str | None:
    """The class of transformers that loads the base model, as far as the configuration says it."""
    task, mapping = config.get("task_type"), config.get("auto_mapping")
    if isinstance(task, str) and task in _BY_TASK:
        return _BY_TASK[task]
    if isinstance(mapping, Mapping) and str(mapping.get("parent_library", "")).startswith("transformers."):
        name = mapping.get("base_model_class")
        return name if isinstance(name, str) and name.isidentifier() else None
    return None


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
