"""Model cards, the README.md of a merged adapter and of a merged model, and the recipe.yaml that repeats the merge."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from merge_engine.errors import some

RECIPE_FILE = "recipe.yaml"
_SHOWN = 64  # added tokens that a model card lists
_USE = "\n## Use\n"
HERE = "."  # the output's folder, in the lines that load it, whatever it is called
_IN_HERE = "In this folder, or with its path in place of `.`:"


@dataclass(frozen=True)
class Card:
    """What a model card says.

    front: the front matter, for the hub: see `front_matter`. inputs: what each input is called, and its weight.
    recipe: {field: value}, resolved. more: lines after the recipe. use: lines on how to load the output.
    """

    title: str
    lead: str
    what: str  # the inputs are: "adapter"
    inputs: Sequence[tuple[str, float]]
    recipe: Mapping[str, Any]
    front: Mapping[str, Any]
    use: Sequence[str]
    more: Sequence[str] = field(default_factory=list)

    def text(self) -> str:
        """The card, in Markdown."""
        import yaml

        rows = [f"| {_cell(source)} | {weight} |" for source, weight in self.inputs]
        header = ["---", yaml.safe_dump(dict(self.front), sort_keys=False).strip(), "---", "", f"# {self.title}", ""]
        table = [self.lead, "", f"| {self.what} | weight |", "| --- | --- |", *rows, ""]
        recipe = ["## Recipe", "", "```yaml", recipe_text(self.recipe), "```", ""]
        return "\n".join([*header, *table, *recipe, *repeat(RECIPE_FILE), *self.more, *use_section(self.use)])


def repeat(recipe: str) -> list[str]:
    """The lines on how to repeat the merge. recipe: the file beside the card, with options if there are any."""
    return [
        f"`merge-engine merge FOLDER/{recipe} -o OUT` repeats the merge; `FOLDER` is the path of this folder. Run it "
        "in the folder where the merge was run: relative paths of inputs begin there.",
        "",
    ]


def use_section(use: Sequence[str]) -> list[str]:
    """The lines of the section on use, which `moved` knows."""
    return [_USE.strip("\n"), "", _IN_HERE, "", *use]


def front_matter(
    hub_ids: Sequence[str], relation: str, library: str, tags: Sequence[str], licence: Mapping[str, Any]
) -> dict[str, Any]:
    """The front matter of a card.

    hub_ids: those of the base and of the inputs; of a local path the hub knows nothing. relation: what the output is to
    them: "adapter" or "merge", as the hub names it. licence: its fields, if all inputs agree.
    """
    found = list(dict.fromkeys(hub_ids))
    front: dict[str, Any] = {}
    if found:
        front = {"base_model": found[0] if len(found) == 1 else found, "base_model_relation": relation}
    return {**front, "library_name": library, **licence, "tags": list(tags)}


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """A recipe as YAML for a model card: of a table {module: value} only the length, and nothing of an empty one."""
    import yaml

    shown = {}
    for key, value in recipe.items():
        if not key.startswith("module_"):
            shown[key] = value
        elif value:
            shown[key] = f"of {some(len(value), 'module')}, listed in {RECIPE_FILE}"
    return yaml.safe_dump(shown, sort_keys=False).strip()


def recipe_file(inputs: Sequence[str], recipe: Mapping[str, Any], into: str | None = None) -> str:
    """The text of recipe.yaml: what `merge-engine merge FOLDER/recipe.yaml -o OUT` repeats the merge by.

    inputs: as they were given. into: the base of a merge into one.
    """
    import yaml

    values = {"adapters": list(inputs), **({} if into is None else {"into": into}), **recipe}
    return (
        f"# merge-engine merge FOLDER/{RECIPE_FILE} -o OUT, with the path of this file's folder\n"
        "# Folders are as they were given: relative ones to where the merge was run.\n"
        + yaml.safe_dump(values, sort_keys=False)
    )


def code(language: str, *lines: str) -> list[str]:
    """A block of code."""
    return [f"```{language}", *lines, "```"]


def moved(text: str, repo: str) -> str:
    """The text of a card for an output on the hub: its section on use loads it from there."""
    before, use, after = text.partition(_USE)
    after = after.replace(f"{_IN_HERE}\n\n", "")
    for start, end in (('"', '"'), ("=", "\n")):
        after = after.replace(f"{start}{HERE}{end}", f"{start}{repo}{end}")
    return before + use + after


def tokens_text(tokens: Mapping[str, int]) -> list[str]:
    """The table of the tokens that the base lacks; tokens are JSON strings, escaped for a Markdown table."""
    rows = []
    for token, index in islice(tokens.items(), _SHOWN):
        text = json.dumps(token, ensure_ascii=False).replace("`", "\\u0060").replace("|", "\\u007c")
        rows.append(f"| `{text}` | {index} |")
    rest = len(tokens) - len(rows)
    more = [f"and {rest} more, listed in `merge_report.json`.", ""] if rest else []
    return ["## Added tokens", "", "| token | index |", "| --- | --- |", *rows, "", *more]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
