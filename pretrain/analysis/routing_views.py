"""A routing trace for people: lines on a terminal, and a page with a heat map of each layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from html import escape

from rich.table import Table
from rich.text import Text

from pretrain.analysis.routing_trace import LayerTrace, RoutingTrace

# A cell of the table shows so many choices, those of the largest weights.
SHOWN_CHOICES = 4
# A heat map has rows for so many experts, the most used ones.
SHOWN_EXPERTS = 256
# Pixels of a token's column and of an expert's row.
WIDTH, HEIGHT, MARGIN = 18, 12, 64
STYLE = """
body { font: 14px sans-serif; margin: 1.5em; color: #222; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .6em; }
pre span { border-bottom: 3px solid; }
figure { overflow-x: auto; margin: 0 0 1.5em; }
svg text { font: 10px monospace; }
"""


def shown(text: str) -> str:
    """A token's text without line breaks, control characters and what else moves a cursor."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


def strongest(layer: LayerTrace, token: int) -> list[tuple[int, float]]:
    """The experts of a token with their weights, the largest first."""
    pairs = zip(layer.experts[token], layer.weights[token], strict=True)
    return sorted(pairs, key=lambda pair: -pair[1])


def table_of(trace: RoutingTrace, layers: Sequence[LayerTrace], tokens: int) -> Table:
    """A row for each of the first ``tokens`` tokens, a column for each layer."""
    table = Table(
        "token",
        "text",
        *(f"layer {layer.layer}" for layer in layers),
        title=Text(f"{shown(trace.model)}: {trace.num_experts:,} experts a layer"),
    )
    for token, text in enumerate(trace.tokens[:tokens]):
        # Text, not markup: a token may be "[bold]".
        table.add_row(
            str(token), Text(shown(text)), *(_cell(strongest(layer, token)) for layer in layers)
        )
    return table


def _cell(choices: list[tuple[int, float]]) -> str:
    cells = [f"{expert} {weight:.2f}" for expert, weight in choices[:SHOWN_CHOICES]]
    more = len(choices) - len(cells)
    return ", ".join(cells) + (f" and {more} more" if more else "")


def lines_of(trace: RoutingTrace, layers: Sequence[LayerTrace]) -> str:
    """A line for each token and layer, with tabs between number, text, layer and all choices."""
    lines = []
    for token, text in enumerate(trace.tokens):
        for layer in layers:
            choices = " ".join(
                f"{expert}:{weight:.4f}" for expert, weight in strongest(layer, token)
            )
            lines.append(f"{token}\t{shown(text)}\tlayer {layer.layer}\t{choices}\n")
    return "".join(lines)


def page_of(trace: RoutingTrace, layers: Sequence[LayerTrace]) -> str:
    """A page of HTML that needs nothing else: the text, then a heat map of each layer.

    A column is a token, a row an expert, and a field is as dark as the token's weight for it.
    """
    loss = "" if trace.loss is None else f", {trace.loss:.4f} nats a token"
    title = escape(f"Routing of {len(trace.tokens)} tokens by {shown(trace.model)}")
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        # Whatever a token's text is, nothing of it is loaded or run.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{title}</title><style>{STYLE}</style></head><body>",
        f"<h1>{title}</h1><p>{trace.num_experts:,} experts a layer, {escape(trace.dtype)}{loss}.",
        "A text's tokens are underlined in the colour of their strongest expert.</p>",
    ]
    for layer in layers:
        parts += [f"<h2>Layer {layer.layer}</h2>", _text(trace, layer), _heat_map(trace, layer)]
    return "\n".join([*parts, "</body></html>\n"])


def _colour(expert: int) -> str:
    # The golden angle keeps the hues of neighbouring numbers apart.
    return f"hsl({expert * 137.508 % 360:.0f} 70% 45%)"


def _text(trace: RoutingTrace, layer: LayerTrace) -> str:
    spans = []
    for token, text in enumerate(trace.tokens):
        choices = strongest(layer, token)
        hint = escape(f"{token}: " + ", ".join(f"{one} {weight:.3f}" for one, weight in choices))
        colour = _colour(choices[0][0])
        # Line breaks of the text stay line breaks.
        visible = "".join("\n" if one == "\n" else shown(one) for one in text)
        spans.append(
            f'<span style="border-color: {colour}" title="{hint}">{escape(visible)}</span>'
        )
    return f"<pre>{''.join(spans)}</pre>"


def _heat_map(trace: RoutingTrace, layer: LayerTrace) -> str:
    totals: dict[int, float] = defaultdict(float)
    for experts, weights in zip(layer.experts, layer.weights, strict=True):
        for expert, weight in zip(experts, weights, strict=True):
            totals[expert] += weight
    # Small layers show unused experts too: an empty row is what a reader looks for.
    everyone = range(trace.num_experts) if trace.num_experts <= SHOWN_EXPERTS else totals
    kept = sorted(sorted(everyone, key=lambda one: -totals.get(one, 0.0))[:SHOWN_EXPERTS])
    rows = {expert: row for row, expert in enumerate(kept)}
    width, height = MARGIN + WIDTH * len(trace.tokens), HEIGHT * len(kept) + MARGIN
    left_out = len(set(totals) - set(rows))
    note = f"<figcaption>{left_out:,} less used experts are left out.</figcaption>"
    return "\n".join(
        [
            f'<figure><svg width="{width}" height="{height}" role="img">',
            *_labels(trace, rows),
            *_fields(trace, layer, rows),
            f"</svg>{note if left_out else ''}</figure>",
        ]
    )


def _labels(trace: RoutingTrace, rows: dict[int, int]) -> Iterator[str]:
    for expert, row in rows.items():
        yield f'<text x="2" y="{HEIGHT * (row + 1) - 2}">{expert}</text>'
    below = HEIGHT * len(rows) + 8
    for token, text in enumerate(trace.tokens):
        place = MARGIN + WIDTH * token + 6
        label = escape(shown(text)[:10])
        yield f'<text x="{place}" y="{below}" transform="rotate(60 {place} {below})">{label}</text>'


def _fields(trace: RoutingTrace, layer: LayerTrace, rows: dict[int, int]) -> Iterator[str]:
    # A single scale for a layer: PEER's weights are small, and relative ones are what matters.
    largest = max((max(weights) for weights in layer.weights), default=0.0) or 1.0
    for token, text in enumerate(trace.tokens):
        for expert, weight in strongest(layer, token):
            if expert not in rows:
                continue
            hint = escape(f"token {token} {shown(text)!r}, expert {expert}: {weight:.4f}")
            yield (
                f'<rect x="{MARGIN + WIDTH * token}" y="{HEIGHT * rows[expert]}" '
                f'width="{WIDTH - 1}" height="{HEIGHT - 1}" fill="#1f4e9c" '
                f'fill-opacity="{max(weight, 0.0) / largest:.3f}"><title>{hint}</title></rect>'
            )
