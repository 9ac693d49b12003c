"""Small inline SVG plots. Colours and strokes are classes of templates/report.css, so they follow light, dark and print.

Candidates differ by shape as well as colour: base is a ring, base with examples a square, with retrieval a diamond, the
champion a triangle, tuned a disc, tuned with retrieval a filled diamond, endpoints a cross, the references a tick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

Range = tuple[float, float]
WIDTH = 260.0
LANE = 13.0
PAD = 8.0
Values = Mapping[str, Mapping[str, float | None]]
"""Candidate -> value, low, high."""


def span(values: Values, bounds: Range | None = None) -> Range | None:
    """Smallest and largest number of all values and intervals, with a margin; null where there is none."""
    if bounds is not None:
        return bounds
    numbers = [n for v in values.values() for n in (v.get("value"), v.get("low"), v.get("high")) if n is not None]
    if not numbers:
        return None
    low, high = min(numbers), max(numbers)
    margin = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def strip(values: Values, label: str, bounds: Range | None = None) -> Markup:
    """One lane a candidate: a dot with its interval as a whisker."""
    scale = span(values, bounds)
    if scale is None:
        return Markup("")
    height = LANE * len(values) + 4
    parts: list[str] = [_frame(height)]
    for n, (name, value) in enumerate(values.items()):
        if value.get("value") is None:
            continue
        y = 2 + LANE * (n + 0.5)
        low, high = value.get("low"), value.get("high")
        if low is not None and high is not None and high > low:
            a, b = _x(low, scale), _x(high, scale)
            parts.append(f'<path class="whisker {name}" d="M{a:.1f} {y}H{b:.1f}M{a:.1f} {y - 3}v6M{b:.1f} {y - 3}v6"/>')
        parts.append(_mark(name, _x(float(value["value"] or 0.0), scale), y))
    return _svg(WIDTH, height, label, parts)


def shares(values: Mapping[str, float | None], label: str) -> Markup:
    """Shares from 0 to 1 on one line, a mark each."""
    y = 10.0
    parts = [f'<path class="axis" d="M{PAD} {y}H{WIDTH - PAD}"/>']
    parts += [f'<path class="axis" d="M{_x(tick, (0, 1)):.1f} {y - 4}v8"/>' for tick in (0, 0.5, 1)]
    parts += [_mark(name, _x(value, (0, 1)), y) for name, value in values.items() if value is not None]
    return _svg(WIDTH, 20, label, parts)


def key(name: str) -> Markup:
    """A candidate's mark, for legends."""
    return Markup(f'<svg class="key" viewBox="0 0 12 12" width="12" height="12" aria-hidden="true">{_mark(name, 6, 6)}</svg>')


def curve(
    points: Sequence[Mapping[str, float]], label: str, number: Any, name: str = "loss", scale: float = 1.0, digits: int = 2
) -> Markup:
    """A number of a training (line) and of its validations (dots and dashes) over steps; `number` writes an axis label with so
    many digits, of `scale` times the number."""
    width, height, left, bottom, top = 720.0, 250.0, 56.0, 28.0, 14.0
    train = [(p["step"], p[name] * scale) for p in points if name in p]
    validation = [(p["step"], p[f"eval_{name}"] * scale) for p in points if f"eval_{name}" in p]
    every = [*train, *validation]
    if not every:
        return Markup("")
    x_high = max(x for x, _ in every) or 1.0
    ticks = _ticks(min(y for _, y in every), max(y for _, y in every))
    low, high = ticks[0], ticks[-1]

    def at(point: tuple[float, float]) -> str:
        x = left + (width - left - 12) * point[0] / x_high
        return f"{x:.1f} {top + (height - top - bottom) * (1 - (point[1] - low) / ((high - low) or 1)):.1f}"

    parts: list[str] = []
    for tick in ticks:
        y = at((0, tick)).split()[1]
        parts.append(f'<path class="grid" d="M{left} {y}H{width - 12}"/>')
        parts.append(
            f'<text class="tick" x="{left - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{escape(number(tick, digits))}</text>'
        )
    for step in (0.0, x_high / 2, x_high):
        x = at((step, low)).split()[0]
        anchor = "end" if step == x_high else "middle"
        parts.append(f'<text class="tick" x="{x}" y="{height - 6}" text-anchor="{anchor}">{escape(number(step, 0))}</text>')
    if train:
        parts.append(f'<path class="loss" d="M{"L".join(at(point) for point in train)}"/>')
    if validation:
        parts.append(f'<path class="validation" d="M{"L".join(at(point) for point in validation)}"/>')
        circles = [at(point).split() for point in validation]
        parts += [f'<circle class="validation-dot" cx="{x}" cy="{y}" r="3.5"/>' for x, y in circles]
    return _svg(width, height, label, parts, "chart")


