"""Writes the figures of README and docs from bench/results: python docs/make/figures.py

A figure stands in a page between marks that do not show: `<!--=cpu ties_faster-->38.7<!--/-->` is "ties_faster" of
FIGURES, of bench/results/cpu.csv. After a new run, or with a new row below, the script writes them all again.
"""

import csv
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = re.compile(r"<!--=(\w+) (\w+)-->(.*?)<!--/-->")

Rows = list[dict[str, str]]
Figure = Callable[[Rows], str]


def where_it_holds(rows: Rows, where: dict[str, str]) -> Rows:
    """The rows that have these values in these fields."""
    return [row for row in rows if all(row[name] == wanted for name, wanted in where.items())]


def value(rows: Rows, field: str, **where: str) -> float:
    """The field of the one row of which this holds. Raises LookupError where there is none, or are several."""
    found = where_it_holds(rows, where)
    if len(found) != 1 or not found[0][field]:
        raise LookupError(f"{field} of {where}: wanted one row with it, got {len(found)}")
    return float(found[0][field])


def time(**where: str) -> Figure:
    """Seconds, as 72 ms or 2.8 s."""

    return lambda rows: in_text(value(rows, "seconds", **where))


def amount(field: str, form: str, factor: float = 1.0, **where: str) -> Figure:
    """A field, times a factor, in a format."""
    return lambda rows: form.format(factor * value(rows, field, **where))


def ratio(above: str, below: str, field: str = "seconds", **where: str) -> Figure:
    """A field of one contestant by that of another; memory is not counted more finely than 1 MiB."""

    def figure(rows: Rows) -> str:
        one, other = (value(rows, field, contestant=name, **where) for name in (above, below))
        return digits(max(one, 1.0) / max(other, 1.0) if field == "extra_mib" else one / other)

    return figure


def span(form: str, figures: Callable[[Rows], list[float]]) -> Figure:
    """The least and the largest of some figures, as 0.9 to 3.1."""

    def figure(rows: Rows) -> str:
        found = figures(rows)
        return f"{form.format(min(found))} to {form.format(max(found))}"

    return figure


def each(field: str, **where: str) -> Callable[[Rows], list[float]]:
    """The field of all rows of which this holds."""
    return lambda rows: [float(row[field]) for row in where_it_holds(rows, where)]


def in_text(seconds: float) -> str:
    """72 ms, or 2.8 s."""
    return f"{digits(seconds * 1e3)} ms" if seconds < 0.9995 else f"{digits(seconds)} s"


def digits(number: float) -> str:
    """Three digits, and no power of ten."""
    return f"{number:.0f}" if number >= 99.95 else f"{number:#.3g}"


def _of(kind: str, workload: str) -> dict[str, Any]:
    return {"kind": kind, "workload": workload}


LARGE, MODEL = "3x r16 4096x4096 d0.2 fp32", "ties 3x r16 22 layers d0.2 fp32"
TIES, DARE = _of("deltas", f"ties {LARGE}"), _of("deltas", f"dare_ties {LARGE}")
PARTS, WHOLE = _of("parts", f"ties {LARGE}"), _of("whole", MODEL)
EXTRAPOLATED = "PEFT, extrapolated from one layer of each shape"
GIB = "{:.2f} GiB"
ADAPTERS = "ties {}x r16 2048x2048 d0.2 fp32"

FIGURES: dict[str, Figure] = {
    "ties_faster": ratio("PEFT", "tiled", **TIES),
    "ties_ours": time(contestant="tiled", **TIES),
    "ties_peft": time(contestant="PEFT", **TIES),
    "ties_memory": ratio("PEFT", "tiled", "extra_mib", **TIES),
    "dare_faster": ratio("PEFT", "tiled", **DARE),
    "selection": ratio("tiled", "bare product", **_of("select", f"magnitude_prune 1{LARGE[1:]}")),
    "threads": ratio("1 thread", "2 threads", **_of("threads", f"ties {LARGE}")),
    "whole_ours": time(contestant="merge-engine", **WHOLE),
    "whole_round": amount("seconds", "{:.0f} seconds", contestant="merge-engine", **WHOLE),
    "whole_memory": amount("peak_mib", GIB, 1 / 1024, contestant="merge-engine", **WHOLE),
    "whole_peft": time(contestant=EXTRAPOLATED, **WHOLE),
    "whole_peft_cpu": amount("processor", "{:.0f}", contestant=EXTRAPOLATED, **WHOLE),
    "whole_peft_minutes": amount("seconds", "{:.1f} minutes", 1 / 60, contestant=EXTRAPOLATED, **WHOLE),
    "ranks": ratio("1 rank", "2 ranks", **_of("ranks", MODEL)),
    "rank_1": time(contestant="1 rank", **_of("ranks", MODEL)),
    "rank_2": time(contestant="2 ranks", **_of("ranks", MODEL)),
    "adapters_4": amount("extra_mib", "{:.0f} MiB", contestant="tiled", **_of("adapters", ADAPTERS.format(4))),
    "adapters_32": amount("extra_mib", "{:.0f} MiB", contestant="tiled", **_of("adapters", ADAPTERS.format(32))),
    "base_alone": amount("mean", "{:.1f}", name="base, no adapter"),
}
for _rows in ("1024", "8192"):
    _work = _of("elements", f"ties 3x r16 {_rows}x2048 d0.2 fp32")
    FIGURES[f"elements_{_rows}"] = time(contestant="tiled", **_work)


def _of_parts(compute: Callable[[Callable[[str], float], float], str]) -> Figure:
    """compute(seconds of a part, those of all products at the matmul rate)."""

    def figure(rows: Rows) -> str:
        (whole,) = (row for row in rows if row["kind"] == "parts" and row["contestant"] == "whole")
        elements, adapters, rank = (int(whole[name]) for name in ("elements", "adapters", "rank"))
        products = 2 * rank * adapters * elements / float(whole["matmul_gflop_s"]) / 1e9
        return compute(lambda part: value(rows, "seconds", contestant=part, **PARTS), products)

    return figure


FIGURES |= {
    "adapters_4_time": time(contestant="tiled", **_of("adapters", ADAPTERS.format(4))),
    "adapters_32_time": time(contestant="tiled", **_of("adapters", ADAPTERS.format(32))),
    "products_share": _of_parts(lambda of, _: f"{200 * of('bare products') / of('whole'):.0f} %"),
    "products_rate": _of_parts(lambda of, products: f"{100 * products / of('bare products'):.0f} %"),
    "search_rest": _of_parts(lambda of, _: in_text(of("thresholds") - of("bare products"))),
    "merge_rest": _of_parts(lambda of, _: in_text(of("merge, thresholds known") - of("bare products"))),
}
for _type in ("svd", "ties_svd"):
    _work = _of("recompress", f"{_type} 3x r16 2048x2048 d0.2 fp32")
    FIGURES |= {
        f"{_type}_faster": ratio("PEFT", "drop-in", **_work),
        f"{_type}_excess": amount("excess", "{:.0e}", contestant="drop-in", **_work),
    }
for _type in ("ties", "linear", "magnitude_prune", "dare_ties", "dare_linear", "cat", "svd", "ties_svd"):
    _kind = ("recompress", "2048x2048") if _type.endswith("svd") else ("factors", "22 layers")
    _work = _of(_kind[0], f"{_type} 3x r16 {_kind[1]} d0.2 fp32")
    FIGURES |= {
        f"drop_in_{_type}": ratio("PEFT", "drop-in", **_work),
        f"drop_in_{_type}_ours": time(contestant="drop-in", **_work),
        f"drop_in_{_type}_peft": time(contestant="PEFT", **_work),
        f"drop_in_{_type}_memory": amount("peak_mib", "{:.0f} MiB", contestant="drop-in", **_work),
        f"drop_in_{_type}_peft_memory": amount("peak_mib", "{:.0f} MiB", contestant="PEFT", **_work),
    }
for _type in ("ties", "dare_ties"):
    _work = _of("base", f"{_type} 3x r16 12 layers of Llama-134M d0.2 fp32")
    FIGURES |= {
        f"into_{_type}": ratio("mergekit-yaml", "merge-engine", **_work),
        f"into_{_type}_ours": time(contestant="merge-engine", **_work),
        f"into_{_type}_mergekit": time(contestant="mergekit-yaml", **_work),
    }
    for _who in ("merge-engine", "mergekit-yaml") if _type == "ties" else ():
        _key = f"into_ties_{_who.replace('-', '_')}_memory"
        FIGURES[_key] = amount("peak_mib", GIB, 1 / 1024, contestant=_who, **_work)
