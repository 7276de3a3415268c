"""Small charts as SVG text: nothing to install, sharp at any size, and the page stays one file."""

import math
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 540, 300
LEFT, RIGHT, TOP, BOTTOM = 72, 14, 14, 42  # LEFT: a tick of six figures beside the turned label
MAX_POINTS = 400


@dataclass
class Series:
    """One curve: name, x and y (same length), and the CSS class that colours it."""

    name: str
    x: np.ndarray
    y: np.ndarray
    style: str


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Running mean over ``window`` values, shorter at the start."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def line_chart(series: list[Series], x_label: str, y_label: str) -> str:
    """Curves over a shared x axis: raw values faint, their running mean on top."""
    shown = [s for s in series if len(s.x) > 1 and np.isfinite(s.y).all()]
    if not shown:
        return ""
    means = [smoothed(s.y, max(1, len(s.y) // 25)) for s in shown]
    first, last = min(s.x.min() for s in shown), max(s.x.max() for s in shown)
    # the first few values dwarf the rest: the axis shows the range after them
    settled = np.concatenate([s.y[max(1, len(s.y) // 50) :] for s in shown])
    low, high = np.quantile(settled, [0.002, 0.99])
    y_ticks = ticks(float(low), float(high))
    x_ticks = [tick for tick in ticks(first, last) if first <= tick <= last]
    x_of = scale(first, last, LEFT, WIDTH - RIGHT)
    y_of = scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    body = [_grid(x_ticks, y_ticks, x_of, y_of, x_label, y_label), '<g clip-path="url(#plot)">']
    for s in shown:
        body.append(f'<path class="raw {s.style}" d="{_path(s.x, s.y, x_of, y_of)}"/>')
    for s, mean in zip(shown, means, strict=True):
        body.append(f'<path class="mean {s.style}" d="{_path(s.x, mean, x_of, y_of)}"/>')
    body.append("</g>")
    box = f'x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"'
    clip = f'<defs><clipPath id="plot"><rect {box}/></clipPath></defs>'
    return _svg(HEIGHT, [clip, *body], f"{y_label} over {x_label}")


def interval_chart(rows: list[tuple[str, float, float, str]], label: str) -> str:
    """A dot with a bar a row: (name, value, half width of its 95 % interval, CSS class)."""
    row_height, left = 34, 190
    height = TOP + row_height * len(rows) + BOTTOM
    edges = [v for _, value, half, _ in rows for v in (value - half, value + half)]
    x_ticks = ticks(min(0.0, *edges), max(edges))
    x_of = scale(x_ticks[0], x_ticks[-1], left, WIDTH - 70)
    bottom = TOP + row_height * len(rows)
    body = []
    for tick in x_ticks:
        x = x_of(tick)
        body.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        body.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{number(tick)}</text>')
    for row, (name, value, half, style) in enumerate(rows):
        y = TOP + row_height * (row + 0.5)
        body.append(f'<text class="name" x="{left - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        start, end = x_of(value - half), x_of(value + half)
        body.append(f'<line class="bar {style}" x1="{start:.1f}" x2="{end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<circle class="dot {style}" cx="{x_of(value):.1f}" cy="{y:.1f}" r="5.5"/>')
        body.append(f'<text class="value" x="{max(end, x_of(value)) + 12:.1f}" y="{y + 4:.1f}">{value:.2f}</text>')
    middle = (left + WIDTH - 70) / 2
    body.append(f'<text class="label" x="{middle:.0f}" y="{height - 4}" text-anchor="middle">{escape(label)}</text>')
    return _svg(height, body, label)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that enclose the range."""
    if not high > low:
        low, high = low - 0.5, low + 0.5
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def number(value: float) -> str:
    """A tick's text: 12k rather than 12000."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:.6g}"


def scale(low: float, high: float, start: float, end: float):
    """The linear map that takes [low, high] to [start, end]."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _path(x: np.ndarray, y: np.ndarray, x_of, y_of) -> str:
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), MAX_POINTS)).round().astype(int))
    return "M" + "L".join(f"{x_of(x[i]):.1f},{y_of(y[i]):.1f}" for i in kept)


def _grid(x_ticks, y_ticks, x_of, y_of, x_label: str, y_label: str) -> str:
    bottom, parts = HEIGHT - BOTTOM, []
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks:
        x = x_of(tick)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{number(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle:.0f}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f'transform="translate(12 {(TOP + bottom) / 2:.0f}) rotate(-90)"'
    parts.append(f'<text class="label" {turned} text-anchor="middle">{escape(y_label)}</text>')
    return "".join(parts)


def _svg(height: float, body: list[str], title: str) -> str:
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
    return head + "".join(body) + "</svg>"
