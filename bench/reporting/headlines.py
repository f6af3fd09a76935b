"""The figures to look at first, and what is wanted of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.harness.row import Row
from bench.reporting.extrapolated import EXTRAPOLATED

OURS = ("tiled", "triton", "drop-in", "merge-engine")  # contestants of this project


@dataclass(frozen=True)
class Headline:
    """One figure of a workload: above / below, or above alone where below is None.

    above, below: (contestant, field of its row); the contestant "ours" is any of OURS.
    wanted: (">=" or "<=", a number).
    """

    name: str
    kind: str
    workload: str
    above: tuple[str, str]
    below: tuple[str, str] | None
    wanted: tuple[str, float]

    def value(self, rows: Iterable[Row]) -> float | None:
        """None where a row or its field is missing."""
        mine = [row for row in rows if row.kind == self.kind and row.workload == self.workload]
        above = _figure(mine, *self.above)
        if above is None or self.below is None:
            return above
        below = _figure(mine, *self.below)
        return None if below is None else above / below


def _figure(rows: Sequence[Row], contestant: str, name: str) -> float | None:
    row = next(
        (row for row in rows if row.contestant == contestant or (contestant == "ours" and row.contestant in OURS)), None
    )
    value = None if row is None else getattr(row, name)
    return value if value is None or name != "extra_mib" else max(value, 1.0)  # memory is not counted more finely


def _faster(name: str, kind: str, workload: str, rival: str, times: float) -> Headline:
    return Headline(name, kind, workload, (rival, "seconds"), ("ours", "seconds"), (">=", times))


LARGE, INTO = "3x r16 4096x4096 d0.2 fp32", "3x r16 12 layers of Llama-134M d0.2 fp32"
HEADLINES = [
    _faster("ties of deltas: times as fast as PEFT", "deltas", f"ties {LARGE}", "PEFT", 20),
    Headline(
        "ties of deltas: PEFT's extra memory / ours",
        "deltas",
        f"ties {LARGE}",
        ("PEFT", "extra_mib"),
        ("ours", "extra_mib"),
        (">=", 20),
    ),
    _faster("dare_ties of deltas: times as fast as PEFT", "deltas", f"dare_ties {LARGE}", "PEFT", 6),
    Headline(
        "dare_ties of deltas: PEFT's extra memory / ours",
        "deltas",
        f"dare_ties {LARGE}",
        ("PEFT", "extra_mib"),
        ("ours", "extra_mib"),
        (">=", 20),
    ),
    Headline(
        "selection: time / that of the bare product",
        "select",
        "magnitude_prune 1x r16 4096x4096 d0.2 fp32",
        ("tiled", "seconds"),
        ("bare product", "seconds"),
        ("<=", 8),
    ),
    Headline(
        "ties of deltas: 1 thread's time / that of 2",
        "threads",
        f"ties {LARGE}",
        ("1 thread", "seconds"),
        ("2 threads", "seconds"),
        (">=", 1.7),
    ),
    _faster("svd: times as fast as PEFT", "recompress", "svd 3x r16 2048x2048 d0.2 fp32", "PEFT", 300),
    _faster("ties_svd: times as fast as PEFT", "recompress", "ties_svd 3x r16 2048x2048 d0.2 fp32", "PEFT", 25),
    *(
        Headline(
            f"{method}: excess of the error over the best cut's",
            "recompress",
            f"{method} 3x r16 2048x2048 d0.2 fp32",
            ("ours", "excess"),
            None,
            ("<=", 1e-3),
        )
        for method in ("svd", "ties_svd")
    ),
    Headline(
        "whole TinyLlama, ties cut to rank 16: seconds",
        "whole",
        "ties 3x r16 22 layers d0.2 fp32",
        ("merge-engine", "seconds"),
        None,
        ("<=", 25),
    ),
    _faster(
        "whole TinyLlama: times as fast as PEFT, extrapolated",
        "whole",
        "ties 3x r16 22 layers d0.2 fp32",
        EXTRAPOLATED,
        1,
    ),
    *(
        _faster(f"{method} into a base: times as fast as mergekit-yaml", "base", f"{method} {INTO}", "mergekit-yaml", n)
        for method, n in (("ties", 10), ("dare_ties", 6))
    ),
    Headline(
        "ties into a 22-layer TinyLlama: 1 rank's time / that of 2, of one thread each",
        "ranks",
        "ties 3x r16 22 layers d0.2 fp32",
        ("1 rank", "seconds"),
        ("2 ranks", "seconds"),
        (">=", 1.6),
    ),
    *(
        Headline(
            f"16 recipes, {grid}: one by one / merge_many, {what}",
            "many",
            f"{grid} 8x r16 1 layers d0.2 fp32",
            ("singly", name),
            ("merge_many", name),
            (">=", 3),
        )
        for grid in ("ties, density x scale", "ties, density x weights")
        for what, name in (("time", "seconds"), ("CPU time", "processor"))
    ),
    *(
        Headline(
            f"{what}, other weights only: a merge of its own / one in a Session",
            "session",
            f"{what}, other weights 8x r16 1 layers d0.2 fp32",
            ("singly", "seconds"),
            ("Session", "seconds"),
            (">=", 4),
        )
        for what in ("linear", "ties of factors", "ties")
    ),
]