for _type, _models in {"slerp": 1, "model_stock": 2, "sce": 2, "della": 2}.items():
    _work = _of("whole_models", f"{_type} {_models}x r0 12 layers of Llama-134M d0.5 bf16")
    FIGURES[f"models_{_type}"] = ratio("mergekit-yaml", "merge-engine", **_work)
    for _name, _who in {"ours": "merge-engine", "mergekit": "mergekit-yaml"}.items():
        FIGURES |= {
            f"models_{_type}_{_name}": time(contestant=_who, **_work),
            f"models_{_type}_{_name}_memory": amount("peak_mib", GIB, 1 / 1024, contestant=_who, **_work),
            f"models_{_type}_{_name}_written": amount("written_mib", "{:.0f} MiB", contestant=_who, **_work),
        }
for _name, _part in {
    "whole": "whole",
    "thresholds": "thresholds",
    "merge": "merge, thresholds known",
    "products": "bare products",
    "zeros": "a result of zeros",
}.items():
    FIGURES[f"part_{_name}"] = time(contestant=_part, **PARTS)
for _name, _grid in {"scales": "ties, density x scale", "weights": "ties, density x weights"}.items():
    FIGURES[f"many_{_name}"] = ratio("singly", "merge_many", **_of("many", f"{_grid} 8x r16 1 layers d0.2 fp32"))
for _name, _what in {"factors": "ties of factors", "linear": "linear", "ties": "ties"}.items():
    _work = _of("session", f"{_what}, other weights 8x r16 1 layers d0.2 fp32")
    FIGURES[f"session_{_name}"] = ratio("singly", "Session", **_work)
    if _name == "linear":
        FIGURES |= {f"session_linear_{_who}": time(contestant=_who, **_work) for _who in ("singly", "Session")}
for _name in ("linear", "iso_c", "tsv", "tsv_iso", "actmat"):
    _work = _of("session", f"{_name}, other weights 8x r16 20 layers of 2048x2048 and 2048x5632 d0.2 fp32")
    FIGURES[f"search_{_name}"] = ratio("singly", "Session", **_work)
    FIGURES |= {f"search_{_name}_{_who}": time(contestant=_who, **_work) for _who in ("singly", "Session")}
for _name in (
    "linear|linear, auto|tsv|tsv, auto|tsv, auto, rank 8|iso_c|actmat|actmat, ridge .3|magnitude_prune d=.2|ties d=.2|"
    "ties d=.2, rank 8|ties d=.5, knots|dare_linear d=.2|dare_ties d=.5|linear, factors|ties d=.5, factors"
).split("|"):
    _key = re.sub(r"\W+", "_", _name)
    FIGURES |= {
        f"demo_{_key}": amount("mean", "{:.1f}", name=_name),
        f"demo_{_key}_scale": amount("best_scale", "{:g}", name=_name),
        f"demo_{_key}_tuned": amount("best_mean", "{:.1f}", name=_name),
    }
FIGURES |= {
    "shared_iso_c": lambda rows: digits(value(rows, "best_mean", name="linear") - value(rows, "mean", name="iso_c")),
    "first_merge": time(what="bundled adapters, empty cache"),
    "second_merge": time(what="bundled adapters, full cache"),
    "compiling": amount("seconds", "{:.0f}", what="compiling"),
    "served_new": span("{:.1f}", each("seconds", what="served, new")),
    "served_kept": time(what="served, kept"),
}
_svd_merge, _svd_merge_of = "kohya's svd_merge", _of("svd_merge", "linear 3x r32 3072x3072 d0.2 fp32")
for _type in ("linear", "ties"):
    _work = _of("image", f"{_type} 3x r32 19 layers of Flux d0.2 bf16")
    FIGURES |= {
        f"image_{_type}": time(contestant="merge-engine", **_work),
        f"image_{_type}_cpu": amount("processor", "{:.0f} s", contestant="merge-engine", **_work),
        f"image_{_type}_memory": amount("peak_mib", GIB, 1 / 1024, contestant="merge-engine", **_work),
    }
    if _type == "linear":
        _whole = {"contestant": f"{_svd_merge}, extrapolated from one layer", **_work}
        FIGURES["image_svd_merge"] = amount("seconds", "{:.1f} hours", 1 / 3600, **_whole)
FIGURES |= {
    "svd_merge": time(contestant=_svd_merge, **_svd_merge_of),
    "svd_merge_ours": time(contestant="merge-engine", **_svd_merge_of),
    "image_matmul": amount("matmul_gflop_s", "{:.0f}", contestant=_svd_merge, **_svd_merge_of),
}
for _type in ("linear", "tsv", "actmat"):
    _work = _of("trial", f"{_type} 4x r16 22 layers d0.2 fp32")
    FIGURES |= {
        f"trial_{_type}": time(contestant="Session", **_work),
        f"trial_{_type}_disk": time(contestant="Session, to disk", **_work),
    }
