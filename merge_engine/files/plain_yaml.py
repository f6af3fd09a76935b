"""A loader of YAML that a stranger may have written: plain data, in linear time, with limits on what it may hold.

Only null, true and false, numbers, text, lists and tables are read; a date is text, and another tag is an error.
Aliases and ``<<`` are read, within the limit of `VALUES` on the values that they stand for.
"""

from collections import Counter
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

BYTES, DEPTH, DIGITS = 8 << 20, 64, 300
VALUES = 200_000  # with every alias counted as what it stands for
_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")


class TooMuchError(yaml.YAMLError):
    """A document beyond a limit, or with a key twice."""


class PlainLoader(yaml.SafeLoader):
    """Raises yaml.YAMLError for all that it does not read."""

    def compose_document(self) -> Node | None:
        """One document. Its size is counted before anything is made of it."""
        node: Node | None = super().compose_document()
        if node is not None:
            _count(node, {}, DEPTH)
        return node

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        """The value of a node."""
        try:
            if isinstance(node, ScalarNode):
                _check_scalar(node)
            return super().construct_object(node, deep)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            raise TooMuchError(f"{_place(node)}: {str(node.value)[:40]!r} is not of the type {kind}") from error

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A table, each of whose keys comes once."""
        pairs = node.value if isinstance(node, MappingNode) else []  # ``!!map 5`` comes here too
        times = Counter((key.tag, key.value) for key, _ in pairs if isinstance(key, ScalarNode))
        for (_, key), count in times.items():
            if count > 1 and key != "<<":
                raise TooMuchError(f"wanted {key} once in a table, got it {count} times")
        return dict(super().construct_mapping(node, deep))


PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
PlainLoader.yaml_constructors = {
    tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag.split(":")[-1] in _TAGS
}


def load_documents(text: str) -> list[Any]:
    """What a text holds, one value a document. Raises yaml.YAMLError."""
    if len(text) > BYTES:
        raise TooMuchError(f"wanted at most {BYTES} letters, got {len(text)}")
    try:
        return list(yaml.load_all(text, PlainLoader))
    except RecursionError as error:
        raise TooMuchError(f"wanted tables and lists at most {DEPTH} deep") from error


def _count(node: Node, known: dict[Node, int], depth: int) -> int:
    """How many values a node stands for. known: those of nodes that were counted; 0 for one that is being counted."""
    if node in known:
        if not known[node]:
            raise TooMuchError(f"{_place(node)}: a list or table holds itself")
        return known[node]
    if not depth:
        raise TooMuchError(f"{_place(node)}: wanted tables and lists at most {DEPTH} deep")
    known[node] = 0
    inside: list[Node] = []
    if isinstance(node, SequenceNode):
        inside = node.value
    elif isinstance(node, MappingNode):
        inside = [each for pair in node.value for each in pair]
    total = 1
    for each in inside:
        total += _count(each, known, depth - 1)
        if total > VALUES:
            raise TooMuchError(f"{_place(node)}: wanted at most {VALUES} values, with aliases counted as what they are")
    known[node] = total
    return total


def _check_scalar(node: ScalarNode) -> None:
    if "\0" in node.value:
        raise TooMuchError(f"{_place(node)}: {node.value[:40]!r} has a NUL in it")
    if node.tag.endswith(":int") and len(node.value) > DIGITS:
        raise TooMuchError(f"{_place(node)}: wanted a number of at most {DIGITS} digits, got {len(node.value)}")


def _place(node: Node) -> str:
    return f"line {node.start_mark.line + 1}"
