"""A self-contained report.html: tables, curves and playable videos in one file that needs no network.

Everything that came from outside (captions, names) is escaped by the template engine.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from nd_jax.outputs import new_file

MOST_PANELS = 3
"""Side by side in one picture."""


@dataclass(frozen=True)
class Table:
    """Rows under named columns."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Gallery:
    """Videos (mp4 paths) side by side: one row per caption, one column per system."""

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Path | None]]]
    note: str = ""
    kind: str = field(default="gallery", init=False)

    @property
    def sources(self) -> list[tuple[str, list[str | None]]]:
        return [
            (caption, [data_uri(path, "video/mp4") if path else None for path in paths]) for caption, paths in self.rows
        ]


@dataclass(frozen=True)
class Curves:
    """Panels of lines, each ``{label: (xs, ys)}``, drawn as one picture."""

    title: str
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]
    x_label: str = "step"
    linear: frozenset[str] = frozenset()
    """Panels whose y axis is not logarithmic."""
    note: str = ""
    kind: str = field(default="picture", init=False)

    @property
    def picture(self) -> str:
        columns = min(len(self.panels), MOST_PANELS)
        rows = -(-len(self.panels) // columns)
        figure = Figure(figsize=(5.2 * columns, 3.2 * rows))
        for place, (name, lines) in enumerate(self.panels.items(), start=1):
            axis = figure.add_subplot(rows, columns, place)
            for label, (xs, ys) in lines.items():
                axis.plot(xs, ys, label=label, linewidth=1.4, marker="o" if len(xs) == 1 else None)
            axis.set(title=name, xlabel=self.x_label)
            if name not in self.linear:
                axis.set_yscale("log")
            axis.grid(alpha=0.25)
            if lines:
                axis.legend(frameon=False, fontsize=8)
        return svg_uri(figure, self.title)


@dataclass(frozen=True)
class Bars:
    """Grouped bars, ``{group: {label: height}}``, e.g. importance of every block for both kinds of token."""

    title: str
    groups: Mapping[str, Mapping[str, float]]
    x_label: str
    y_label: str
    note: str = ""
    kind: str = field(default="picture", init=False)

    @property
    def picture(self) -> str:
        figure = Figure(figsize=(7, 3))
        axis = figure.subplots()
        width = 0.8 / len(self.groups)
        for number, (group, bars) in enumerate(self.groups.items()):
            positions = [index + number * width for index in range(len(bars))]
            axis.bar(positions, list(bars.values()), width, label=group)
        labels = list(next(iter(self.groups.values())))
        axis.set_xticks([index + 0.4 - width / 2 for index in range(len(labels))], labels)
        axis.set(xlabel=self.x_label, ylabel=self.y_label)
        axis.legend(frameon=False, fontsize=8)
        return svg_uri(figure, self.title)


@dataclass(frozen=True)
class HeatMap:
    """A matrix as colours; what is not finite stays blank. ``signed``: 0 in the middle of the colours."""

    title: str
    values: np.ndarray
    rows: Sequence[object]
    columns: Sequence[object]
    x_label: str
    note: str = ""
    signed: bool = False
    kind: str = field(default="picture", init=False)

    @property
    def picture(self) -> str:
        height, width = self.values.shape
        figure = Figure(figsize=(2.5 + 0.32 * width, 1.2 + 0.32 * height))
        axis = figure.subplots()
        limit = float(np.nanmax(np.abs(self.values), initial=0.0)) or 1.0
        options = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if self.signed else {"cmap": "viridis"}
        image = axis.imshow(np.ma.masked_invalid(self.values), aspect="auto", interpolation="nearest", **options)
        axis.set_xticks(range(width), [str(name) for name in self.columns], fontsize=8)
        axis.set_yticks(range(height), [str(name) for name in self.rows], fontsize=8)
        axis.set(xlabel=self.x_label)
        figure.colorbar(image)
        return svg_uri(figure, self.title)


@dataclass(frozen=True)
class Points:
    """Groups of points, ``{label: [(x, y)]}``; those named in ``joined`` with a line. The y axis is logarithmic."""

    title: str
    groups: Mapping[str, Sequence[tuple[float, float]]]
    x_label: str
    y_label: str
    joined: frozenset[str] | set[str] = frozenset()
    note: str = ""
    kind: str = field(default="picture", init=False)

    @property
    def picture(self) -> str:
        figure = Figure(figsize=(7, 4))
        axis = figure.subplots()
        for order, (label, points) in enumerate(self.groups.items()):
            xs, ys = zip(*points, strict=True) if points else ((), ())
            size = 3 if order == 0 else 6
            axis.plot(xs, ys, "o-" if label in self.joined else "o", label=label, markersize=size, linewidth=1)
        axis.set(xlabel=self.x_label, ylabel=self.y_label, yscale="log")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
        return svg_uri(figure, self.title)


@dataclass(frozen=True)
class Pictures:
    """PNG files with a caption each."""

    title: str
    pictures: Sequence[tuple[str, Path]]
    note: str = ""
    kind: str = field(default="pictures", init=False)

    @property
    def sources(self) -> list[tuple[str, str]]:
        return [(caption, data_uri(path, "image/png")) for caption, path in self.pictures]


Section = Table | Gallery | Curves | Bars | HeatMap | Points | Pictures


def svg_uri(figure: Figure, name: str) -> str:
    """The figure as a data URI: inside an image its identifiers and styles cannot meet those of the page."""
    text = io.BytesIO()
    figure.tight_layout()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # the same bytes for the same numbers
        figure.savefig(text, format="svg", metadata={"Date": None})
    return to_uri(text.getvalue(), "image/svg+xml")


def to_uri(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def data_uri(path: Path, media_type: str) -> str:
    return to_uri(Path(path).read_bytes(), media_type)


def write_report(path: Path, title: str, lead: str, sections: Sequence[Section], footer: str = "") -> Path:
    """Render ``sections`` to one HTML file, written whole or not at all."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nd_jax"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    html = environment.get_template("report.html.j2").render(title=title, lead=lead, sections=sections, footer=footer)
    with new_file(path, overwrite=True) as part:
        part.write_text(html, encoding="utf-8")
    return Path(path)
