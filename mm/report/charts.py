"""Charts as numbers: everything in percent of the frame, so that the page scales them and text keeps its size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mm.report.page import percent

Point = tuple[float, float]

STEEP = 1.6
"""The frame ends at this many times the highest value of the later nine tenths of a curve: the start is off the chart
where it would flatten all the rest."""


class Tick(NamedTuple):
    """Where a tick is, in percent of the frame from the left or the top, and what stands there."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """points: of the frame, in percent from the left and from the top; `last` is what the line ends with."""

    label: str
    points: tuple[Point, ...]
    last: float

    @property
    def path(self) -> str:
        """The ``points`` of an SVG polyline."""
        return " ".join(f"{x:.2f},{y:.2f}" for x, y in self.points)


@dataclass(frozen=True)
class Chart:
    """`above`: number of points that lie beyond the top of the frame."""

    lines: tuple[Line, ...]
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    above: int


def line_chart(series: Mapping[str, Sequence[Point]]) -> Chart:
    """A chart of curves; those without a point are left out.

    Raises:
        ValueError: no curve has a point.
    """
    curves = {label: list(points) for label, points in series.items() if points}
    if not curves:
        raise ValueError("a chart needs at least one point")
    right = max(points[-1][0] for points in curves.values())
    settled = [y for points in curves.values() for _, y in points[len(points) // 10 :]]
    everything = [y for points in curves.values() for _, y in points]
    low, high = min(everything), min(max(everything), max(settled) + (STEEP - 1) * abs(max(settled)))
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - margin, high + margin

    def place(point: Point) -> Point:
        return 100 * point[0] / right, 100 * (high - point[1]) / (high - low)

    lines = tuple(Line(label, tuple(map(place, points)), points[-1][1]) for label, points in curves.items())
    x = tuple(Tick(100 * value / right, f"{value:,.0f}") for value in ticks(0, right) if value == int(value))
    y = tuple(Tick(100 * (high - value) / (high - low), f"{value:.6g}") for value in ticks(low, high))
    return Chart(lines, x, y, sum(y > high for y in everything))


@dataclass(frozen=True)
class Area:
    """A layer of a stack: corners of its polygon, in percent of the frame."""

    label: str
    points: tuple[Point, ...]

    @property
    def path(self) -> str:
        """The ``points`` of an SVG polygon."""
        return " ".join(f"{x:.2f},{y:.2f}" for x, y in self.points)


@dataclass(frozen=True)
class Stack:
    areas: tuple[Area, ...]
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]


def share_stack(steps: Sequence[int], shares: Mapping[str, Sequence[float]]) -> Stack:
    """Shares over steps, the first at the bottom. What is reported at a step holds since the report before.

    Args:
        steps: ascending; shares: as many of each kind, which add up to 1.
    """
    edges = [100 * step / steps[-1] for step in (0, *steps)]
    base = [0.0] * len(steps)
    areas = []
    for label, layer in shares.items():
        top = [low + share for low, share in zip(base, layer, strict=True)]
        upper, lower = (
            [(x, 100 * (1 - height)) for n, height in enumerate(heights) for x in edges[n : n + 2]]
            for heights in (top, base)
        )
        areas.append(Area(label, (*upper, *reversed(lower))))
        base = top
    return Stack(
        tuple(areas),
        tuple(Tick(100 * value / steps[-1], f"{value:,.0f}") for value in ticks(0, steps[-1]) if value == int(value)),
        tuple(Tick(100 * (1 - share), percent(share, 0)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)),
    )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, some five of them: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    size = 10 ** math.floor(math.log10(rough))
    step = min((factor * size for factor in (1, 2, 5, 10)), key=lambda step: abs(step - rough))
    return [round(number * step, 12) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


@dataclass(frozen=True)
class Bar:
    """A share with its interval, if there is one, and what uniform guesses would reach; `kind` decides the colour."""

    label: str
    value: float
    interval: tuple[float, float] | None
    chance: float
    kind: str
    note: str = ""
