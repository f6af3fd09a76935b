"""LoRA on the models of a recipe is applied on the fly: nothing but the output is written, not even for a while."""

import json
from pathlib import Path

import pytest
import torch
from lora_files import save_factors
from safetensors.torch import save_file

LAYERS, WIDTH, RANK = 2, 96, 2
ADAPTED = [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in ("self_attn.q_proj", "mlp.down_proj")]
SHAPES = {
    "model.embed_tokens": (7, WIDTH),
    **dict.fromkeys(ADAPTED, (WIDTH, WIDTH)),
    "model.norm": (WIDTH,),
    "lm_head": (7, WIDTH),
}
TWO = ("base+lora1", "tuned+lora2")


def weighed(*names):
    return [{"model": name, "parameters": {"weight": 0.5, "density": 0.5}} for name in names]


RECIPES = {
    "slerp": {
        "merge_method": "slerp",
        "base_model": TWO[0],
        "models": [{"model": name} for name in TWO],
        "parameters": {"t": 0.25},
    },
    "ties": {"merge_method": "ties", "base_model": "base", "models": weighed(*TWO)},
    "ties, as a merge into the base": {
        "merge_method": "ties",
        "base_model": "base",
        "models": weighed("base+lora1", "base+lora2"),
    },
    "passthrough": {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": name, "layer_range": [0, LAYERS]}]} for name in TWO],
    },
}
# wchar counts what any thread passes to a call that writes, from Python or not, and whether or not the file stays.
COUNTED = """
import os, sys
from merge_engine.into import place
from merge_engine.mergekit.recipe import merge_recipe

def written():
    with open("/proc/self/io") as file:
        return int(dict(line.split(": ") for line in file)["wchar"])

sys.dont_write_bytecode = True
place.remove_journal = lambda folder: None
os.chdir({folder!r})
merge_recipe({{"merge_method": "passthrough", "models": [{{"model": "tuned"}}]}}, {before!r}, progress=False)
start = written()
merge_recipe({recipe!r}, {output!r}, progress=False)
print(written() - start)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """base and tuned; adapters lora1 and lora2 that fit both."""
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    for name in ("base", "tuned"):
        (folder / name).mkdir()
        save_file({f"{key}.weight": draw(*SHAPES[key]) for key in SHAPES}, folder / name / "model.safetensors")
        config = {"vocab_size": 7, "tie_word_embeddings": False, "num_hidden_layers": LAYERS, "dtype": "float32"}
        (folder / name / "config.json").write_text(json.dumps(config))
    for name in ("lora1", "lora2"):
        save_factors(folder / name, {key: (draw(RANK, WIDTH), draw(WIDTH, RANK)) for key in ADAPTED})
    return folder


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count written bytes")
@pytest.mark.parametrize("name", RECIPES)
def test_no_byte_is_written_beyond_the_output(forks, models, tmp_path, name):
    """Shards, card, configuration and report are in the output, and here the journal stays in it, to be counted, too.

    What a first merge loads, of a model without LoRA, is not counted.
    """
    output = tmp_path / "out"
    places = {"folder": str(models), "before": str(tmp_path / "before"), "output": str(output)}
    done = forks.run(first=COUNTED.format(recipe=RECIPES[name], **places))
    assert done.codes == [0], done.err
    sizes = {file.name: file.stat().st_size for file in output.iterdir()}
    assert int(done.out) == sum(sizes.values())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["before", "out"]
    tensors = len(SHAPES) + (len(ADAPTED) if name == "passthrough" else 0)
    assert len((output / ".journal.0").read_text().splitlines()) == 1 + tensors
    assert sizes["model.safetensors"] > 0.9 * sum(sizes.values())
