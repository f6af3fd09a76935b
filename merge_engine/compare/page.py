"""A comparison as one HTML page that needs no other files: for a screen, a phone, and print."""

import base64
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

import numpy as np

from merge_engine.compare.figures import CAVEAT, Figures, Interference, figure, percent, together, upper
from merge_engine.compare.plots import Lines, by_layer, defined, heat_map, layer_plot, lines_by_kind
from merge_engine.compare.recommend import UNMEASURED, recommendation_of
from merge_engine.errors import some

PAIRS = 20  # in the table
STYLE = """
body { margin: 0 auto; padding: 1rem; max-width: 70rem; font: 16px/1.5 system-ui, sans-serif; }
body { color: #222; background: #fff; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2rem; }
h1, h2, p, li, code, figcaption, td:first-child, td.text { overflow-wrap: anywhere; }
p, ul, dl { max-width: 45rem; } .lead { font-size: 1.1rem; } dt { font-weight: 600; } dd { margin: 0 0 .6rem; }
.plots { display: grid; gap: 1.5rem; align-items: end; margin-bottom: 1.5rem; }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); }
.plots.wide { grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); align-items: start; }
figure { margin: 0; } figcaption { font-size: .9rem; margin-bottom: .25rem; }
img { display: block; width: 100%; max-width: 34rem; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; vertical-align: top; white-space: nowrap; }
th { vertical-align: bottom; border-bottom: 1px solid #666; } td { border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; padding-left: 0; min-width: 9rem; white-space: normal; }
th.text, td.text { text-align: left; min-width: 14rem; white-space: normal; }
@media (max-width: 30rem) { th, td { padding: .3rem; } }
@media print {
  @page { margin: 15mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; }
  .plots { grid-template-columns: repeat(3, 1fr); gap: 5mm; } .plots.wide { grid-template-columns: repeat(2, 1fr); }
  figure, tr { break-inside: avoid; } h2 { break-after: avoid; } thead { display: table-header-group; }
  table { font-size: 8pt; } th, td { padding: .15rem .4rem; }
}
"""
READING = {
    "cosine": "⟨Δ<sub>i</sub>, Δ<sub>j</sub>⟩ / (|Δ<sub>i</sub>| |Δ<sub>j</sub>|) of two deltas Δ = s · B · A, as "
    "they are, untrimmed. Near 0 they have little in common; near 1 they do the same; below 0 they partly cancel.",
    "kept": "An adapter keeps the share <i>density</i> of each delta's elements: those with the largest magnitudes, as "
    "in TIES. Zeros do not count as kept.",
    "overlap": "Of the elements that either of two adapters keeps, the share that both keep.",
    "conflict": "Of the elements that both of two adapters keep, the share whose signs differ. For a module: of its "
    "<i>contested</i> elements, which two or more adapters keep, the share with both signs. This grows with the number "
    "of adapters, even of unrelated ones.",
    "effective rank": "exp of the entropy of a delta's singular values, as shares of their sum (Roy and Vetterli "
    "2007): the number of directions that it really uses; the mean over its modules.",
    "energy kept": "The share of the squared norm that the trim leaves.",
}