LETTER = 9.5
"""Width of a letter of a tick at the size it has on a phone."""


def history(
    values: Sequence[tuple[str, Mapping[str, float | None]]], label: str, number: Any, limits: Range | None = None
) -> Markup:
    """One dot with its interval for each version, from left to right, joined by a line; `number(value, more=…)` writes the ends
    of the scale, which stays within `limits`, with as many more digits as tell them apart."""
    scale = span(dict(values))
    if scale is None:
        return Markup("")
    scale = scale if limits is None else (max(scale[0], limits[0]), min(scale[1], limits[1]))
    ends = (scale[0], sum(scale) / 2, scale[1])
    written = [[number(end, more=more) for end in ends] for more in range(5)]
    told = next((texts for texts in written if len(set(texts)) == len(ends)), written[0])
    width, height, pad = 420.0, 130.0, 26.0
    left = max(96.0, 34 + LETTER * max(map(len, told)))
    step = (width - left - pad) / max(len(values) - 1, 1)
    low, high = scale
    most = max(1, int((width - left - pad) // 44))
    """Names that fit below."""

    def up(value: float) -> float:
        return 10 + (height - 36) * (1 - (value - low) / ((high - low) or 1))

    dots: list[str] = []
    for end, text in zip(ends, told, strict=True):
        dots.append(f'<path class="grid" d="M{left - 14} {up(end):.1f}H{width - 8}"/>')
        dots.append(f'<text class="tick" x="{left - 20}" y="{up(end) + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    points: list[str] = []
    for n, (version, value) in enumerate(values):
        x, found = left + step * n if len(values) > 1 else (left + width) / 2, value.get("value")
        if (len(values) - 1 - n) % -(-len(values) // most) == 0:
            name = escape(version.split("-")[0])
            dots.append(f'<text class="tick" x="{x:.1f}" y="{height - 6}" text-anchor="middle">{name}</text>')
        if found is None:
            continue
        points.append(f"{x:.1f} {up(found):.1f}")
        if value.get("low") is not None and value.get("high") is not None:
            dots.append(f'<path class="whisker tuned" d="M{x:.1f} {up(value["low"] or 0):.1f}V{up(value["high"] or 0):.1f}"/>')
        dots.append(_mark("tuned", x, up(found)))
    line = f'<path class="loss" d="M{"L".join(points)}"/>' if len(points) > 1 else ""
    return _svg(width, height, label, [line, *dots], "chart")


def _ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers around a range."""
    size = (high - low) or abs(high) or 1.0
    power = 10.0 ** len(str(int(size))) if size >= 1 else 1.0
    steps = [power * factor for factor in (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0005, 0.0002, 0.0001)]
    step = next((s for s in steps if size / s >= 3), steps[-1])
    first = int(low / step) if low >= 0 else int(low / step) - 1
    ticks = [round(first * step, 10)]
    while ticks[-1] < high:
        ticks.append(round(ticks[-1] + step, 10))
    return ticks


def _x(value: float, scale: Range) -> float:
    low, high = scale
    return PAD + (WIDTH - 2 * PAD) * min(1.0, max(0.0, (value - low) / ((high - low) or 1)))


def _frame(height: float) -> str:
    return f'<path class="axis" d="M{PAD} {height - 1}H{WIDTH - PAD}"/>'


def _mark(name: str, x: float, y: float) -> str:
    if name == "reference":
        return f'<path class="mark reference" d="M{x:.1f} {y - 5}v10"/>'
    if name == "few_shot":
        return f'<rect class="mark few_shot" x="{x - 3.6:.1f}" y="{y - 3.6:.1f}" width="7.2" height="7.2"/>'
    if name in ("rag", "tuned_rag"):
        return f'<path class="mark {name}" d="M{x:.1f} {y - 4.6:.1f}l4.6 4.6l-4.6 4.6l-4.6 -4.6z"/>'
    if name == "champion":
        return f'<path class="mark champion" d="M{x:.1f} {y - 4.4:.1f}l4.4 7.8h-8.8z"/>'
    if name not in ("base", "tuned"):
        return f'<path class="mark other" d="M{x - 3.6:.1f} {y - 3.6:.1f}l7.2 7.2m0 -7.2l-7.2 7.2"/>'
    return f'<circle class="mark {escape(name)}" cx="{x:.1f}" cy="{y:.1f}" r="{4.4 if name == "tuned" else 3.8}"/>'


def _svg(width: float, height: float, label: str, parts: Sequence[str], kind: str = "strip") -> Markup:
    return Markup(
        f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )
