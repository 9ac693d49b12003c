"""Small pictures for asset pages: SVG as a data URL in Markdown, which the UI shows and which needs no file or server."""

import base64
import html
from collections.abc import Sequence
from typing import Any

INK, BAR, GRID = "#4b5563", "#0f766e", "#d1d5db"
FONT = "font-family='system-ui,sans-serif' font-size='12'"


def _image(svg: str, text: str) -> str:
    return f"![{text}](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})"


def funnel_plot(steps: Sequence[dict[str, Any]]) -> str:
    """What is left after each rule, as bars. `steps`: step, dropped, left; the first one is what was read."""
    total = max((step["left"] for step in steps), default=0) or 1
    rows: list[str] = []
    for index, step in enumerate(steps):
        y, width = 8 + index * 24, 360 * step["left"] / total
        sign, moved = ("−", step["dropped"]) if step["dropped"] > 0 else ("+", -step["dropped"])
        note = f"{step['left']:,}" + (f"  ({sign}{moved:,})" if moved else "")
        rows.append(
            f"<text x='182' y='{y + 13}' text-anchor='end' fill='{INK}'>{html.escape(str(step['step']).replace('_', ' '))}</text>"
            f"<rect x='190' y='{y}' width='{width:.1f}' height='17' rx='2' fill='{BAR}'/>"
            f"<text x='{196 + width:.1f}' y='{y + 13}' fill='{INK}'>{note}</text>"
        )
    height = 16 + 24 * len(steps)
    return _image(
        f"<svg xmlns='http://www.w3.org/2000/svg' width='680' height='{height}' {FONT}>{''.join(rows)}</svg>", "data funnel"
    )


COLOURS = ("#0f766e", "#b45309", "#6d28d9", "#be123c", "#0369a1", "#4d7c0f", "#9ca3af")


def stacked_plot(columns: dict[str, dict[str, int]], what: str) -> str:
    """Bars over the weeks, divided by a value. `columns`: week to value to rows; every week has the same values."""
    if not columns:
        return "(nothing yet)"
    names = list(next(iter(columns.values())))
    most = max(sum(parts.values()) for parts in columns.values()) or 1
    step = min(48.0, 560 / len(columns))
    parts = [
        f"<line x1='50' y1='{y}' x2='610' y2='{y}' stroke='{GRID}'/>"
        f"<text x='44' y='{y + 4}' text-anchor='end' fill='{INK}'>{value:,.0f}</text>"
        for y, value in ((14, most), (99, most / 2), (184, 0))
    ]
    every = -(-len(columns) // 8)
    for place, (week, values) in enumerate(columns.items()):
        x, y = 52 + place * step, 184.0
        for name, colour in zip(names, COLOURS, strict=False):
            height = 170 * values[name] / most
            y -= height
            if height:
                title = f"<title>{html.escape(week)}: {html.escape(name)} {values[name]:,}</title>"
                size = f"width='{step * 0.82:.1f}' height='{height:.1f}'"
                parts.append(f"<rect x='{x:.1f}' y='{y:.1f}' {size} fill='{colour}'>{title}</rect>")
        if place % every == 0:
            parts.append(f"<text x='{x:.1f}' y='200' font-size='10' fill='{INK}'>{html.escape(week)}</text>")
    for place, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        x, y = 54 + 190 * (place % 3), 222 + 18 * (place // 3)
        total = sum(values[name] for values in columns.values())
        text = f"● {html.escape(name)}  {total:,}"
        parts.append(f"<text x='{x}' y='{y}' fill='{colour}'>{text}</text>")
    height = 230 + 18 * ((len(names) - 1) // 3)
    svg = f"<svg xmlns='http://www.w3.org/2000/svg' width='640' height='{height}' {FONT}>{''.join(parts)}</svg>"
    return _image(svg, f"rows by {what} over the weeks")


def curve_plot(series: dict[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> str:
    """Lines over a common x axis, e.g. training and validation loss over steps; at most four series."""
    points = [point for line in series.values() for point in line]
    if not points:
        return "(no points yet)"
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    span_x, span_y = (right - left) or 1.0, (high - low) or 1.0

    def place(x: float, y: float) -> str:
        return f"{50 + 560 * (x - left) / span_x:.1f},{14 + 190 * (1 - (y - low) / span_y):.1f}"

    parts = [
        f"<line x1='50' y1='{y}' x2='610' y2='{y}' stroke='{GRID}'/>"
        f"<text x='44' y='{y + 4}' text-anchor='end' fill='{INK}'>{value:.2f}</text>"
        for y, value in ((14, high), (109, (high + low) / 2), (204, low))
    ]
    for (name, line), colour in zip(series.items(), (BAR, "#b45309", "#6d28d9", "#be123c"), strict=False):
        path = " ".join(place(x, y) for x, y in line)
        dots = (
            ""
            if len(line) > 12
            else "".join(f"<circle cx='{p.split(',')[0]}' cy='{p.split(',')[1]}' r='3' fill='{colour}'/>" for p in path.split())
        )
        index = list(series).index(name)
        legend = f"<text x='{60 + 150 * index}' y='246' fill='{colour}'>● {html.escape(name)}</text>"
        parts.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='1.8'/>{dots}{legend}")
    parts.append(
        f"<text x='610' y='222' text-anchor='end' fill='{INK}'>{html.escape(x_label)} {left:,.0f} to {right:,.0f}</text>"
    )
    svg = f"<svg xmlns='http://www.w3.org/2000/svg' width='640' height='256' {FONT}>{''.join(parts)}</svg>"
    return _image(svg, f"{y_label} over {x_label}")
