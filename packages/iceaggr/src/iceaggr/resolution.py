"""How good the direction is for which events: opening angle by energy, zenith, multiplicity, containment and type.

Arrays of predictions.npz in, columns out (as in `iceaggr.summaries`), with 95% intervals. Angles in degrees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from iceaggr.summaries import MIN_EVENTS, Array, Columns, quantile_edges

_TYPES = {"cascade": 0, "track": 1}
_LEVELS = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1)
_Z = 1.959964
LABELS = {
    "energy": "neutrino energy (GeV)",
    "cos_zenith": "true cos zenith (1: from above)",
    "n_pulses": "pulses in the event",
    "n_doms": "DOMs hit",
    "depth_inside": "depth of the interaction inside the array (m, < 0: outside)",
}
LOG = ("energy", "n_pulses", "n_doms")


def resolution_table(events: Mapping[str, Array], array_xyz: Array) -> Columns:
    """One row per quantity, bin and group ("all", and "track" and "cascade" where the type is known).

    events: arrays (N,) of predictions.npz. array_xyz: (S, 3) positions of the DOMs. Columns: quantity, group, low and
    high edge of the bin, x (median of the quantity in it), events, mean with mean_low and mean_high (normal interval of
    a mean), median with median_low and median_high (order statistics, no assumption), p68, p90. Bins with fewer than
    MIN_EVENTS events are left out. Quantities: those of `LABELS` that the events have, "contained" (0 or 1: the
    interaction lies inside the array), and "type" with the bin edges of `_TYPES`.
    """
    error = events["error_deg"]
    groups = {"all": np.ones(len(error), dtype=bool)}
    if "type" in events:
        groups |= {name: events["type"] == code for name, code in _TYPES.items()}
    rows = []
    for quantity, (x, edges) in _quantities(events, array_xyz).items():
        bin_of = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, len(edges) - 2)
        for group, member in groups.items():
            for i in range(len(edges) - 1):
                inside = member & (bin_of == i)
                if np.count_nonzero(inside) >= MIN_EVENTS:
                    place = {"quantity": quantity, "group": group, "low": edges[i], "high": edges[i + 1]}
                    rows.append(place | {"x": float(np.median(x[inside]))} | _figures(error[inside]))
    return {name: np.array([row[name] for row in rows]) for name in rows[0]} if rows else {}


def select(table: Columns, quantity: str, group: str | None = None) -> Columns:
    """The rows of one quantity, of one group or of all."""
    keep = table["quantity"] == quantity
    if group is not None:
        keep &= table["group"] == group
    return {name: values[keep] for name, values in table.items()}


def depth_inside(point_E3: Array, array_xyz: Array) -> Array:
    """(E,) metres from each point to the nearest side of the array, positive inside.

    The array is the prism over the convex hull of its strings, from the lowest to the highest DOM. Outside the value is
    negative: the largest distance by which the point is beyond any one side's plane.
    """
    corners = _hull(array_xyz[:, :2])
    side = np.roll(corners, -1, axis=0) - corners
    inward = np.stack((-side[:, 1], side[:, 0]), axis=1) / np.linalg.norm(side, axis=1)[:, None]
    across = ((point_E3[:, None, :2] - corners) * inward).sum(axis=2).min(axis=1)
    low, high = array_xyz[:, 2].min(), array_xyz[:, 2].max()
    return np.minimum(across, np.minimum(point_E3[:, 2] - low, high - point_E3[:, 2]))


def _quantities(events: Mapping[str, Array], array_xyz: Array) -> dict[str, tuple[Array, Array]]:
    """Values and bin edges of everything the events can be sorted by."""
    found: dict[str, tuple[Array, Array]] = {}
    if "energy" in events:
        log = np.log10(events["energy"])
        found["energy"] = events["energy"], 10 ** np.arange(math.floor(2 * log.min()) / 2, log.max() + 0.5, 0.5)
    found["cos_zenith"] = np.cos(events["zenith"]), np.linspace(-1, 1, 11)
    for name in ("n_pulses", "n_doms"):
        if name in events:
            found[name] = events[name], quantile_edges(events[name], _LEVELS)
    if "vertex_x" in events:
        vertex = np.stack([events[f"vertex_{axis}"] for axis in "xyz"], axis=1).astype(np.float64)
        inside = depth_inside(vertex, array_xyz)
        found["depth_inside"] = inside, quantile_edges(inside, _LEVELS)
        found["contained"] = (inside > 0).astype(np.int64), np.array([0, 1, 2])
    if "type" in events:
        found["type"] = events["type"], np.array([0, 1, 2])
    return found


def _figures(error: Array) -> dict[str, float]:
    n, ordered = len(error), np.sort(error)
    half = _Z * math.sqrt(n) / 2
    low, high = max(math.floor(n / 2 - half), 0), min(math.ceil(n / 2 + half), n - 1)
    mean, step = float(error.mean()), _Z * float(error.std(ddof=1)) / math.sqrt(n)
    return {
        "events": n,
        "mean": mean,
        "mean_low": mean - step,
        "mean_high": mean + step,
        "median": float(np.median(ordered)),
        "median_low": float(ordered[low]),
        "median_high": float(ordered[high]),
        "p68": float(np.quantile(ordered, 0.68)),
        "p90": float(np.quantile(ordered, 0.9)),
    }


def _hull(xy: Array) -> Array:
    """Corners of the convex hull, anticlockwise (Andrew's monotone chain)."""
    points = sorted({(float(x), float(y)) for x, y in xy})

    def chain(ordered: list[tuple[float, float]]) -> list[tuple[float, float]]:
        out: list[tuple[float, float]] = []
        for x, y in ordered:
            while len(out) > 1:
                (ax, ay), (bx, by) = out[-2:]
                if (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0:
                    break
                out.pop()
            out.append((x, y))
        return out[:-1]

    return np.array(chain(points) + chain(points[::-1]))
