"""PEFT's own tests of merging, run with stock PEFT and with the drop-in enabled: every outcome must be the same.

    python tests/helpers/peft_suite.py           # the newest PEFT
    python tests/helpers/peft_suite.py 0.21.2

Sources and tests come from PEFT's source distribution, which pip downloads; the models that the tests ask for are made
here, tiny and random, in a local hub cache.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
FILES = ["custom_models", "decoder_models", "encoder_decoder_models", "feature_extraction_models", "target_parameters"]
# AdaMSS needs scikit-learn, and has nothing to do with LoRA.
WHICH = "(add_weighted_adapter or merging_adapters or weighted_combination or multiple_active_adapters) and not adamss"
TINY = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = {**TINY, "vocab_size": 100, "max_position_embeddings": 64}
LLAMA = {**TINY, "vocab_size": 100, "num_key_value_heads": 4, "head_dim": 8}
GPT = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
EXPERTS = {**LLAMA, "num_local_experts": 4, "intermediate_size_mlp": 48, "attention_chunk_size": 64}
# {hub id: (class of the model, values of its configuration)}
MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        {**TINY, "vocab_size": 100, "ffn_dim": 40, "word_embed_proj_dim": 32},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", GPT),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", LLAMA),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", LLAMA),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", LLAMA),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0},
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        {"vocab_size": 100, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64}
        | {"encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", BERT),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", BERT),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", BERT),
    "bert-base-uncased": ("BertForSequenceClassification", BERT),
    "trl-internal-testing/tiny-Llama4ForCausalLM": ("Llama4ForCausalLM", EXPERTS),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("GptOssForCausalLM", EXPERTS),
}


def fetch(folder: Path, version: str = "") -> Path:
    """The unpacked source distribution of PEFT, the newest without a version. Raises CalledProcessError without one."""
    wanted = f"peft=={version}" if version else "peft"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", wanted]
    subprocess.run(command, cwd=folder, check=True)
    (archive,) = folder.glob("peft-*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    source = folder / archive.name.removesuffix(".tar.gz")
    (source / "tests" / "__init__.py").touch()
    return source


def make_hub(folder: Path) -> None:
    """The models in the layout of huggingface_hub's cache."""
    import transformers

    for name, (kind, values) in MODELS.items():
        torch.manual_seed(0)
        model_class = getattr(transformers, kind)
        config = model_class.config_class(**{"pad_token_id": 1, **values})
        place = folder / f"models--{name.replace('/', '--')}"
        model_class(config).save_pretrained(place / "snapshots" / "made-here")
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("made-here")


def outcomes(source: Path, hub: Path, *, drop_in: bool) -> dict[str, str]:
    """{test: "passed", "failed" or "skipped"}."""
    files = [file for name in FILES if (file := source / "tests" / f"test_{name}.py").exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "peft_suite_plugin", "-k", WHICH, *map(str, files)]
    command += ["-o", "addopts=", "-o", "filterwarnings="]
    with tempfile.NamedTemporaryFile() as report:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(source / "src"), str(HERE), str(HERE.parent.parent)]),
            "HF_HUB_CACHE": str(hub),
            "HF_HUB_OFFLINE": "1",
            "DROP_IN": str(int(drop_in)),
            "OUTCOMES": report.name,
        }
        done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
        if not (text := Path(report.name).read_text()):
            raise RuntimeError(f"PEFT's tests did not run: {done.stdout[-4000:]}{done.stderr[-4000:]}")
        return json.loads(text)


def compare(source: Path, folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(outcomes of stock PEFT, outcomes with the drop-in); folder: for the models."""
    make_hub(folder)
    stock, ours = (outcomes(source, folder, drop_in=drop_in) for drop_in in (False, True))
    return stock, ours


def main(version: str = "") -> int:
    with tempfile.TemporaryDirectory() as folder:
        source = fetch(Path(folder), version)
        stock, ours = compare(source, Path(folder) / "hub")
    for kind, found in (("stock", stock), ("drop-in", ours)):
        print(source.name, kind, {each: list(found.values()).count(each) for each in ("passed", "failed", "skipped")})
    differ = [test for test in stock.keys() | ours.keys() if stock.get(test) != ours.get(test)]
    for test in sorted(differ):
        print(f"{test}: {stock.get(test)} in stock PEFT, {ours.get(test)} with the drop-in")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
