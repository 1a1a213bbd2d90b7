"""Templates to pages. Everything that is shown goes through autoescaping: captions and keys are untrusted."""

from __future__ import annotations

from typing import Any

import jinja2

NARROW = "\u202f"  # thin space that does not break, between groups of digits and before units


def render(template: str, **values: Any) -> str:
    """A self-contained HTML page from a file in ``templates/``. A ? is what UTF-8 has no code for, as in odd paths."""
    return _ENVIRONMENT.get_template(template).render(**values).encode("utf-8", "replace").decode("utf-8")


def thousands(value: float) -> str:
    """``1,234,567``"""
    return f"{value:,.0f}"


def short(value: float) -> str:
    """``950``, ``12.3 k``, ``1.24 M``, ``6.1 G``: three figures and a unit."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{NARROW}{unit}"
    return f"{value:.3g}"


def percent(value: float, digits: int = 1) -> str:
    """``61.3 %`` of a share."""
    return f"{100 * value:.{digits}f}{NARROW}%"


def duration(seconds: float) -> str:
    """``41 s``, ``11 min``, ``2 h 05 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def milliseconds(seconds: float) -> str:
    """``0.21 ms``, ``17.1 ms``, ``1,500 ms``."""
    value = 1e3 * seconds
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def counted(number: int, noun: str) -> str:
    """``1 picture``, ``1,234 pictures``."""
    return f"{thousands(number)} {noun}{'' if number == 1 else 's'}"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mm.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "thousands": thousands,
        "short": short,
        "percent": percent,
        "duration": duration,
        "counted": counted,
    }
    return environment


_ENVIRONMENT = _environment()
