"""Chat templates of mergekit's recipes: "auto", a name, or the template itself."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merge_engine.errors import ModelError, RecipeError
from merge_engine.files.text import read_object
from merge_engine.formats.checkpoint import Checkpoint

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% set told = namespace(system='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set told.system = message['content'] + '\\n\\n' %}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' + told.system + message['content'] + ' [/INST]' }}"
    "{% set told.system = '' %}{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
_ALPACA = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] | trim + '\\n\\n' }}"
    "{% else %}{{ '### Response:\\n' + message['content'] | trim + eos_token + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
_EXAONE = (
    "{% for message in messages %}{{ '[|' + message['role'] + '|]' + message['content'] }}"
    "{% if message['role'] == 'user' %}{{ '\\n' }}{% else %}{{ '[|endofturn|]\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
)
NAMED = {"alpaca": _ALPACA, "chatml": _CHATML, "exaone": _EXAONE, "llama3": _LLAMA3, "mistral": _MISTRAL}


def chat_template(file: str, asked: str, models: Sequence[Checkpoint]) -> str | None:
    """The template that a recipe asks for: the most frequent one of the models, one by name, or the text itself.

    None where it is "auto" and no model has one. Raises RecipeError for a name that is not known.
    """
    if asked == "auto":
        found = [template.strip() for model in models if (template := _template_of(model.path))]
        return Counter(found).most_common(1)[0][0] if found else None
    if asked in NAMED:
        return NAMED[asked]
    if "{" not in asked or len(asked) < 20:
        raise RecipeError(
            f"{file}: chat_template: wanted auto, one of {', '.join(NAMED)}, or a template, got {asked!r}"
        )
    return asked


def _template_of(folder: Path) -> str | None:
    """A model's default chat template."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        try:
            return own.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder.name}: {own.name} cannot be read: {error}") from error
    file = folder / "tokenizer_config.json"
    found: Any = read_object(file, folder.name, ModelError).get("chat_template") if file.is_file() else None
    if isinstance(found, list):
        named = [each for each in found if isinstance(each, dict) and each.get("name") == "default"]
        found = named[0].get("template") if named else None
    return found if isinstance(found, str) else None
