"""Options that several commands share, and recipe files, whose keys are the names of the options."""

import argparse
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from merge_engine.cli.parser import split_list
from merge_engine.errors import RecipeError
from merge_engine.rules.choices import CHOICES
from merge_engine.rules.guesses import word
from merge_engine.rules.methods import METHODS

# Types of the keys of a recipe file that are not fields of `Recipe`.
_KINDS = {
    **dict.fromkeys(["output", "push", "into", "evaluate", "pattern", "results", "backend", "vocab"], str),
    **dict.fromkeys(["overwrite", "dry_run", "json"], bool),
}

_OPTIONS = {"block_weights": "weights"}  # of fields that have another name on the command line
_OURS = ("run", "parser")  # what a command adds to its options
_OF_OVERWRITE = ("; pass overwrite to replace it", ", so overwrite does not replace it")  # of Python's messages


def methods_text(kinds: Collection[str]) -> str:
    """The methods of some kinds, a line each, for the end of a help text."""
    rows = {name: row for name, row in METHODS.items() if row.kind in kinds}
    width = max(map(len, rows))
    return "\n".join(["", "methods:", *(f"  {name:{width}}  {row.summary}" for name, row in rows.items()), ""])


def merge_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-o", "--output", type=Path, help="folder to write, or .safetensors file where the inputs are such files")
    add("--push", metavar="REPO", help="send the result to the hub, as user/repo; the repository is made if missing")
    add("--overwrite", action="store_true", default=None, help="replace an existing output")
    add(
        "--method",
        type=partial(word, "method"),
        choices=CHOICES["method"],
        metavar="METHOD",
        help="one of those listed below; default: ties",
    )
    add(
        "--weights",
        type=split_list,
        metavar="W...",
        help="one number for each input, and NAME:PATTERN=NUMBER for modules of one of them; default: 1 each",
    )
    add(
        "--density",
        type=split_list,
        metavar="D...",
        help="share of elements that a trim or a drop keeps: one number, one for each input, or PATTERN=NUMBER by "
        "module; default: 0.2",
    )
    add(
        "--scale",
        type=parse_scale,
        metavar="LAMBDA",
        help="multiplies the result: a number, or auto (each merged layer as large as the adapters' are on average); "
        "default: 1",
    )
    add(
        "--gain",
        type=split_list,
        metavar="G...",
        help="multiplies --scale auto: one number, or PATTERN=NUMBER by module; default: 1",
    )
    add("--gamma", type=float, help="breadcrumbs: drop this share of the elements, the largest ones; default: 0.01")
    add(
        "--mask",
        type=float,
        help="consensus: an input counts where it exceeds this share of the sum of the others; default: 0.4",
    )
    add("--min-tasks", type=int, metavar="K", help="consensus: an element is kept if so many inputs count; default: 2")
    add("--ridge", type=float, help="actmat: added to the covariances; default: 1")
    add("--balance", choices=CHOICES["balance"], help="damp directions that many adapters share, before the merge")
    add("--election", choices=CHOICES["election"], help="how signs are elected; default: total")
    add(
        "--scope",
        choices=CHOICES["scope"],
        help="one trim threshold for each tensor, or one for the model; default: the convention's",
    )
    add(
        "--trim-ties",
        choices=CHOICES["trim_ties"],
        help="of equal magnitudes at the threshold keep exactly as many as wanted, or all; default: the convention's",
    )
    add("--convention", choices=CHOICES["convention"], help="whose arithmetic to follow; default: peft")
    add("--seed", type=int, help="seed of the random drops; default: 0")
    add("--backend", choices=CHOICES["backend"], help="triton (GPU), torch (CPU) or auto; default: auto")
    add(
        "--dtype",
        type=partial(word, "dtype"),
        choices=CHOICES["dtype"],
        help="dtype of the output; default: that of the inputs, or of the base",
    )
    add(
        "--saved",
        choices=CHOICES["saved"],
        help="layers that adapters save whole and that differ: their average, or the first one; default: refuse them",
    )
    add(
        "--vocab",
        choices=("base", "union"),
        help="full models: tokens of the base, or of all inputs; default: base",
    )
    add("--shard-size", metavar="SIZE", help="full models: largest weight file, as 2GB; default: 5GB")
    add(
        "--json",
        action="store_true",
        default=None,
        help="print one JSON object: output, seconds, warnings and others",
    )
    add("--dry-run", action="store_true", default=None, help="full models: show sizes and time, write nothing")


