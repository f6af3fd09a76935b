"""Lines that load an output: of which class, from where."""

import pytest

from merge_engine.formats.use import use_of_adapter, use_of_model, use_on_vllm


def lines(**config):
    return "\n".join(use_of_adapter({"r": 8, "base_model_name_or_path": "org/base", **config}, {}))


def test_the_class_is_that_of_the_task_or_of_the_model_that_was_trained():
    assert 'AutoModelForSeq2SeqLM.from_pretrained("org/base")' in lines(task_type="SEQ_2_SEQ_LM")
    mapping = {"base_model_class": "BertModel", "parent_library": "transformers.models.bert.modeling_bert"}
    assert "from transformers import BertModel\n" in lines(auto_mapping=mapping, task_type=None)
    assert 'from_pretrained("org/base", revision="v2")' in lines(task_type="CAUSAL_LM", revision="v2")


@pytest.mark.parametrize(
    "config",
    [
        {"task_type": None},
        {"auto_mapping": {"base_model_class": "Net", "parent_library": "__main__"}},
        {"auto_mapping": {"base_model_class": "no name", "parent_library": "transformers.x"}},
        {"task_type": "CAUSAL_LM", "base_model_name_or_path": None},
    ],
)
def test_where_nothing_says_how_the_base_is_loaded(config):
    text = lines(**config)
    assert "transformers" not in text and 'PeftModel.from_pretrained(base_model, ".")' in text


def test_vllm_serves_language_models_of_ranks_that_it_takes():
    config = {"r": 20, "base_model_name_or_path": "org/my base", "task_type": "CAUSAL_LM"}
    served = use_on_vllm(config)[2]
    assert served == "vllm serve 'org/my base' --enable-lora --max-lora-rank 32 --lora-modules merged=."
    for other in ({"r": 513}, {"task_type": "SEQ_CLS"}, {"rank_pattern": {"q": 4}}, {"base_model_name_or_path": None}):
        assert use_on_vllm({**config, **other}) == []


def test_full_models_are_loaded_by_their_own_class_or_code():
    plain = "\n".join(use_of_model({"architectures": ["LlamaForCausalLM"]}, ["tokenizer.json"]))
    assert "from transformers import AutoTokenizer, LlamaForCausalLM\n" in plain
    assert 'tokenizer = AutoTokenizer.from_pretrained(".")' in plain
    own = {"architectures": ["X"], "auto_map": {"AutoConfig": "x.C", "AutoModelForCausalLM": "x.X"}}
    assert 'AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)' in "\n".join(use_of_model(own, []))
    assert 'model = AutoModel.from_pretrained(".")' in "\n".join(use_of_model({"architectures": ["a b"]}, []))
