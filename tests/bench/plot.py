"""Plots as plain SVG, without a library: lines on logarithmic axes, and bars. Pure: values in, text out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 760, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 190, 50, 64
_COLOURS = ("#0b5fa5", "#c2571a", "#3b7d3b", "#7a4fa3")
_STYLE = "font-family='Helvetica, Arial, sans-serif' fill='#222'"
_BAR, _GAP = 22, 14


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a plot: points (x, y), both above 0; `least` are the minima at the same x, drawn as small marks."""

    name: str
    points: tuple[tuple[float, float], ...]
    least: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: what it is, how long, and what is written behind it."""

    name: str
    value: float
    text: str


def line_plot(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    x_text: Callable[[float], str],
) -> str:
    """An SVG with both axes logarithmic.

    Args:
        title: Above it.
        lines: At least one point in all.
        x_label: With the unit.
        y_label: With the unit.
        x_text: What stands below a value of x; each value that occurs is marked.
    """
    used = [point for line in lines for point in (*line.points, *line.least)]
    xs = sorted({x for x, _ in used})
    x_scale = _scale(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    ticks = _ticks(min(y for _, y in used), max(y for _, y in used))
    y_scale = _scale(ticks[0], ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    body = [_text(_LEFT, 26, title, size=16, weight="bold")]
    for tick in ticks:
        y = y_scale(tick)
        body += [f"<line x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}' stroke='#ddd'/>"]
        body += [_text(_LEFT - 8, y + 4, f"{tick:,.10g}", anchor="end")]
    for value in xs:
        x = x_scale(value)
        body += [f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{_TOP}' y2='{_HEIGHT - _BOTTOM}' stroke='#eee'/>"]
        body += [_text(x, _HEIGHT - _BOTTOM + 18, x_text(value), anchor="middle")]
    body += [
        f"<path d='M{_LEFT},{_TOP} V{_HEIGHT - _BOTTOM} H{_WIDTH - _RIGHT}' fill='none' stroke='#222'/>",
        _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 16, x_label, anchor="middle"),
        _text(20, (_TOP + _HEIGHT - _BOTTOM) / 2, y_label, anchor="middle", turn=-90),
    ]
    for number, line in enumerate(lines):
        colour = _COLOURS[number % len(_COLOURS)]
        places = [(x_scale(x), y_scale(y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        body += [f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'/>"]
        body += [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' fill='{colour}'/>" for x, y in places]
        for x, y in line.least:
            body += [f"<circle cx='{x_scale(x):.1f}' cy='{y_scale(y):.1f}' r='3' fill='none' stroke='{colour}'/>"]
        key_y = _TOP + 12 + 22 * number
        body += [f"<circle cx='{_WIDTH - _RIGHT + 18}' cy='{key_y - 4}' r='4' fill='{colour}'/>"]
        body += [_text(_WIDTH - _RIGHT + 28, key_y, line.name)]
    if any(line.least for line in lines):
        key_y = _TOP + 12 + 22 * len(lines)
        body += [f"<circle cx='{_WIDTH - _RIGHT + 18}' cy='{key_y - 4}' r='3' fill='none' stroke='#222'/>"]
        body += [_text(_WIDTH - _RIGHT + 28, key_y, "the minimum of each")]
    return _svg(_HEIGHT, title, body)


def bar_plot(title: str, bars: Sequence[Bar], *, x_label: str) -> str:
    """An SVG of horizontal bars on a linear axis that begins at 0; at least one bar."""
    left, most = 150, max(bar.value for bar in bars)
    width = _WIDTH - left - 300
    height = _TOP + len(bars) * (_BAR + _GAP) + 60
    body = [_text(20, 26, title, size=16, weight="bold")]
    for number, bar in enumerate(bars):
        y = _TOP + number * (_BAR + _GAP)
        long = max(1.0, width * bar.value / most)
        colour = _COLOURS[0] if number == 0 else "#8aa9c4"
        body += [f"<rect x='{left}' y='{y}' width='{long:.1f}' height='{_BAR}' fill='{colour}'/>"]
        body += [_text(left - 8, y + 16, bar.name, anchor="end"), _text(left + long + 8, y + 16, bar.text)]
    bottom = height - 50
    body += [f"<path d='M{left},{_TOP - 6} V{bottom} H{left + width}' fill='none' stroke='#222'/>"]
    body += [_text(left, bottom + 16, "0"), _text(left + width / 2, bottom + 38, x_label, anchor="middle")]
    body += [_text(left + width, bottom + 16, f"{most:.3g}", anchor="end")]
    return _svg(height, title, body)


def _svg(height: int, title: str, body: Sequence[str]) -> str:
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {height}' role='img'>"
    ground = f"<rect width='{_WIDTH}' height='{height}' fill='#fff'/>"
    return "\n".join([head, f"<title>{escape(title)}</title>", ground, *body, "</svg>"]) + "\n"


def _text(
    x: float, y: float, text: str, *, size: int = 13, weight: str = "normal", anchor: str = "start", turn: int = 0
) -> str:
    turned = f" transform='rotate({turn} {x:.1f} {y:.1f})'" if turn else ""
    place = f"x='{x:.1f}' y='{y:.1f}' font-size='{size}' font-weight='{weight}' text-anchor='{anchor}'"
    return f"<text {place}{turned} {_STYLE}>{escape(text)}</text>"


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """From a value to a place, logarithmic; one value alone lies in the middle."""
    if low == high:
        return lambda _value: (start + end) / 2
    span = math.log(high / low)
    return lambda value: start + (end - start) * math.log(value / low) / span


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that enclose the values; powers alone where that would be many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 2 else (1,)
    all_of_them = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    begin = max(index for index, tick in enumerate(all_of_them) if tick <= low * 1.000001)
    end = next((index for index, tick in enumerate(all_of_them) if tick >= high * 0.999999), len(all_of_them) - 1)
    return all_of_them[begin : max(end, begin + 1) + 1]