def sweep_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("several merges, each in its own folder below the output").add_argument
    add(
        "--sweep",
        type=split_list,
        metavar="FIELD=V,V...",
        help="merge every combination of values, as density=0.1,0.2 scale=0.5,1; lists as weights=2:1:1,1:1:1",
    )
    evaluation_options(add)
    add("--memory", metavar="SIZE", help="limit for all merges together; default: 4GB")


def evaluation_options(add: Any) -> None:
    """How results are scored."""
    add(
        "--evaluate",
        metavar="COMMAND",
        help="score each result: run this command, with its folder for {path}. It prints JSON on its last line, or "
        "`name: X` lines, or a number, or lm-eval's table",
    )
    add("--metric", nargs="+", metavar="NAME", help="metrics that count, as arc/acc or '*/acc' or code/pass=2 (weight)")
    add("--combine", choices=("mean", "worst"), help="of several metrics: their weighted mean, or the worst")
    add("--maximize", dest="best", action="store_const", const="highest", help="the highest score is best (default)")
    add("--minimize", dest="best", action="store_const", const="lowest", help="the lowest score is best")
    add("--best", choices=("highest", "lowest"), help="the same as --maximize or --minimize")
    add("--pattern", metavar="REGEX", help="read what is printed by named groups, as 'acc=(?P<acc>[0-9.]+)'")
    add("--results", metavar="PATH", help="read a JSON file, or lm-eval's results*.json in a folder, with {path} in it")
    add("--timeout", type=float, metavar="SECONDS", help="limit of one evaluation; default: none")


OF_EVALUATION = ("metric", "combine", "best", "pattern", "results", "timeout")


def take_evaluation(given: dict[str, Any]) -> Any:
    """The evaluation that options or a recipe file ask for, taken out of them; None without one."""
    from merge_engine.sweeps.score import evaluation_of

    text = given.pop("evaluate", None)
    if text is None:
        refuse(given, OF_EVALUATION, "an evaluation", "--evaluate")
        return None
    return evaluation_of(text, **{key: given.pop(key) for key in OF_EVALUATION if key in given})


def refuse(given: dict[str, Any], keys: Sequence[str], subject: str, option: str) -> None:
    """Raise RecipeError for keys that only apply to a subject, which another option asks for."""
    for key in keys:
        if key in given:
            raise RecipeError(f"{key}: only applies to {subject}; wanted {option} with it")


