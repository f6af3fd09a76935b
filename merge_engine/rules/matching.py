"""Regular expressions from files, matched in bounded time: Python's syntax and meaning, without backtracking.

Python's engine tries one way after the other, and ``(.*)*z`` has exponentially many. Here all ways are followed at
once: the set of positions that a part of the pattern can end at, as the bits of one integer, goes through the parsed
pattern. Letters and boundaries are found by Python's engine, which needs linear time for them.

Back-references, conditions, atomic groups and possessive repetitions cannot be matched so, and are refused.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from merge_engine.errors import MergeError

try:
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as parser

LONGEST, DEPTH, NAME = 100_000, 50, 10_000  # of a pattern; of groups in groups; of a name
STEPS, MORE_STEPS = 200_000, 4_000  # of one pattern in all, and for each name beyond that; a step takes about 1 us
_UNUSABLE = (re.error, OverflowError, RecursionError)  # what the parser raises: repetitions too large, groups too deep
_CATEGORIES = {"DIGIT": "d", "NOT_DIGIT": "D", "SPACE": "s", "NOT_SPACE": "S", "WORD": "w", "NOT_WORD": "W"}
_PLACES = {"AT_BEGINNING": "^", "AT_BEGINNING_STRING": r"\A", "AT_END": "$", "AT_END_STRING": r"\Z"}
_PLACES |= {"AT_BOUNDARY": r"\b", "AT_NON_BOUNDARY": r"\B"}
_REFUSED = {"GROUPREF": "a back-reference", "GROUPREF_EXISTS": "a condition", "ATOMIC_GROUP": "an atomic group"}
_REFUSED |= {"POSSESSIVE_REPEAT": "a possessive repetition"}
_KINDS = re.ASCII | re.LOCALE | re.UNICODE  # of these flags one counts
_LETTERS = re.compile(r"(\w|\\?[./-])*", re.ASCII)
_LETTER = ("LITERAL", "NOT_LITERAL", "ANY", "IN")


class _Unusable(ValueError):
    """A pattern that is refused."""


class Pattern:
    """``before`` and then the pattern, from a name's first letter on, to its end: ``re.match(f"{before}({text})$")``.

    subject: the beginning of its messages, as "density: pattern 'a'". Raises `error`, a type of MergeError, where the
    text is no regular expression or one that is refused; and when it is matched, if that takes too many steps.
    """

    def __init__(self, before: str, text: str, subject: str, error: type[MergeError]) -> None:
        self._subject, self._error = subject, error
        self._left = STEPS
        try:
            if len(text) > LONGEST:
                raise _Unusable(f"has {len(text)} letters, wanted at most {LONGEST}")
            self._match = _prepared(before, text)
        except _UNUSABLE as failure:
            raise error(f"{subject} is no regular expression: {failure}") from failure
        except _Unusable as failure:
            raise error(f"{subject} {failure}") from failure

    def match(self, name: str) -> bool:
        """Whether it matches."""
        if len(name) > NAME:
            raise self._error(f"{self._subject} is wanted for names of at most {NAME} letters, got {len(name)}")
        if isinstance(self._match, re.Pattern):
            return self._match.match(name) is not None
        run = _Run(name, self._left + MORE_STEPS)
        try:
            return self._match(run, 1) != 0
        except _Unusable as failure:
            raise self._error(f"{self._subject} {failure} for {name[:100]!r}") from failure
        finally:
            self._left = min(run.left, STEPS)


class _Run:
    """A name on its way through a pattern, which may take so many steps."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.left = name, steps
        self._found: dict[re.Pattern[str], int] = {}

    def places(self, pattern: re.Pattern[str]) -> int:
        """The positions at which a pattern of no width matches, as bits."""
        found = self._found.get(pattern)
        if found is None:
            found = self._found[pattern] = sum(1 << match.start() for match in pattern.finditer(self.name))
        return found

    def count(self) -> None:
        """Count one step."""
        self.left -= 1
        if self.left < 0:
            raise _Unusable("takes too many steps")


_Step = Callable[[_Run, int], int]  # the positions before a part of the pattern -> those after it, both as bits


def _prepared(before: str, text: str) -> re.Pattern[str] | _Step:
    """The pattern for Python's engine where it is letters alone, which that finds fast; else as steps."""
    whole = f"{before}({text})$"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what may mean something else in a later Python
        if _LETTERS.fullmatch(text):
            return re.compile(whole)
        tree = parser.parse(whole)
        return _sequence(tree, tree.state.flags, DEPTH)


