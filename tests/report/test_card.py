"""Model cards: what the hub reads of them, and Markdown that holds any text."""

import json

import yaml

from merge_engine.report.card import Card, code, front_matter, moved, recipe_file, recipe_text, tokens_text


def test_front_matter_of_a_hub_and_of_none():
    one = front_matter(["org/base"], "adapter", "peft", ["lora"], {"license": "mit"})
    assert one == {"base_model": "org/base", "base_model_relation": "adapter"} | {
        "library_name": "peft",
        "license": "mit",
        "tags": ["lora"],
    }
    several = front_matter(["org/base", "user/a", "org/base"], "merge", "transformers", [], {})
    assert several["base_model"] == ["org/base", "user/a"] and several["base_model_relation"] == "merge"
    assert front_matter([], "merge", "peft", ["x"], {}) == {"library_name": "peft", "tags": ["x"]}


def test_a_card_is_what_the_hubs_own_reader_reads():
    from huggingface_hub import ModelCard

    front = front_matter(["org/base", "user/a"], "adapter", "peft", ["lora"], {"license": "other", "license_name": "x"})
    use = code("python", "print(1)")
    text = Card("T", "From:", "adapter", [("a|b", 0.5)], {"method": "ties"}, front, use, ["more", ""]).text()
    read = ModelCard(text, ignore_metadata_errors=False).data.to_dict()
    assert read == front
    assert "| a\\|b | 0.5 |" in text and text.index("more") < text.index("## Use")
    assert text.endswith("`.`:\n\n```python\nprint(1)\n```")


def test_the_section_on_use_moves_with_the_output():
    lines = ['load(".")', "serve --lora-modules out=.", 'load("./outer")']
    card = Card("T", '"."', "adapter", [(".", 1.0)], {"a": "."}, {}, code("python", *lines)).text()
    there = moved(card, "user/repo")
    use = there.split("## Use\n")[1]
    assert 'load("user/repo")' in use and "out=user/repo\n" in use and 'load("./outer")' in use
    assert "In this folder" in card and "In this folder" not in there
    assert there.split("## Use\n")[0] == card.split("## Use\n")[0]


def test_a_recipe_file_is_yaml_whatever_the_names():
    inputs, recipe = ["a: b", "user/x", "é\udcff"], {"density": {".*q": 0.1}, "module_weights": {"m": [1.0, 2.0]}}
    read = yaml.safe_load(recipe_file(inputs, recipe, into="org/base"))
    assert read == {"adapters": inputs, "into": "org/base", **recipe}
    assert yaml.safe_load(recipe_text(recipe))["module_weights"] == "of 1 module, listed in recipe.yaml"
    assert "module" not in recipe_text({"module_weights": None, "method": "ties"})


def test_tokens_in_a_table():
    lines = tokens_text({f"t{i}": i for i in range(66)})
    assert lines[4] == '| `"t0"` | 0 |' and lines[-2] == "and 2 more, listed in `merge_report.json`."
    (row,) = tokens_text({"a|`\n": 3})[4:-1]
    assert row == '| `"a\\u007c\\u0060\\n"` | 3 |' and json.loads(row.split("`")[1]) == "a|`\n"