def add_command(commands: Any, name: str, run: Any, examples: str, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def given_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options that were given on the command line, by the names of a recipe."""
    given = {key: value for key, value in vars(options).items() if value is not None and key not in _OURS}
    if "weights" in given:
        given |= weights(given.pop("weights"))
    for field in ("density", "gain"):
        if field in given:
            given[field] = by_module(field, given[field])
    if "sweep" in given:
        from merge_engine.sweeps.trials import parse_axes

        given["sweep"] = parse_axes(given["sweep"])
    return given


def take_push(given: dict[str, Any]) -> str | None:
    """The repository to send the result to, once the hub has said that it knows who asks; None: it is not sent."""
    repo: str | None = given.pop("push", None)
    if repo is not None:
        if given.get("dry_run"):
            raise RecipeError("push: sends what was written; wanted no --dry-run with it")
        from merge_engine.files.hub import check_push

        check_push(repo)
    return repo


def overwrite_as_flag(message: str) -> str:
    """A message of Python's with --overwrite, as it is typed, in place of overwrite."""
    for phrase in _OF_OVERWRITE:
        message = message.replace(phrase, phrase.replace("overwrite", "--overwrite"))
    return message


def as_flag(message: str, options: argparse.Namespace) -> str:
    """A message of Python's with options as they are typed: overwrite, and a given one that the message begins with."""
    if hasattr(options, "overwrite"):
        message = overwrite_as_flag(message)
    field, colon, rest = message.partition(":")
    name = _OPTIONS.get(field, field)
    given = vars(options).get(name) is not None and name not in (*_OURS, "adapters", "models", "recipe")
    return f"--{name.replace('_', '-')}:{rest}" if colon and given else message


def take_output(given: dict[str, Any]) -> Any:
    output = given.pop("output", None)
    if output is None:
        raise RecipeError("output: wanted a folder to write to (-o OUT), got none")
    return output


def recipe_file(given: dict[str, Any]) -> dict[str, Any]:
    """The keys of the recipe file, if one was given in place of adapters, else none.

    Takes `adapters` out of `given`, unless the file is mergekit's: those have a merge_method.
    """
    first = Path(given["adapters"][0])
    if first.suffix not in (".yaml", ".yml"):
        return {}
    if len(given["adapters"]) > 1:
        raise RecipeError(f"adapters: wanted one recipe file or adapters, got {first} and more")
    from merge_engine.files.text import read_documents

    documents = read_documents(first)
    for document in documents:
        if isinstance(document, dict) and "merge_method" in document:
            return document
    if len(documents) > 1:
        raise RecipeError(f"{first}: wanted one document, got {len(documents)}")
    recipe: Any = documents[0] if documents else None
    adapters = recipe.get("adapters") if isinstance(recipe, dict) else None
    if not adapters or not isinstance(adapters, list | dict):
        raise RecipeError(f"{first}: wanted a table of keys with a list of adapters")
    named = adapters.values() if isinstance(adapters, dict) and "merges" in recipe else None
    for each in adapters if named is None else named:  # a mapping without merges is of adapters to weights
        if not isinstance(each, str):
            raise RecipeError(f"{first}: adapters: wanted folders or hub ids, got {each!r}")
    for key in recipe:
        if not isinstance(key, str):
            raise RecipeError(f"{first}: wanted keys that are text, got {key!r}")
    for key, kind in _KINDS.items():
        if not isinstance(recipe.get(key, kind()), kind):
            wanted = "true or false" if kind is bool else "text"
            raise RecipeError(f"{first}: {key}: wanted {wanted}, got {recipe[key]!r}")
    del given["adapters"]
    return recipe


def weights(texts: Sequence[str]) -> dict[str, Any]:
    """2 1 -> {"weights": [2, 1]}; a:down_blocks.*=0.5 -> {"block_weights": {"a": {"down_blocks.*": 0.5}}}; or both."""
    numbers: list[float] = []
    blocks: dict[str, dict[str, float]] = {}
    for text in texts:
        target, equals, number = text.rpartition("=")
        adapter, colon, pattern = target.partition(":")
        try:
            value = float(number)
        except ValueError:
            raise RecipeError(f"weights: wanted numbers and NAME:PATTERN=NUMBER, got {text}") from None
        if not equals:
            numbers.append(value)
        elif not (colon and adapter and pattern):
            raise RecipeError(f"weights: wanted numbers and NAME:PATTERN=NUMBER, got {text}")
        elif pattern in blocks.setdefault(adapter, {}):
            raise RecipeError(f"weights: wanted one number for {target}, got {blocks[adapter][pattern]} and {value}")
        else:
            blocks[adapter][pattern] = value
    return ({"weights": numbers} if numbers else {}) | ({"block_weights": blocks} if blocks else {})


def by_module(field: str, texts: Sequence[str]) -> Any:
    """0.2 -> 0.2; 0.2 0.3 -> [0.2, 0.3]; .*q_proj=0.3 .*=0.2 -> {".*q_proj": 0.3, ".*": 0.2}."""
    pairs = [text.rpartition("=") for text in texts]
    try:
        numbers = [float(number) for _, _, number in pairs]
    except ValueError:
        raise RecipeError(f"{field}: wanted numbers or PATTERN=NUMBER, got {' '.join(texts)}") from None
    if all(equals for _, equals, _ in pairs):
        return {pattern: number for (pattern, _, _), number in zip(pairs, numbers, strict=True)}
    if any(equals for _, equals, _ in pairs):
        raise RecipeError(f"{field}: wanted numbers or PATTERN=NUMBER, not both, got {' '.join(texts)}")
    return numbers[0] if len(numbers) == 1 else numbers


def parse_scale(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted auto or a number, got {text!r}") from None


def parse_rank(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"wanted auto or a whole number, got {text!r}")
    return text if text == "auto" else int(text)