def _sequence(tree: Iterable[tuple[Any, Any]], flags: int, depth: int) -> _Step:
    """Parts one after the other; neighbouring letters are one."""
    if not depth:
        raise _Unusable(f"has groups in groups, wanted at most {DEPTH} deep")
    steps: list[_Step] = []
    letters: list[str] = []
    for op, value in tree:
        if op.name in _LETTER:
            letters.append(_letter(op.name, value))
            continue
        if letters:
            steps.append(_one_after_another(letters, flags))
            letters = []
        steps.append(_part(op.name, value, flags, depth))
    if letters:
        steps.append(_one_after_another(letters, flags))
    if len(steps) == 1:
        return steps[0]

    def step(run: _Run, at: int) -> int:
        for each in steps:
            if not at:
                break
            at = each(run, at)
        return at

    return step


def _part(name: str, value: Any, flags: int, depth: int) -> _Step:
    if name in _REFUSED:
        raise _Unusable(f"has {_REFUSED[name]}, which is not supported")
    if name == "AT":
        return _place(re.compile(_PLACES[value.name], flags))
    if name == "SUBPATTERN":
        _, added, removed, tree = value
        flags = ((flags & ~_KINDS if added & _KINDS else flags) | added) & ~removed
        return _sequence(tree, flags, depth - 1)
    if name == "BRANCH":
        return _branch([_sequence(tree, flags, depth - 1) for tree in value[1]])
    if name in ("MAX_REPEAT", "MIN_REPEAT"):
        least, most, tree = value
        return _repeat(least, most, tree, flags, depth)
    if name in ("ASSERT", "ASSERT_NOT"):
        direction, tree = value
        back, most = tree.getwidth() if direction < 0 else (0, 0)
        if back != most:
            raise re.error("look-behind requires fixed-width pattern")
        return _look(_sequence(tree, flags, depth - 1), back, direction < 0, name == "ASSERT")
    if name == "FAILURE":
        return lambda run, at: 0
    raise _Unusable(f"has {name}, which is not known here")


def _letter(name: str, value: Any) -> str:
    """One letter, or one of several, as a regular expression again."""
    if name == "ANY":
        return "."
    if name in ("LITERAL", "NOT_LITERAL"):
        return f"\\U{value:08x}" if name == "LITERAL" else f"[^\\U{value:08x}]"
    inside = ""
    for op, item in value:
        if op.name == "RANGE":
            inside += f"\\U{item[0]:08x}-\\U{item[1]:08x}"
        else:
            literal = op.name == "LITERAL"
            inside += "^" if op.name == "NEGATE" else _letter("LITERAL", item) if literal else _category(item)
    return f"[{inside}]"


def _category(item: Any) -> str:
    return "\\" + _CATEGORIES[item.name.removeprefix("CATEGORY_")]


def _one_after_another(letters: Sequence[str], flags: int) -> _Step:
    pattern, width = re.compile(f"(?={''.join(letters)})", flags), len(letters)

    def step(run: _Run, at: int) -> int:
        run.count()
        return (at & run.places(pattern)) << width

    return step


def _place(pattern: re.Pattern[str]) -> _Step:
    def step(run: _Run, at: int) -> int:
        run.count()
        return at & run.places(pattern)

    return step


def _branch(branches: Sequence[_Step]) -> _Step:
    def step(run: _Run, at: int) -> int:
        run.count()
        after = 0
        for branch in branches:
            after |= branch(run, at)
        return after

    return step


def _repeat(least: int, most: int, tree: Any, flags: int, depth: int) -> _Step:
    body = _sequence(tree, flags, depth - 1)
    star = None
    if most == parser.MAXREPEAT and len(tree) == 1 and tree[0][0].name in _LETTER:
        star = re.compile(f"(?={_letter(tree[0][0].name, tree[0][1])})", flags)

    def step(run: _Run, at: int) -> int:
        run.count()
        for _ in range(least):
            after = body(run, at)
            if after == at:  # and so it stays
                break
            at = after
        if star is not None:  # adding carries a bit over all neighbouring letters that match
            letters = run.places(star)
            return (((at & letters) + letters) ^ letters) | at
        total, new, count = at, at, least
        while new and count < most:
            new = body(run, new) & ~total
            total |= new
            count += 1
        return total

    return step


def _look(inside: _Step, back: int, behind: bool, wanted: bool) -> _Step:
    """A look ahead, or behind by `back` letters: the positions at which it holds."""

    def step(run: _Run, at: int) -> int:
        run.count()
        after = 0
        for place in range(at.bit_length()):
            if at >> place & 1:
                found = place >= back and inside(run, 1 << (place - back))
                if bool(found >> place & 1 if behind else found) == wanted:
                    after |= 1 << place
        return after

    return step
