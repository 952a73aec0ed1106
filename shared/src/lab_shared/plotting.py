"""One look for every figure: colours, a matplotlib style, and deterministic SVG and PNG output.

Matplotlib is imported inside the functions. Figures are made with `matplotlib.figure.Figure` and not with
pyplot: no display, no global state, nothing to close. Artists take their style when they are made, so draw
inside `style()`:

    with style():
        fig, ax = axes(4.6, 3.2)
        ax.plot(x, y, color=BLUE)
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Paul Tol's "bright" scheme (https://sronpersonalpages.nl/~pault): told apart under all common colour-vision
# deficiencies, and of middle lightness, so that it works on white and on a dark page.
BLUE, RED, GREEN, YELLOW, CYAN, PURPLE, GREY = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#8c959e",
)  # fmt: skip
INK = "#1d2329"
"""Text, ticks and spines. In the SVG of a page it becomes the page's own text colour."""
RULE = "#d9dee4"
"""Grid lines. In the SVG of a page it becomes the page's own rule colour."""

_RC: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.formatter.limits": (-3, 6),
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "figure.autolayout": False,
    "figure.constrained_layout.use": False,
    "figure.dpi": 100,
    "figure.facecolor": "none",
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same figure on every machine
    "font.size": 9,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "image.cmap": "cividis",
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "patch.edgecolor": INK,
    "savefig.facecolor": "none",
    "svg.fonttype": "path",  # text as outlines: no font needed where the page is read
    "svg.hashsalt": "lab",  # ids from the content instead of a random number
    "text.color": INK,
    "xtick.color": INK,
    "xtick.labelsize": 8.5,
    "xtick.major.width": 0.7,
    "ytick.color": INK,
    "ytick.labelsize": 8.5,
    "ytick.major.width": 0.7,
}
_SAVING = (
    "figure.autolayout", "figure.constrained_layout.use", "savefig.facecolor", "svg.fonttype", "svg.hashsalt",
)  # fmt: skip
"""The settings that count when a figure is saved; the others are in its artists by then."""


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib defaults of every figure in this repository, for the duration of the block."""
    import matplotlib

    # From matplotlib's own defaults, so that a user's matplotlibrc does not leak in.
    settings: dict[Any, Any] = {**matplotlib.rcParamsDefault}
    settings |= _RC | {"backend": matplotlib.rcParams["backend"]}
    with matplotlib.rc_context(settings):
        yield


def axes(width: float = 4.6, height: float = 3.1, **subplot: Any) -> tuple[Figure, Any]:
    """A figure of `width` x `height` inches with one axes (keywords: `add_subplot`). Use in `style()`."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.add_subplot(**subplot)


def to_svg(fig: Figure, prefix: str = "f") -> str:
    """`fig` as an `<svg>` element for inlining in a page: same input, same bytes.

    Ids get `prefix`, so that several figures can share a page; ink and grid follow the page's light or dark
    scheme.
    """
    buffer = io.StringIO()
    _save(fig, buffer, format="svg", dpi=200, metadata={"Date": None})
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", buffer.getvalue(), flags=re.DOTALL)
    body = body[body.index("<svg") : body.rindex("</svg>")]  # HTML takes no XML declaration and no DOCTYPE
    viewbox = re.search(r'viewBox="[^"]*"', body)
    assert viewbox is not None, "matplotlib wrote an SVG without a viewBox"
    # Its own opening tag has a size in points, which would pin the picture; its style sheet would leak out.
    body = body[body.index(">") + 1 :].strip()
    body = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{prefix}-", body)
    tag = f'<svg {viewbox[0]} style="stroke-linejoin: round; stroke-linecap: butt">'
    svg = f"{tag}{body}</svg>"
    return svg.replace(INK, "currentColor").replace(RULE, "var(--rule)")


def to_png(fig: Figure, dpi: int = 160) -> bytes:
    """`fig` as a PNG on white: same input, same bytes."""
    buffer = io.BytesIO()
    _save(fig, buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _save(fig: Figure, buffer: io.StringIO | io.BytesIO, **options: Any) -> None:
    import matplotlib

    settings: dict[Any, Any] = {key: _RC[key] for key in _SAVING}
    with matplotlib.rc_context(settings):
        layout = fig.get_layout_engine()
        if layout is not None:
            # Settle the layout once. It costs more than drawing, and done again it moves things by a hair.
            layout.execute(fig)
            fig.set_layout_engine(None)
        fig.savefig(buffer, **options)
