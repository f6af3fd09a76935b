"""What a merge tells of itself: its recipe.yaml repeats it, its card's code runs, and both go to the hub."""

import copy
import json
import re

import pytest
import torch
import yaml
from command_line import run_cli
from image_files import save_image
from mlx_files import save_mlx
from peft import LoraConfig, get_peft_model
from peft_adapters import in_peft, peft_deltas, save_adapter, tiny_llama
from safetensors.torch import load_file
from toy_models import bytes_of, save_base
from toy_models import save_adapter as save_toy_adapter
from transformers import LlamaConfig, LlamaForSequenceClassification

import merge_engine
from merge_engine.errors import OutputError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """(base, adapters): a tiny Llama on the disk, and three adapters of it of different ranks."""
    root = tmp_path_factory.mktemp("llamas")
    base = root / "base"
    tiny_llama().save_pretrained(base)
    adapters = [save_adapter(root / name, seed, r=2 + seed) for seed, name in enumerate(["sql", "chat", "ads"])]
    for folder in adapters:
        config = json.loads((folder / "adapter_config.json").read_text())
        config |= {"base_model_name_or_path": str(base), "task_type": "CAUSAL_LM"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return base, adapters


def tensors_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def card_of(folder):
    """(front matter, code by language) of a card."""
    front, text = (folder / "README.md").read_text().split("---\n", 2)[1:]
    blocks = text.split("## Use\n")[1].split("```")[1::2]
    return yaml.safe_load(front), {block.partition("\n")[0]: block.partition("\n")[2] for block in blocks}


RECIPES = {
    "ties": {"weights": [2, 1, -0.5]},
    "ties, by patterns": {"density": {".*q_proj": 0.7, ".*": [0.1, 0.2, 0.3]}, "convention": "mergekit", "rank": 6},
    "paper": {"convention": "paper", "density": 0.4},
    "dare": {"method": "dare_ties", "seed": 2**64 - 1, "convention": "mergekit", "dtype": "bfloat16"},
    "tsv": {"method": "tsv", "scale": "auto", "gain": 1.3, "energy": 0.9},
    "by blocks": {"method": "linear", "block_weights": {"chat": {".*k_proj": 0.25}}},
    "linear": {"method": "linear", "space": "core", "ranks": "own", "balance": "pico"},
    "actmat": {"method": "actmat", "ridge": 0.3},
    "consensus": {"method": "consensus", "mask": 0.5, "min_tasks": 1},
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_beside_an_adapter_repeats_the_merge(llamas, tmp_path, capsys, name):
    merge_engine.merge(llamas[1], tmp_path / "one", **RECIPES[name])
    code, _, err = run_cli(capsys, "merge", tmp_path / "one" / "recipe.yaml", "-o", tmp_path / "two")
    assert code == 0, err
    assert tensors_of(tmp_path / "one") == tensors_of(tmp_path / "two")
    for file in ("recipe.yaml", "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    told = yaml.safe_load((tmp_path / "one" / "recipe.yaml").read_text())
    assert None not in told.values() and told["adapters"] == [str(path) for path in llamas[1]]
    changed = {**told, "weights": [w + i for i, w in enumerate(told["weights"])]}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(changed, sort_keys=False))
    assert run_cli(capsys, "merge", tmp_path / "other.yaml", "-o", tmp_path / "three")[0] == 0
    assert tensors_of(tmp_path / "three") != tensors_of(tmp_path / "one")


@pytest.mark.parametrize(
    "recipe", [{}, {"method": "dare_linear", "dtype": "float32", "scale": 0.5}, {"method": "cat"}], ids=str
)
def test_the_recipe_beside_a_model_repeats_the_merge(tmp_path, capsys, recipe):
    base = save_base(tmp_path / "base")
    inputs = [save_toy_adapter(tmp_path / "sql", 1), save_toy_adapter(tmp_path / "chat", 2)]
    merge_engine.merge_into(base, inputs, tmp_path / "one", weights=[1, 0.5], **recipe)
    code, _, err = run_cli(capsys, "merge", tmp_path / "one" / "recipe.yaml", "-o", tmp_path / "two")
    assert code == 0, err
    one, two = bytes_of(tmp_path / "one"), bytes_of(tmp_path / "two")
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} <= {"README.md", "merge_report.json"}
    assert tensors_of(tmp_path / "one") == tensors_of(tmp_path / "two")


def test_the_card_can_be_followed(tmp_path, capsys, monkeypatch):
    """Its command, run where the merge was run, by inputs that are named from there."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    save_toy_adapter(tmp_path / "work" / "sql", 1)
    merge_engine.merge(["sql"], tmp_path / "one", method="linear")
    card = (tmp_path / "one" / "README.md").read_text()
    (command,) = re.findall(r"`merge-engine (merge FOLDER.* -o OUT)` repeats the merge; ", card)
    assert run_cli(capsys, *command.replace("FOLDER", "../one").replace("OUT", "../two").split())[0] == 0
    assert tensors_of(tmp_path / "one") == tensors_of(tmp_path / "two")


def test_models_and_adapters_repeat_too(tmp_path, capsys):
    base, tuned = save_base(tmp_path / "base"), save_base(tmp_path / "tuned", seed=1)
    merge_engine.merge_models(base, [tuned, save_toy_adapter(tmp_path / "sql", 1)], tmp_path / "one", density=0.5)
    assert run_cli(capsys, "merge", tmp_path / "one" / "recipe.yaml", "-o", tmp_path / "two")[0] == 0
    assert tensors_of(tmp_path / "one") == tensors_of(tmp_path / "two")


def test_the_adapters_card_runs(llamas, tmp_path, monkeypatch):
    """Its code gives a PEFT model with the deltas of the merge."""
    base, adapters = llamas
    merge_engine.merge(adapters, tmp_path / "out", method="linear")
    front, blocks = card_of(tmp_path / "out")
    assert front == {"library_name": "peft", "tags": ["lora", "merge", "merge-engine"]}
    names: dict = {}
    monkeypatch.chdir(tmp_path / "out")
    exec(blocks["python"], names)
    got, want = peft_deltas(names["model"], "default"), peft_deltas(in_peft([tmp_path / "out"]), "0")
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    serve = f"vllm serve {base} --enable-lora --max-lora-rank 16 --lora-modules merged=.\n"
    assert blocks["bash"] == serve


def test_a_classifiers_card_runs(tmp_path, monkeypatch):
    """The head has as many rows as there are labels, and the base is loaded with that many."""
    config = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "pad_token_id": 0}
    shape = LlamaConfig(**config, num_attention_heads=4, num_labels=5)
    base = LlamaForSequenceClassification(shape)
    base.model.save_pretrained(tmp_path / "base")
    for name in ("sql", "chat"):
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
        model = get_peft_model(copy.deepcopy(base), lora)
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / name)
    merge_engine.merge([tmp_path / "sql", tmp_path / "chat"], tmp_path / "out", method="linear")
    names: dict = {}
    monkeypatch.chdir(tmp_path / "out")
    code = card_of(tmp_path / "out")[1]
    assert "num_labels=5" in code["python"] and "bash" not in code
    exec(code["python"], names)
    head = names["model"].base_model.model.score.modules_to_save["default"].weight
    assert torch.equal(head, base.score.weight)


def test_the_models_card_runs(llamas, tmp_path, monkeypatch):
    base, adapters = llamas
    merge_engine.merge_into(base, adapters, tmp_path / "out", method="linear")
    _, blocks = card_of(tmp_path / "out")
    names: dict = {}
    monkeypatch.chdir(tmp_path / "out")
    exec(blocks["python"], names)
    assert type(names["model"]).__name__ == "LlamaForCausalLM" and "tokenizer" not in names
    loaded, written = names["model"].state_dict(), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(loaded[key], written[key]) for key in written)


def test_what_comes_from_the_hub_is_named(tmp_path, repositories, monkeypatch):
    """The base, and the inputs that are of the hub; the licence if all have it."""
    monkeypatch.chdir(tmp_path)
    for name in ("sql", "chat"):
        folder = save_toy_adapter(tmp_path / name, len(name), base_model_name_or_path="org/base")
        (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    base = save_base(tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    repositories |= {"user/sql": tmp_path / "sql", "org/base": base}
    merge_engine.merge(["user/sql", "chat"], "out")
    merge_engine.merge_into("org/base", ["user/sql", "chat"], "model")
    told = {"base_model": ["org/base", "user/sql"], "license": "mit"}
    adapter = {"base_model_relation": "adapter", "library_name": "peft", "tags": ["lora", "merge", "merge-engine"]}
    assert card_of(tmp_path / "out")[0] == told | adapter
    model = {"base_model_relation": "merge", "library_name": "transformers", "tags": ["merge", "merge-engine"]}
    assert card_of(tmp_path / "model")[0] == told | model
    (tmp_path / "chat" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    merge_engine.merge(["user/sql", "chat"], "out", overwrite=True)
    assert "license" not in card_of(tmp_path / "out")[0]
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["density"] == 0.2


def test_a_result_is_pushed_with_a_card_of_its_new_place(llamas, tmp_path, capsys, pretended_hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["merge", *llamas[1], "-o", "out", "--method", "linear"]
    code, out, err = run_cli(capsys, *arguments, "--push", "user/merged")
    assert (code, err) == (0, "") and out.endswith("\nout: pushed to https://huggingface.co/user/merged\n")
    (commit,) = pretended_hub.commits
    on_disk = bytes_of(tmp_path / "out")
    assert commit.repo == "user/merged" and commit.files.keys() == on_disk.keys()
    told = {"README.md", "adapter_config.json", "merge_report.json", "recipe.yaml"}
    assert {name for name in on_disk if commit.files[name] != on_disk[name]} == told
    root = str(llamas[0].parent).encode()
    assert all(root in on_disk[name] for name in told) and not any(root in sent for sent in commit.files.values())
    card = commit.files["README.md"].decode()
    assert 'PeftModel.from_pretrained(model, "user/merged")' in card and "--lora-modules merged=user/merged" in card
    assert 'from_pretrained("base")' in card and "| sql | 1.0 |" in card
    sent = {name: commit.files[name].decode() for name in told}
    assert yaml.safe_load(sent["recipe.yaml"])["adapters"] == ["sql", "chat", "ads"]
    config, local = json.loads(sent["adapter_config.json"]), json.loads(on_disk["adapter_config.json"])
    assert config == local | {"base_model_name_or_path": "base"}
    code, out, err = run_cli(capsys, "merge", *llamas[1], "-o", "model", "--into", llamas[0], "--push", "user/model")
    assert (code, err) == (0, "") and out.endswith("model: pushed to https://huggingface.co/user/model\n")
    files = pretended_hub.commits[1].files
    assert 'from_pretrained("user/model")' in files["README.md"].decode()
    assert not any(root in files[name] for name in files) and yaml.safe_load(files["recipe.yaml"])["into"] == "base"


def test_a_push_that_cannot_be_is_refused_before_the_merge(llamas, tmp_path, capsys, pretended_hub):
    start = ["merge", *llamas[1], "-o", tmp_path / "out", "--method", "linear"]
    code, _, err = run_cli(capsys, *start, "--push", "merged")
    assert code == 2 and "push: wanted a hub id user/repo, got 'merged'" in err
    code, _, err = run_cli(capsys, *start, "--push", "user/merged", "--sweep", "scale=1,2")
    assert code == 2 and "sweep: makes several adapters; wanted no --push with it" in err
    code, _, err = run_cli(capsys, *start, "--push", "user/merged", "--into", llamas[0], "--dry-run")
    assert code == 2 and "push: sends what was written; wanted no --dry-run with it" in err
    pretended_hub.refuses = "who are you?"
    code, _, err = run_cli(capsys, *start, "--push", "user/merged")
    assert code == 2 and "push: the hub does not say who asks: who are you?" in err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError, match="wanted a merge that was written to a folder"):
        merge_engine.merge(llamas[1], method="linear").push_to_hub("user/merged")


@pytest.mark.parametrize("kind", ["kohya", "diffusers", "mlx"])
def test_other_families_repeat_and_say_how_they_are_loaded(tmp_path, capsys, kind):
    inputs = [tmp_path / name if kind == "mlx" else tmp_path / f"{name}.safetensors" for name in ("sql", "chat")]
    for seed, path in enumerate(inputs):
        save_mlx(path, 3 + seed, 2.0, seed=seed) if kind == "mlx" else save_image(path, kind, 3 + seed, seed=seed)
    merge_engine.merge(inputs, tmp_path / "out", weights=[1, 0.5])
    code, _, err = run_cli(capsys, "merge", tmp_path / "out" / "recipe.yaml", "-o", tmp_path / "again")
    assert code == 0, err
    one, two = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("out", "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    front, blocks = card_of(tmp_path / "out")
    image = ("diffusers", 'load_lora_weights(".", weight_name="out.safetensors")')
    library, line = ("mlx", 'adapter_path="."') if kind == "mlx" else image
    assert front["library_name"] == library and line in blocks["python"]
    code, _, err = run_cli(capsys, "normalize", inputs[0], "-o", tmp_path / "normal")
    assert code == 2 and "wanted PEFT's folder: servers load no other" in err and not (tmp_path / "normal").exists()