_work = _of("trial", "linear 4x r16 22 layers d0.2 fp32")
FIGURES |= {
    "trial_memory": amount("peak_mib", GIB, 1 / 1024, contestant="Session", **_work),
    "trial_mergekit": time(contestant="mergekit-evolve", **_work),
    "trial_mergekit_memory": amount("peak_mib", GIB, 1 / 1024, contestant="mergekit-evolve", **_work),
}
for _group in ("replay", "alone"):
    for _name in "linear|linear, auto|tsv|tsv, auto|iso_c|actmat|ties d=.2|dare_ties d=.5|linear, factors".split("|"):
        _key, _row = f"{_group}_{re.sub(r'[^a-z0-9]+', '_', _name)}", {"name": _name, "group": _group}
        FIGURES |= {
            _key: amount("mean", "{:.1f}", **_row),
            f"{_key}_scale": amount("best_scale", "{:g}", **_row),
            f"{_key}_tuned": amount("best_mean", "{:.1f}", **_row),
            f"{_key}_known": amount("known", "{:.1f}", **_row),
        }


def _above_linear(name: str, field: str = "best_mean") -> Callable[[Rows], list[float]]:
    """By seed: how far a row is above `linear` at its best scale, in points."""

    def above(rows: Rows) -> list[float]:
        seeds = dict.fromkeys(row["seed"] for row in rows)
        return [
            value(rows, field, seed=seed, name=name) - value(rows, "best_mean", seed=seed, name="linear")
            for seed in seeds
        ]

    return above


def _below(above: Callable[[Rows], list[float]]) -> Callable[[Rows], list[float]]:
    return lambda rows: [-points for points in above(rows)]


FIGURES |= {
    "seeds_tsv": span("{:.1f}", _above_linear("tsv")),
    "seeds_actmat": span("{:.1f}", _above_linear("actmat, ridge .3")),
    "seeds_linear_auto": lambda rows: f"{-min(_above_linear('linear, auto', 'mean')(rows)):.1f}",
    "seeds_ties": span("{:.1f}", _below(_above_linear("ties d=.2"))),
    "search_time": span("{:.0f}", each("seconds")),
}
for _sample in ("reported", "21"):
    FIGURES |= {
        f"search_one_{_sample}": amount("score", "{:.2f}", seed="0", merge="one scale", sample=_sample),
        f"search_found_{_sample}": span("{:.2f}", each("score", merge="found", sample=_sample)),
    }
for _type in ("dare_linear", "dare_linear_svd"):
    for _way in ("PEFT", "torch", "philox"):
        FIGURES[f"{_type}_{_way}"] = amount("processor", "{:.2f} s", type=_type, rng=_way)


for _model, _adapters, _method in (
    ("TinyLlama", "3", "linear"),
    ("TinyLlama", "3", "tsv"),
    ("TinyLlama", "8", "linear"),
    ("TinyLlama", "8", "tsv"),
    ("Llama-70B", "3", "tsv"),
):
    _work = {"model": _model, "adapters": _adapters, "method": _method}
    _key = f"{_model.replace('-', '')}_{_adapters}_{_method}"
    FIGURES |= {
        _key: amount("seconds", "{:.1f} s", **_work),
        f"{_key}_import": amount("importing", "{:.1f} s", **_work),
        f"{_key}_copy": amount("copying", "{:.1f} s", **_work),
        f"{_key}_memory": amount("peak_gb", "{:.2f} GB", **_work),
    }


def figure(file: str, name: str) -> str:
    """The text of a figure. Raises LookupError where the file, its row or the figure is not there."""
    path = RESULTS / f"{file}.csv"
    if name not in FIGURES or not path.is_file():
        raise LookupError(f"{file} {name}: wanted a figure of docs/make/figures.py and a file of bench/results")
    with path.open(newline="") as lines:
        return FIGURES[name](list(csv.DictReader(lines)))


def written(text: str) -> str:
    """A page with its figures as the results have them."""
    return MARK.sub(lambda found: f"<!--={found[1]} {found[2]}-->{figure(found[1], found[2])}<!--/-->", text)


def main() -> int:
    """Write all pages; say what changed."""
    for page in PAGES:
        before = page.read_text()
        after = written(before)
        if after != before:
            page.write_text(after)
            print(page.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