def render(result: Interference) -> str:
    """The page: notes, adapters, heat maps, pairs, plots by layer, every module, and how to read it.

    For a pair, only modules that both adapters have count. Needs matplotlib.
    """
    title = f"Interference of {len(result.adapters)} adapters"
    lead = f"{some(len(result.modules), 'module')}; at density {result.density}, {result.summary()}."
    body = [
        f"<h1>{title}</h1>",
        f'<p class="lead">{_text(lead)}</p>',
        _list([*result.notes(), result.expected(), CAVEAT]),
        "<h2>Adapters</h2>",
        _adapters(result),
        "<h2>Pairs of adapters, over all modules</h2>",
        _heat_maps(result),
        _pairs(result),
        "<h2>Layer by layer</h2>",
        _layers(result),
        "<h2>Modules, most conflicting first</h2>",
        _modules(result),
        "<h2>How to read this</h2>",
        "<dl>" + "".join(f"<dt>{word}</dt><dd>{text}</dd>" for word, text in READING.items()) + "</dl>",
        "<h2>What to try first</h2>",
        _recommendation(result),
    ]
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
{chr(10).join(body)}
</body>
</html>
"""
    return page.encode(errors="replace").decode()  # a file's name may hold what UTF-8 cannot


def _recommendation(result: Interference) -> str:
    found = recommendation_of(result)
    tried = "".join(
        f"<li><code>{_text(each.command)}</code><p>{_text(each.why)}</p></li>" for each in found.suggestions
    )
    return f"{_list(found.findings)}<ol>{tried}</ol><p>{_text(UNMEASURED)}</p>"


def _adapters(result: Interference) -> str:
    overall = result.overall
    columns = zip(
        *(result.adapters, result.sources, overall.modules, overall.norms, overall.effective_ranks),
        overall.kept_energy,
        strict=True,
    )
    rows = [
        [f"{i} {name}", str(modules), figure(norm, ".4g"), figure(rank, ".1f"), percent(energy), source]
        for i, (name, source, modules, norm, rank, energy) in enumerate(columns, 1)
    ]
    return _table(["adapter", "modules", "norm", "effective rank", "energy kept", "from"], rows)


def _heat_maps(result: Interference) -> str:
    overall, names = result.overall, result.adapters
    maps: list[tuple[str, np.ndarray, str, Callable[[float], str]]] = [
        ("Cosine of the deltas", overall.cosine, "cosine", lambda value: figure(value, ".3f")),
        ("Conflict: opposite signs, in % of what both keep", overall.conflict, "conflict", percent),
        ("Overlap of what they keep, in %", overall.overlap, "overlap", percent),
    ]
    figures = []
    for caption, matrix, what, as_text in maps:
        pairs = np.where(np.triu(np.ones(matrix.shape, bool), 1), matrix, np.nan)
        if np.isnan(pairs).all():
            continue
        ends = [np.unravel_index(end(pairs), pairs.shape) for end in (np.nanargmin, np.nanargmax)]
        low, high = (f"{as_text(matrix[i, j])} ({names[i]} and {names[j]})" for i, j in ends)
        alt = f"Heat map by pair of adapters. {caption}: from {low} to {high}."
        figures.append(_image(heat_map(matrix, names, what), caption, alt))
    return f'<div class="plots">{"".join(figures)}</div>' if figures else "<p>No pair shares a module.</p>"


def _pairs(result: Interference) -> str:
    pairs = result.pairs()
    rows = [
        [
            f"{result.adapters[pair.one]}, {result.adapters[pair.other]}",
            *(percent(pair.conflict), percent(pair.overlap), figure(pair.cosine, ".3f")),
        ]
        for pair in pairs[:PAIRS]
    ]
    cut = f"<p>The {PAIRS} most conflicting of {len(pairs)} pairs:</p>" if len(pairs) > PAIRS else ""
    return cut + _table(["pair", "conflict", "overlap", "cosine"], rows) if pairs else ""


def _layers(result: Interference) -> str:
    kinds = by_layer(list(result.modules))
    if not kinds:
        return "<p>No module's name has a layer's number.</p>"

    def of_modules(value: Callable[[Figures], float]) -> Lines:
        return lines_by_kind(kinds, lambda names: value(together(result.modules[name] for name in names)))

    def mean(matrix: np.ndarray) -> float:
        values = upper(matrix)
        return sum(values) / len(values) if values else math.nan

    plots = [
        ("Conflict by layer, in %", "conflict, %", of_modules(lambda each: 100 * each.conflict_rate)),
        ("Mean cosine of the pairs by layer", "cosine", of_modules(lambda each: mean(each.cosine))),
        ("Mean overlap of the pairs by layer, in %", "overlap, %", of_modules(lambda each: 100 * mean(each.overlap))),
        ("Norm of each adapter's deltas by layer", "norm", _norms(result, kinds.values())),
    ]
    figures = [
        _image(layer_plot(lines, what), caption, f"Line plot. {caption}, {_ends(lines)}.")
        for caption, what, lines in plots
        if lines
    ]
    counted = sum(len(names) for layers in kinds.values() for names in layers.values())
    rest = len(result.modules) - counted
    left = f"<p>{some(rest, 'module')} without a layer's number in the name: only in the table.</p>" if rest else ""
    return f'<div class="plots wide">{"".join(figures)}</div>{left}'


def _norms(result: Interference, kinds: Iterable[dict[int, list[str]]]) -> Lines:
    """Each adapter's norm over all modules of a layer."""
    layers: dict[int, list[Figures]] = {}
    for kind in kinds:
        for layer, names in kind.items():
            layers.setdefault(layer, []).extend(result.modules[name] for name in names)
    norms = {layer: together(figures).norms for layer, figures in layers.items()}
    return defined(
        {
            f"{i} {name}": {layer: float(each[i - 1]) for layer, each in norms.items()}
            for i, name in enumerate(result.adapters, 1)
        }
    )


def _ends(lines: Lines) -> str:
    """The lowest and the highest value of a plot, with their lines and layers, in words."""
    points = [(value, name, layer) for name, line in lines.items() for layer, value in line.items()]
    low, high = (f"{value:.3g} ({name}, layer {layer})" for value, name, layer in (min(points), max(points)))
    return f"{some(len(lines), 'line')}: from {low} to {high}"


def _modules(result: Interference) -> str:
    rows = []
    for name, each in result.ranked():
        overlaps = upper(each.overlap)
        rows.append(
            [
                name,
                "{} x {}".format(*result.shapes[name]),
                str(int(each.modules.sum())),
                percent(each.conflict_rate),
                percent(each.contested_share),
                percent(sum(overlaps) / len(overlaps) if overlaps else math.nan),
                figure(min(upper(each.cosine), default=math.nan), ".3f"),
                figure(max(upper(each.cosine), default=math.nan), ".3f"),
            ]
        )
    names = ["module", "delta", "adapters", "conflict", "contested", "mean overlap", "lowest cosine", "highest cosine"]
    return _table(names, rows)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls in its own box where it is too wide. The column "from" is text, the others are numbers."""
    kinds = [' class="text"' if name == "from" else "" for name in names]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for kind, name in zip(kinds, names, strict=True))
    body = "\n".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="table by {escape(names[0])}" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def _image(png: bytes, caption: str, alt: str) -> str:
    image = f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    return f"<figure><figcaption>{escape(caption)}</figcaption>{image}</figure>"


def _list(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(sentence)}</li>" for sentence in sentences) + "</ul>"


def _text(sentence: str) -> str:
    """Escaped, with no line break before a percent sign."""
    return escape(sentence).replace(" %", "&nbsp;%")
