"""Drawings: rectangles, lines, discs and words at places in points, written as SVG or as PNG.

SVG is plain text and needs nothing; PNG needs matplotlib, which nothing else here does. Both come out the same, byte by
byte, whenever they are made with the same versions: there are no dates in them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape

from glue.errors import GlueError
from glue.files import write_aside

FONT = "DejaVu Sans, Verdana, Arial, sans-serif"
WIDE = 0.62  # of its size that a letter takes on average; a little more than in truth, so that words have room
SHARP = 160  # dots in an inch of a PNG


@dataclass(frozen=True)
class Box:
    """A rectangle; `about` is shown by a browser when the pointer rests on it."""

    x: float
    y: float
    width: float
    height: float
    fill: str = "none"
    line: str = "none"
    thick: float = 1.0
    about: str = ""


@dataclass(frozen=True)
class Disc:
    """A circle around a point."""

    x: float
    y: float
    radius: float
    fill: str = "none"
    line: str = "none"
    thick: float = 1.0


@dataclass(frozen=True)
class Trace:
    """A line through points."""

    points: tuple[tuple[float, float], ...]
    line: str = "black"
    thick: float = 1.0
    dashed: bool = False


@dataclass(frozen=True)
class Words:
    """One line of text; y is its base line. `turned` counts degrees against the clock."""

    x: float
    y: float
    text: str
    size: float = 9.0
    fill: str = "black"
    anchor: Literal["start", "middle", "end"] = "start"
    turned: float = 0.0
    bold: bool = False


Shape = Box | Disc | Trace | Words


@dataclass(frozen=True)
class Drawing:
    """Shapes on a white page of this size in points; later ones lie over earlier ones."""

    width: float
    height: float
    shapes: Sequence[Shape]


def room(texts: Sequence[str], size: float) -> float:
    """Points that the longest of some texts takes."""
    return max((len(text) for text in texts), default=0) * size * WIDE


def check(file: Path) -> None:
    """Raise GlueError for an ending that is no kind of picture, and for a PNG without matplotlib."""
    if file.suffix.lower() not in (".svg", ".png"):
        raise GlueError(f"'{file.name}' says no kind of picture", fix="end it in .svg or .png")
    if file.suffix.lower() == ".png":
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError:
            raise GlueError("a PNG is drawn by matplotlib, which is not installed",
                            fix="pip install 'glue[plots]', or ask for an .svg, which needs nothing") from None


def save(drawing: Drawing, file: Path) -> None:
    """Write a drawing as its file's ending says. Raises GlueError as `check` does."""
    check(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_aside(file, svg(drawing) if file.suffix.lower() == ".svg" else png(drawing))


def svg(drawing: Drawing) -> str:
    """The drawing as SVG, with what is said about boxes as tooltips."""
    size = f"{_n(drawing.width)} {_n(drawing.height)}"
    wide, high = size.split()
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}pt" height="{high}pt" '
                      f'viewBox="0 0 {size}" font-family="{FONT}">',
                      f'<rect width="{wide}" height="{high}" fill="white"/>',
                      *(_element(shape) for shape in drawing.shapes), "</svg>", ""])


def _element(shape: Shape) -> str:
    match shape:
        case Box():
            place = f'x="{_n(shape.x)}" y="{_n(shape.y)}" width="{_n(shape.width)}" height="{_n(shape.height)}"'
            about = f"<title>{escape(shape.about)}</title>"
            return f"<rect {place} {_paint(shape)}" + (f">{about}</rect>" if shape.about else "/>")
        case Disc():
            return f'<circle cx="{_n(shape.x)}" cy="{_n(shape.y)}" r="{_n(shape.radius)}" {_paint(shape)}/>'
        case Trace():
            points = " ".join(f"{_n(x)},{_n(y)}" for x, y in shape.points)
            return (f'<polyline points="{points}" fill="none" stroke="{shape.line}" stroke-width="{_n(shape.thick)}"'
                    + (' stroke-dasharray="3 2"/>' if shape.dashed else "/>"))
        case Words():
            turn = f' transform="rotate({_n(-shape.turned)} {_n(shape.x)} {_n(shape.y)})"' if shape.turned else ""
            bold = ' font-weight="bold"' if shape.bold else ""
            return (f'<text x="{_n(shape.x)}" y="{_n(shape.y)}" font-size="{_n(shape.size)}" fill="{shape.fill}" '
                    f'text-anchor="{shape.anchor}"{bold}{turn}>{escape(shape.text)}</text>')


def _paint(shape: Box | Disc) -> str:
    line = f' stroke="{shape.line}" stroke-width="{_n(shape.thick)}"' if shape.line != "none" else ""
    return f'fill="{shape.fill}"{line}'


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def png(drawing: Drawing) -> bytes:
    """The drawing as PNG; needs matplotlib, see `check`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(drawing.width / 72, drawing.height / 72), dpi=SHARP, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, drawing.width)
    axes.set_ylim(drawing.height, 0)
    for order, artist in enumerate(map(_artist, drawing.shapes)):
        artist.set_zorder(order)  # else matplotlib draws all lines over all boxes
        axes.add_artist(artist)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=SHARP, metadata={"Software": None})
    return stream.getvalue()


def _artist(shape: Shape):
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle, Rectangle
    from matplotlib.text import Text

    match shape:
        case Box():
            return Rectangle((shape.x, shape.y), shape.width, shape.height, facecolor=shape.fill, edgecolor=shape.line,
                             linewidth=shape.thick)
        case Disc():
            return Circle((shape.x, shape.y), shape.radius, facecolor=shape.fill, edgecolor=shape.line,
                          linewidth=shape.thick)
        case Trace():
            x, y = zip(*shape.points, strict=True)
            return Line2D(x, y, color=shape.line, linewidth=shape.thick, linestyle=(0, (3, 2)) if shape.dashed else "-")
        case Words():
            sides = {"start": "left", "middle": "center", "end": "right"}
            return Text(shape.x, shape.y, shape.text.replace("$", r"\$"), fontsize=shape.size, color=shape.fill,
                        family="DejaVu Sans", ha=sides[shape.anchor], va="baseline", rotation=shape.turned,
                        rotation_mode="anchor", weight="bold" if shape.bold else "normal")


def blend(stops: Sequence[tuple[float, str]], value: float) -> str:
    """The colour at a place between stops, each a place and a colour #rrggbb; places ascend."""
    value = min(max(value, stops[0][0]), stops[-1][0])
    for (low, one), (high, other) in zip(stops, stops[1:], strict=False):
        if value <= high:
            share = (value - low) / (high - low)
            parts = [round(a + (b - a) * share) for a, b in zip(_parts(one), _parts(other), strict=True)]
            return "#" + "".join(f"{part:02x}" for part in parts)
    return stops[-1][1]


def _parts(colour: str) -> Iterator[int]:
    return (int(colour[k:k + 2], 16) for k in (1, 3, 5))
