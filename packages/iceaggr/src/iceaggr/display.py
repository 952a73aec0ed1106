"""One event drawn in the detector: interactive 3-D (plotly), and side and top views for paper (matplotlib).

Pulses are gathered per DOM. Size grows with the DOM's charge; colour is the time of its first HLC pulse (of
its first pulse if it has none); a DOM with auxiliary pulses only is hollow. A direction is a unit vector to
where the neutrino came from; its arrow passes through the charge-weighted centre and points the way the
particle travels, so along minus the vector. Positions are metres in the detector frame, times ns, charges
photo-electrons.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lab_shared.errors import UserError
from lab_shared.files import atomic_write, make_folder
from lab_shared.page import Page
from lab_shared.plotting import BLUE, GREY, INK, RED, style, to_png

from iceaggr.display_data import Array, Event, Hits, angles_text, charge_centre, hits_by_dom, time_range

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FRAMES, _FRAME_MS = 50, 80  # of the animation: about 4 s
_ARROW_HALF_LENGTH = 550.0  # m: as far as the strings reach from the middle of the array
_VIEW = 700.0  # m: half the side of a still


def event_figure(event: Event, array_xyz: Array | None = None, *, title: bool = True, animated: bool = False) -> Any:
    """The event as a plotly figure. `array_xyz` (N, 3): every DOM of the detector as a faint dot.

    animated: with a play button and a slider in event time; DOMs light up when their colour's time has come.
    """
    import plotly.graph_objects as go

    hits = hits_by_dom(event)
    low, high = time_range(hits)
    size = _diameter(hits.charge)
    traces: list[Any] = []
    if array_xyz is not None:
        dots = {"size": 1.1, "color": GREY, "opacity": 0.32}
        traces.append(_points(np.asarray(array_xyz), dots, name="all DOMs", hoverinfo="skip"))
    for name, hollow in (("auxiliary only", True), ("HLC", False)):
        rows = np.flatnonzero(hits.auxiliary == hollow)
        if len(rows):
            shade = {"color": hits.time[rows], "coloraxis": "coloraxis"}
            # An outline, and not the symbol "circle-open": WebGL draws that one too thin to be seen.
            ring = {"color": "rgba(0,0,0,0)", "line": {**shade, "width": 2}}
            marker = {"size": size[rows], **(ring if hollow else {**shade, "line": {"width": 0}})}
            texts = [_hover(hits, row) for row in rows.tolist()]
            traces.append(_points(hits.xyz[rows], marker, name=name, text=texts, hoverinfo="text"))
    for name, direction, colour in _directions(event):
        traces += _arrow(charge_centre(event), direction, name, colour)
    plain = {"showbackground": False, "gridcolor": "#a3abb3", "zeroline": False, "showspikes": False}
    figure = go.Figure(traces)
    figure.update_layout(
        template="none",
        title={"text": event.title if title else "", "font": {"size": 14}, "x": 0.02},
        height=460,
        margin={"l": 0, "r": 0, "b": 0, "t": 36 if title else 8},
        legend={"orientation": "h", "x": 0, "y": -0.02, "itemsizing": "constant", "font": {"size": 11}},
        scene={
            "aspectmode": "data",
            **{f"{axis}axis": {**plain, "title": {"text": f"{axis} (m)"}, "nticks": 5} for axis in "xyz"},
            "camera": {"eye": {"x": 1.15, "y": -1.3, "z": 0.4}, "center": {"x": 0, "y": 0, "z": -0.12}},
        },
        coloraxis={
            "colorscale": _colour_scale(),
            "cmin": low,
            "cmax": high,
            "colorbar": {
                "title": {"text": "time (ns)", "side": "right"},
                "thickness": 10,
                "len": 0.6,
                "x": 1.0,
                "tickformat": ",d",
            },
        },
    )
    if animated:
        _animate(figure, hits, size, low, high)
    return figure


def _animate(figure: Any, hits: Hits, size: Array, low: float, high: float) -> None:
    """Frames, a play button and a time slider. A DOM still dark has size 0, so that nothing but sizes is stored."""
    import plotly.graph_objects as go

    lit = [(i, hits.auxiliary == (trace.name == "auxiliary only"))
           for i, trace in enumerate(figure.data) if trace.name in ("auxiliary only", "HLC")]  # fmt: skip
    margin = (high - low) / 10
    times = [*np.linspace(low - margin, high + margin, _FRAMES).tolist(), float("inf")]
    names = [f"{time:,.0f} ns" for time in times[:-1]] + ["all"]
    figure.frames = [
        go.Frame(
            name=name,
            traces=[i for i, _ in lit],
            data=[
                go.Scatter3d(marker={"size": np.where(hits.time <= time, size, 0)[rows].round(2)}) for _, rows in lit
            ],
        )
        for time, name in zip(times, names, strict=True)
    ]
    pause = {"mode": "immediate", "frame": {"duration": 0, "redraw": False}}
    play = {"fromcurrent": False, "frame": {"duration": _FRAME_MS, "redraw": True}, "transition": {"duration": 0}}
    steps = [
        {"label": name, "method": "animate", "args": [[name], {"mode": "immediate", "frame": {"duration": 0}}]}
        for name in names
    ]
    figure.update_layout(
        height=540,
        legend={"y": 1.02, "yanchor": "bottom"},
        updatemenus=[
            {
                "type": "buttons",
                "direction": "left",
                "showactive": False,
                "x": 0,
                "y": 0,
                "xanchor": "left",
                "yanchor": "top",
                "pad": {"t": 18},
                "buttons": [
                    {"label": "Play", "method": "animate", "args": [None, play]},
                    {"label": "Pause", "method": "animate", "args": [[None], pause]},
                ],
            }
        ],
        sliders=[
            {
                "steps": steps,
                "active": len(steps) - 1,
                "x": 0.2,
                "len": 0.8,
                "pad": {"t": 8},
                "currentvalue": {"prefix": "up to ", "font": {"size": 11, "color": GREY}},
                "font": {"size": 1, "color": "rgba(0,0,0,0)"},
            }
        ],
    )


def event_still(event: Event, array_xyz: Array | None = None, label: str = "") -> Figure:
    """The event from the side (x, z) and from above (x, y), as a matplotlib figure; label as in `write_display`."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    hits, colours, centre = hits_by_dom(event), _colour_map(), charge_centre(event)
    with style():
        fig = Figure(figsize=(7.4, 3.5), layout="constrained")
        views = fig.subplots(1, 2)
        scale = ScalarMappable(Normalize(*time_range(hits)), colours)
        for ax, title, (i, j) in zip(views, ("side", "top"), ((0, 2), (0, 1)), strict=True):
            if array_xyz is not None:
                dots = {"color": GREY, "alpha": 0.4, "markersize": 1, "zorder": 0.5}
                ax.plot(array_xyz[:, i], array_xyz[:, j], ".", rasterized=True, **dots)
            shades, area = scale.to_rgba(hits.time), (0.75 * _diameter(hits.charge)) ** 2
            faces = np.where(hits.auxiliary[:, None], 0.0, shades)
            ax.scatter(hits.xyz[:, i], hits.xyz[:, j], s=area, c=faces, edgecolors=shades, linewidths=0.9)
            for name, direction, colour in _directions(event):
                start, end = _within_view(centre[[i, j]], direction[[i, j]])
                look = {"color": colour, "linewidth": 1.5, "linestyle": (0, (4, 2)) if name == "predicted" else "-"}
                ax.annotate("", xytext=start, xy=end, arrowprops={"arrowstyle": "-|>", **look})
                ax.plot([], [], **look, label=name)
            view = (-_VIEW, _VIEW)
            ax.set(xlabel="x (m)", ylabel=f"{'xyz'[j]} (m)", aspect="equal", xlim=view, ylim=view)
            ax.set_title(title)
        if _directions(event):
            views[0].legend(loc="upper left", ncols=2)
        bar = fig.colorbar(scale, ax=views, shrink=0.8, aspect=30, pad=0.02)
        bar.set_label("time (ns)")
        bar.outline.set_visible(False)
        fig.suptitle(" · ".join(filter(None, (event.title, label))), fontsize=9.5, color=INK)
    return fig


def event_png(path: Path, event: Event, array_xyz: Array | None = None, label: str = "") -> Path:
    """Write `event_still` as a PNG; returns `path`."""
    make_folder(path.parent)
    atomic_write(path, to_png(event_still(event, array_xyz, label)))
    return path


def write_display(path: Path, event: Event, array_xyz: Array | None = None, *, label: str = "") -> Path:
    """Write one event as a self-contained HTML page, or as `event_png` where `path` ends in .png.

    label: what data it is ("simulated data"). Raises UserError for another ending, and for .html without plotly.
    """
    if path.suffix == ".png":
        return event_png(path, event, array_xyz, label)
    if path.suffix != ".html":
        raise UserError(f"{path}: an event is drawn as .html (3D, animated) or .png (side and top view)")
    if find_spec("plotly") is None:
        raise UserError(f"{path}: the 3D page needs plotly; install it, or give a .png")
    hits = hits_by_dom(event)
    page = Page(f"Event {event.event_id}" if event.event_id is not None else "Event", label)
    figure = event_figure(event, array_xyz, title=False, animated=True)
    page.plotly(figure, f"{CAPTION} Play runs through event time.", still=to_png(event_still(event, array_xyz, label)))
    rows = [
        ("pulses", f"{len(event.time):,} ({int(np.sum(event.auxiliary)):,} auxiliary)"),
        ("DOMs hit", f"{len(hits.time):,} ({int(hits.auxiliary.sum()):,} with auxiliary pulses only)"),
        ("total charge", f"{float(np.sum(event.charge)):,.1f} p.e."),
        ("readout", f"{float(np.ptp(event.time)):,.0f} ns"),
    ]
    rows += [(f"{name} direction", angles_text(direction)) for name, direction, _ in _directions(event)]
    rows += [] if event.error_deg is None else [("opening angle", f"{event.error_deg:.2f}°")]
    rows += [] if event.kappa is None else [("confidence κ", f"{event.kappa:.3g}")]
    page.table(["quantity", "value"], rows, align="ll")
    return page.write(path)


