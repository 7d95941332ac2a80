"""The retention report as one HTML page that needs no other file, and as a Markdown table."""

import html
import math

from l2sp_tf.evaluation.activations import BOX

STYLE = """
:root { color-scheme: light dark; --ink: #1d232b; --soft: #5c6672; --line: #d9dee4; --page: #ffffff; --card: #f4f6f8;
  --bar: #2f6fb0; --top: #c2571a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa4af; --line: #343b44; --page: #14181d; --card: #1d232b; --bar: #6aa5df; --top: #f0935a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 3rem; font: 16px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--page); overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .4rem; }
p { margin: .3rem 0 .8rem; } .soft { color: var(--soft); font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin: 1rem 0; padding: 0; }
.card { background: var(--card); border-radius: .5rem; padding: .7rem .9rem; }
.card dt { color: var(--soft); font-size: .85rem; } .card dd { margin: 0; font-size: 1.45rem; font-weight: 600; }
.card small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: middle; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.picture { width: 38%; } .ends span:first-child { float: left; } td { font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: 14px; }
.track { fill: var(--card); } .bar { fill: var(--bar); } .top .bar { fill: var(--top); } .top td:first-child { font-weight: 600; }
.whisker { stroke: var(--bar); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.median { stroke: var(--top); stroke-width: 2.5; vector-effect: non-scaling-stroke; }
@media (max-width: 40rem) { .wide { display: none; } td.picture { width: 30%; } body { font-size: 15px; } }
"""


def page(report):
    """Writes the report as an HTML document. It escapes names, draws in inline SVG and loads nothing."""
    title = _text(f"What was kept: {report.title}")
    parts = [f"<h1>{title}</h1>", _facts(report), _cards(report), _most_moved(report), _distances(report), _r2(report)]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
    body = "\n".join(part for part in parts if part)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body>\n</html>\n'


def markdown(report):
    """Writes the distances by layer as a Markdown table."""
    rows = [f"| {_cell(x.layer)} | {x.numbers:,} | {_number(x.distance)} | {_percent(x.relative)} |" for x in report.layers]
    return "\n".join(["| layer | numbers | distance | relative |", "| --- | --- | --- | --- |", *rows])


def _facts(report):
    facts = {**report.facts, **({"source task": report.source} if report.source else {})}
    if report.new:
        facts["new weights, not compared"] = ", ".join(report.new[:4]) + (", …" if len(report.new) > 4 else "")
    return '<p class="soft">' + " · ".join(f"{_text(label)}: {_text(value)}" for label, value in facts.items()) + "</p>"


def _cards(report):
    distance = f"‖w\u00a0−\u00a0w⁰‖\u00a0/\u00a0‖w⁰‖, where ‖w\u00a0−\u00a0w⁰‖\u00a0=\u00a0{_number(report.distance)}"
    cards = [("distance to the start", _percent(report.relative), distance)]
    found = report.accuracies
    if found is None:
        cards.append(("source accuracy", "not measured", "no source images were given"))
    else:
        images = f"on {found['before']['total']:,} images"
        cards.append(("source accuracy before", f"{found['before']['accuracy']:.1%}", images))
        readings = {"target_statistics": "batch norm as fine-tuned", "source_statistics": "batch norm of the start"}
        for name, words in readings.items():
            lost = f"{100 * found[f'drop_{name}']:.1f} points"
            cards.append(("source accuracy after", f"{found[name]['accuracy']:.1%}", f"{words}; lost {lost}"))
    items = [f'<div class="card"><dt>{_text(a)}</dt><dd>{_text(b)}<small>{_text(c)}</small></dd></div>' for a, b, c in cards]
    return f'<dl class="cards">{"".join(items)}</dl>'


def _most_moved(report):
    moved = report.most_moved()
    if not moved:
        return "<h2>Which layers moved most</h2><p>No layer moved.</p>"
    words = ", ".join(f"<b>{_text(layer.layer)}</b> ({_percent(layer.relative)})" for layer in moved)
    return f"<h2>Which layers moved most</h2><p>{words}, relative to their own size.</p>"


def _distances(report):
    top = {layer.layer for layer in report.most_moved()}
    longest = max((x.relative for x in report.layers if x.relative and math.isfinite(x.relative)), default=1)
    rows = []
    for layer in report.layers:
        share = layer.relative / longest if layer.relative and math.isfinite(layer.relative) else 0
        bar = f'<rect class="track" width="100" height="10"/><rect class="bar" width="{100 * share:.2f}" height="10"/>'
        rows.append(
            f'<tr class="{"top" if layer.layer in top else "other"}"><td>{_text(layer.layer)}</td>'
            f'<td class="wide">{layer.numbers:,}</td><td class="wide">{_number(layer.distance)}</td>'
            f'<td>{_percent(layer.relative)}</td><td class="picture">{_svg(bar, _percent(layer.relative))}</td></tr>'
        )
    names = '<th>layer</th><th class="wide">numbers</th><th class="wide">‖w − w⁰‖</th><th>relative</th>'
    head = f'<tr>{names}<th class="picture"></th></tr>'
    note = "From the input to the output; weights, biases, gamma and beta, without the statistics of batch norm."
    return f'<h2>Distance by layer</h2><p class="soft">{note}</p><table>{head}{"".join(rows)}</table>'


def _r2(report):
    if not report.r2:
        return ""
    rows = []
    for name, box in report.r2.items():
        shown = "–" if box["med"] is None else f"{box['med']:.3f}"
        rows.append(
            f'<tr><td>{_text(name)}</td><td class="wide">{box["features"]}</td><td class="wide">{box["undefined"]}</td>'
            f'<td>{shown}</td><td class="picture">{_svg(_box(box), f"median {shown}")}</td></tr>'
        )
    head = (
        '<tr><th>layer</th><th class="wide">features</th><th class="wide">constant</th><th>median</th>'
        '<th class="picture ends"><span>0</span><span>1</span></th></tr>'
    )
    note = "The share of each feature's variance that a linear function of its pre-trained self explains; boxes are quartiles."
    return f'<h2>R² of activations by layer</h2><p class="soft">{note}</p><table>{head}{"".join(rows)}</table>'


def _box(values):
    """Draws a box plot from 0 to 1, 100 wide and 10 high."""
    track = '<rect class="track" width="100" height="10"/>'
    if values["med"] is None:
        return track
    low, q1, median, q3, high = (100 * values[name] for name in BOX)
    return (
        f'{track}<line class="whisker" x1="{low:.2f}" x2="{high:.2f}" y1="5" y2="5"/>'
        f'<rect class="bar" x="{q1:.2f}" y="2" width="{max(q3 - q1, 0.5):.2f}" height="6"/>'
        f'<line class="median" x1="{median:.2f}" x2="{median:.2f}" y1="0" y2="10"/>'
    )


def _svg(content, label):
    return f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{_text(label)}">{content}</svg>'


def _text(value):
    return html.escape(str(value))


def _cell(value):
    """Escapes a name for a cell of a Markdown table, which TensorBoard shows as HTML."""
    return html.escape(str(value)).replace("|", "&#124;")


def _number(value):
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def _percent(value):
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    return f"{100 * value:.2f}%" if value == 0 or value >= 1e-4 else f"{100 * value:.1g}%"
