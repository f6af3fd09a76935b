"""The bundled base and adapters are what they are said to be, and can be made again."""

import copy
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from merge_engine.demo import DATA, UNKNOWN_DATA, adapter_paths, train
from merge_engine.demo.tasks import TASKS, accuracy, draw, predict

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


MARKED = 11  # a sample that neither training nor the demo has seen
LAYERS = 2


@pytest.mark.quick
def test_bundle_is_small_and_names_no_place():
    files = [path for path in DATA.rglob("*") if path.is_file() and UNKNOWN_DATA not in path.parents]
    assert sum(path.stat().st_size for path in files) < 1_500_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in adapter_paths().values():
        assert json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"] == train.BASE_NAME


def test_base_half_knows_every_task(base):
    marks = [accuracy(base, task, seed=MARKED) for task in TASKS]
    assert 0.55 < sum(marks) / len(marks) < 0.75
    assert min(marks) > 0.5


@pytest.mark.parametrize("task", TASKS)
def test_adapter_beats_the_base_and_moves_it_little(base, task):
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(adapter_paths()[task]))
    adapted = [name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert len(adapted) == len(train.LINEAR) * LAYERS
    assert accuracy(model, task, seed=MARKED) > accuracy(base, task, seed=MARKED)
    assert 0.02 < train.delta_norm(model) < 0.07


def test_adapters_share_the_start_of_A_as_documented():
    starts = {
        task: torch.cat([x.flatten() for name, x in sorted(load_file(file).items()) if "lora_A" in name])
        for task, path in adapter_paths().items()
        for file in path.glob("*.safetensors")
    }
    for one, other in itertools.combinations(TASKS, 2):
        cosine = torch.nn.functional.cosine_similarity(starts[one], starts[other], dim=0)
        assert cosine > 0.8 if {one, other} <= set(train.SHARED_A) else abs(cosine) < 0.1, (one, other)


def test_training_learns_and_writes_what_peft_loads(tmp_path):
    state = torch.random.get_rng_state()
    base = train.train_base(5, target=0.9, max_steps=3)
    base.save_pretrained(tmp_path / "base")
    before = {name: x.clone() for name, x in base.state_dict().items()}
    model = train.train_adapter(base, "shift3", 5, steps=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[name], x) for name, x in base.state_dict().items())
    train.save_adapter(model, tmp_path / "shift3")
    assert sorted(path.name for path in (tmp_path / "shift3").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    loaded = peft.PeftModel.from_pretrained(again, str(tmp_path / "shift3"))
    tokens = draw("shift3", 4, torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert not torch.equal(predict(model, tokens), predict(base, tokens))
        torch.testing.assert_close(predict(loaded, tokens), predict(model, tokens))


def test_training_depends_on_the_seed_only():
    one, other, third = (train.train_base(seed, max_steps=2).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], third["model.embed_tokens.weight"])
