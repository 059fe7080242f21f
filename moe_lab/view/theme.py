"""One look for every figure: colours, type, scales, and how a figure becomes PNG bytes on the page.

No pyplot: figures are `Figure()` objects drawn by Agg, so nothing is global and nothing needs a display.
Colours are Okabe and Ito's (2008), which hold for colour-blind readers: vermillion is more than chance, blue is
less, grey is what chance alone gives. Ratios (load / mean) share one diverging map centred at 1.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

INK, MUTED, GRID, CHANCE, PAPER = "#1f2933", "#616e7c", "#e4e7eb", "#d5dae1", "#ffffff"
MORE, LESS, WITHIN = "#d55e00", "#0072b2", "#9aa5b1"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1f2933")
# Paul Tol's "light" scheme: backgrounds for black text, distinct for colour-blind readers.
TINTS = ("#77aadd", "#ee8866", "#eedd88", "#ffaabb", "#99ddff", "#44bb99", "#bbcc33", "#aaaa00")
PALE_TINTS = ("#c9ddf1", "#f8d0c4", "#f8f2cf", "#ffdddf", "#d2f0ff", "#bce5d8", "#e3ebb8", "#dddd99")
OTHER_TINT = "#eef0f2"

RATIO_MAP = LinearSegmentedColormap.from_list(
    "ratio", ["#00456e", LESS, "#8fc1e0", "#f7f7f7", "#f4b183", MORE, "#8a3c00"]
)
SHARE_MAP = LinearSegmentedColormap.from_list("share", ["#f7f9fb", "#8fc1e0", LESS, "#053a5f"])
RATIO_TICKS = {-2: "≤¼", -1: "½", 0: "1", 1: "2", 2: "≥4"}  # of log2

Pixels = int | float  # CSS pixels
WIDTH = 900  # CSS pixels of a notebook's column
PICTURE = (340, 230)  # CSS pixels of a panel's picture
PANEL_WIDTH = 3 * PICTURE[0]
SCALE = 2  # device pixels to a CSS pixel, for sharp text on dense screens
DPI = 100  # of a CSS pixel: font sizes below are points at this density

_STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "text.color": INK,
    "figure.facecolor": PAPER,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "moe_lab",
}


def log_ratio(ratio: Any) -> Any:
    """log2 of load / mean from -2 (a quarter, or less, or nothing) to 2 (four times, or more)."""
    return np.log2(np.clip(ratio, 0.25, 4.0))


@contextmanager
def style() -> Iterator[None]:
    """The house settings, for as long as artists are being made."""
    with mpl.rc_context(_STYLE):
        yield


def figure(width: Pixels, height: Pixels) -> Figure:
    """A figure of `width` x `height` CSS pixels."""
    made = Figure(figsize=(width / DPI, height / DPI), dpi=DPI * SCALE, facecolor=PAPER)
    FigureCanvasAgg(made)
    return made


def css_width(drawn: Figure) -> int:
    """Width of a figure on the page, CSS pixels."""
    return round(drawn.get_figwidth() * DPI)


def png(drawn: Figure) -> bytes:
    """A figure as PNG bytes, compressed well."""
    canvas = drawn.canvas
    if not isinstance(canvas, FigureCanvasAgg):
        canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    return encode(canvas, compress_level=9)


def encode(canvas: FigureCanvasAgg, *, compress_level: int = 1) -> bytes:
    """What a canvas holds as PNG bytes; lightly compressed when it only travels over a local socket."""
    width, height = canvas.get_width_height(physical=True)
    image = Image.frombuffer("RGBA", (width, height), canvas.buffer_rgba(), "raw", "RGBA", 0, 1)
    out = io.BytesIO()
    image.convert("RGB").save(out, "PNG", compress_level=compress_level)
    return out.getvalue()


def side_by_side(pngs: Sequence[bytes]) -> bytes:
    """PNG pictures as one, from left to right."""
    parts = [Image.open(io.BytesIO(png)).convert("RGB") for png in pngs]
    page = Image.new("RGB", (sum(part.width for part in parts), max(part.height for part in parts)), PAPER)
    left = 0
    for part in parts:
        page.paste(part, (left, 0))
        left += part.width
    out = io.BytesIO()
    page.save(out, "PNG", optimize=True)
    return out.getvalue()


def title(drawn: Figure) -> str:
    """The first title on a figure, for alternative text."""
    titles = [text.get_text() for text in drawn.texts] + [axes.get_title(loc="left") for axes in drawn.axes]
    return next((text for text in titles if text), "figure")


def show(drawn: Figure) -> None:
    """Display a figure in a notebook at its natural width."""
    from IPython.display import Image as Picture
    from IPython.display import display

    display(Picture(data=png(drawn), format="png", width=css_width(drawn), alt=title(drawn)))


class Live:
    """A figure that is redrawn often: what stays is drawn once, what moves is drawn over it.

    `moving` artists must have been updated before `png()`. Everything else (axes, ticks, titles, grid) must
    never change; make a new `Live` when it must.
    """

    def __init__(self, drawn: Figure, moving: Sequence[Artist]) -> None:
        self.figure, self._moving = drawn, tuple(moving)
        self._background: Any = None

    def png(self) -> bytes:
        """The figure as it is now."""
        canvas = self.figure.canvas
        assert isinstance(canvas, FigureCanvasAgg)
        if self._background is None:
            for artist in self._moving:
                artist.set_animated(True)
            canvas.draw()
            self._background = canvas.copy_from_bbox(self.figure.bbox)
        canvas.restore_region(self._background)
        for artist in sorted(self._moving, key=lambda artist: artist.get_zorder()):
            owner = artist.axes if isinstance(artist.axes, Axes) else self.figure
            owner.draw_artist(artist)
        return encode(canvas)
