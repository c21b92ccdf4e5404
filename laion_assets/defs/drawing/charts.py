"""Small charts as SVG: bars from requested to kept, and the distribution of similarities.

A chart is a few kilobytes of text, sharp at any size.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from laion_assets.io.arrays import Floats
from laion_assets.io.text import count as counted

WIDTH = 900
BINS = 40
COLOURS = ("#4f6bed", "#e08a3c", "#3a9d6e", "#a04fb5")
_MINUS = "\N{MINUS SIGN}"
_FONT = "font-family='system-ui,sans-serif' font-size='13'"
_INK, _PALE, _LOST, _AXIS = "#1f1d1a", "#7d7972", "#d9d5cc", "#c9c5bc"
_BAR, _GAP, _LEFT, _RIGHT = 22, 8, 180, 150
_PLOT_HEIGHT = 170


class Step(NamedTuple):
    """A step of a funnel: the number of images that remain after it or are lost in it."""

    name: str
    images: int
    lost: bool = False


def funnel(steps: Sequence[Step]) -> str:
    """Draw the number of images after each step, and the losses between them."""
    most = max((step.images for step in steps), default=0) or 1
    scale = (WIDTH - _LEFT - _RIGHT) / most
    left = 0
    parts: list[str] = []
    for number, (name, count, lost) in enumerate(steps):
        left = left - count if lost else count
        start = _LEFT + (left if lost else 0) * scale
        middle = number * (_BAR + _GAP) + _GAP + _BAR / 2
        end = start + max(count * scale, 1)
        parts += [
            _text(_LEFT - 12, middle, name, "end", _PALE if lost else _INK),
            f"<rect x='{start:.1f}' y='{middle - _BAR / 2:.1f}' width='{end - start:.1f}' "
            f"height='{_BAR}' rx='3' fill='{_LOST if lost else COLOURS[0]}'/>",
            _text(end + 10, middle, f"{_MINUS if lost and count else ''}{count:,} ({count / most:.0%})"),
        ]
    return _svg(len(steps) * (_BAR + _GAP) + 2 * _GAP, parts)


def histogram(similarities: Mapping[str, Floats]) -> str:
    """Draw the distribution of each strategy's similarities, as shares of its images.

    Args:
        similarities: similarities of each strategy, shape (n,); empty ones are left out.

    """
    there = {name: values for name, values in similarities.items() if len(values)}
    if not there:
        return _svg(40, [_text(WIDTH / 2, 20, "no images", "middle", _PALE)])
    low = min(float(values.min()) for values in there.values())
    high = max(float(values.max()) for values in there.values())
    edges = np.linspace(low, high if high > low else low + 1e-3, BINS + 1)
    shares = {name: np.histogram(v, edges)[0] / len(v) for name, v in there.items()}
    tallest = max(float(share.max()) for share in shares.values())
    x = np.linspace(50, WIDTH - 30, BINS + 1)
    bottom = _PLOT_HEIGHT + 34
    parts = [f"<path d='M50 {bottom}H{WIDTH - 30}' stroke='{_AXIS}'/>"]
    for number, (name, share) in enumerate(shares.items()):
        y = bottom - _PLOT_HEIGHT * share / tallest
        outline = "".join(f"L{a:.0f} {v:.1f}H{b:.0f}" for a, b, v in zip(x, x[1:], y, strict=False))
        colour = COLOURS[number % len(COLOURS)]
        parts.append(
            f"<path d='M{x[0]:.0f} {bottom}{outline}L{x[-1]:.0f} {bottom}Z' fill='{colour}' "
            f"fill-opacity='.28' stroke='{colour}' stroke-width='1.5'/>"
        )
        middle = float(np.median(there[name]))
        label = f"{name}: {counted(len(there[name]), 'image')}, median {middle:.2f}"
        parts.append(
            f"<rect x='{50 + 410 * number}' y='6' width='12' height='12' rx='2' fill='{colour}'/>"
        )
        parts.append(_text(68 + 410 * number, 12, label))
    for place in range(0, BINS + 1, BINS // 5):
        parts.append(_text(x[place], bottom + 14, f"{edges[place]:.2f}", "middle", _PALE))
    parts.append(_text(WIDTH / 2, bottom + 34, "similarity to the query", "middle", _PALE))
    return _svg(bottom + 46, parts)


def recall_curves(shares: Mapping[str, Mapping[str, float]]) -> str:
    """Draw recall against the number of probed lists, with one curve per number of results.

    Args:
        shares: recall, by nprobe and then by number of results.

    """
    if not shares:
        return _svg(40, [_text(WIDTH / 2, 20, "every search compares all rows", "middle", _PALE)])
    nprobes = sorted(shares, key=int)
    x = np.linspace(70, WIDTH - 160, max(len(nprobes), 2))[: len(nprobes)]
    top, bottom = 20, _PLOT_HEIGHT + 20
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = bottom - (bottom - top) * share
        parts.append(f"<path d='M60 {y:.0f}H{WIDTH - 150}' stroke='{_AXIS}'/>")
        parts.append(_text(52, y, f"{share:.0%}", "end", _PALE))
    parts += [_text(place, bottom + 16, n, "middle", _PALE) for place, n in zip(x, nprobes, strict=True)]
    parts.append(_text(WIDTH / 2 - 45, bottom + 36, "inverted lists probed", "middle", _PALE))
    for number, count in enumerate(shares[nprobes[-1]]):
        colour = COLOURS[number % len(COLOURS)]
        heights = [bottom - (bottom - top) * shares[n].get(count, 0) for n in nprobes]
        points = " ".join(f"{a:.0f},{b:.1f}" for a, b in zip(x, heights, strict=True))
        parts.append(f"<polyline points='{points}' fill='none' stroke='{colour}' stroke-width='2'/>")
        parts += [
            f"<circle cx='{a:.0f}' cy='{b:.1f}' r='3' fill='{colour}'/>"
            for a, b in zip(x, heights, strict=True)
        ]
        label = f"recall@{int(count):,}: {shares[nprobes[-1]][count]:.0%}"
        parts.append(
            f"<rect x='{WIDTH - 140}' y='{14 + 22 * number}' width='12' height='12' rx='2' "
            f"fill='{colour}'/>"
        )
        parts.append(_text(WIDTH - 122, 20 + 22 * number, label))
    return _svg(bottom + 48, parts)


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = _INK) -> str:
    return (
        f"<text x='{x:.0f}' y='{y + 4.5:.0f}' text-anchor='{anchor}' fill='{colour}'>"
        f"{html.escape(text)}</text>"
    )


def _svg(height: float, parts: Sequence[str]) -> str:
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{height:.0f}' "
        f"viewBox='0 0 {WIDTH} {height:.0f}' {_FONT}><rect width='100%' height='100%' fill='#fff'/>"
        + "".join(parts)
        + "</svg>"
    )