CAPTION = (
    "DOMs with light: size by charge, colour by time of the first HLC pulse, hollow where all pulses "
    "are auxiliary. Arrows point the way the particle travels, through the charge-weighted centre of the HLC "
    "pulses."
)


def _directions(event: Event) -> list[tuple[str, Array, str]]:
    """Name, unit vector and colour of each known direction."""
    both = (("true", event.true, RED), ("predicted", event.predicted, BLUE))
    return [(name, direction, colour) for name, direction, colour in both if direction is not None]


def _points(xyz: Array, marker: dict[str, Any], **trace: Any) -> Any:
    import plotly.graph_objects as go

    x, y, z = np.asarray(xyz, dtype=np.float32).T
    return go.Scatter3d(x=x, y=y, z=z, mode="markers", marker=marker, **trace)


def _arrow(centre: Array, direction: Array, name: str, colour: str) -> list[Any]:
    """A line through `centre` with a cone at the end the particle travels to."""
    import plotly.graph_objects as go

    start, end = centre + _ARROW_HALF_LENGTH * np.outer((1, -1), direction)
    x, y, z = np.stack((start, end)).T
    u, v, w = -60.0 * np.asarray(direction)
    text = f"{name}: {angles_text(direction)}"
    line = {"color": colour, "width": 5, "dash": "dash" if name == "predicted" else "solid"}
    cone = {
        "colorscale": [[0, colour], [1, colour]],
        "showscale": False,
        "sizemode": "absolute",
        "sizeref": 60,
    }
    tip = [[value] for value in (*end, u, v, w)]
    return [
        go.Scatter3d(x=x, y=y, z=z, mode="lines", line=line, name=name, text=[text] * 2, hoverinfo="text"),
        go.Cone(**dict(zip("xyzuvw", tip, strict=True)), anchor="center", hoverinfo="skip", **cone),
    ]


def _within_view(centre_2: Array, direction_2: Array) -> Array:
    """(2, 2) tail and tip of an arrow through the centre, cut where it leaves the still: matplotlib leaves out an arrow
    whose tip lies outside."""
    ends = []
    for towards in (direction_2, -direction_2):
        with np.errstate(divide="ignore"):
            edge = ((_VIEW - 15 - np.sign(towards) * centre_2) / np.abs(towards)).min()
        ends.append(centre_2 + max(min(_ARROW_HALF_LENGTH, float(edge)), 0.0) * towards)
    return np.stack(ends)


def _hover(hits: Hits, row: int) -> str:
    sensor = ""
    if hits.sensor is not None:
        string, dom = divmod(int(hits.sensor[row]), 60)
        sensor = f"sensor {int(hits.sensor[row])} (string {string + 1}, DOM {dom + 1})<br>"
    pulses = "1 pulse" if hits.pulses[row] == 1 else f"{hits.pulses[row]} pulses"
    return f"{sensor}{hits.time[row]:,.0f} ns<br>{hits.charge[row]:,.2f} p.e. in {pulses}"


def _diameter(charge: Array) -> Array:
    """Marker diameter in points: area grows with the square root of the charge, from 6 at 1 p.e. up to 24."""
    return np.clip(6.0 * np.maximum(charge, 0.0) ** 0.25, 3.0, 24.0)


def _colour_map() -> Any:
    """Matplotlib's plasma without its ends, which fade into a dark and into a white page."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    return ListedColormap(matplotlib.colormaps["plasma"](np.linspace(0.12, 0.9, 256)))


def _colour_scale() -> list[list[Any]]:
    from matplotlib.colors import to_hex

    colours = _colour_map()
    return [[i / 15, to_hex(colours(i / 15))] for i in range(16)]
