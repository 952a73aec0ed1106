"""What an event display shows: one event's pulses, and the same gathered per DOM.

Positions are metres in the detector frame, times ns, charges photo-electrons. A direction is a unit vector to
where the neutrino came from; the particle travels along minus it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from lab_shared.errors import UserError
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Event:
    """One event's pulses, with what is known about its direction."""

    xyz: Array
    """(P, 3) m, the position of each pulse's DOM."""
    time: Array
    """(P,) ns."""
    charge: Array
    """(P,) photo-electrons."""
    auxiliary: Array
    """(P,) bool."""
    sensor: Array | None = None
    """(P,) sensor ids, for the hover text."""
    true: Array | None = None
    """(3,) unit vector to where the neutrino came from."""
    predicted: Array | None = None
    """(3,) unit vector, the model's answer."""
    event_id: int | None = None
    kappa: float | None = None

    @property
    def error_deg(self) -> float | None:
        """Angle between the true and the predicted direction; None unless both are known."""
        if self.true is None or self.predicted is None:
            return None
        cross = np.linalg.norm(np.cross(self.true, self.predicted))
        return float(np.degrees(np.arctan2(cross, np.dot(self.true, self.predicted))))

    @property
    def title(self) -> str:
        """Event id, opening angle and confidence, as far as they are known."""
        parts = [] if self.event_id is None else [f"event {self.event_id}"]
        parts += [] if self.error_deg is None else [f"opening angle {self.error_deg:.1f}°"]
        parts += [] if self.kappa is None else [f"κ {self.kappa:.3g}"]
        return " · ".join(parts)


@dataclass(frozen=True)
class Hits:
    """The pulses of an event gathered per DOM, in order of time."""

    xyz: Array
    time: Array
    """First HLC pulse of the DOM; of a DOM without one its first pulse."""
    charge: Array
    """Sum over the DOM's pulses."""
    pulses: Array
    auxiliary: Array
    """True where every pulse is auxiliary."""
    sensor: Array | None


def hits_by_dom(event: Event) -> Hits:
    """Gather pulses that share a position. Raises UserError for an event without pulses or uneven arrays."""
    sizes = {len(event.xyz), len(event.time), len(event.charge), len(event.auxiliary)}
    if sizes == {0} or len(sizes) != 1:
        raise UserError(f"an event to draw needs equally many positions, times, charges and flags; got {sorted(sizes)}")
    xyz, dom = np.unique(event.xyz, axis=0, return_inverse=True)
    dom = dom.reshape(-1)
    auxiliary = np.asarray(event.auxiliary, dtype=bool)
    # HLC pulses before auxiliary ones, each by time: the first row of a DOM is the pulse that gives its time.
    order = np.lexsort((event.time, auxiliary, dom))
    first = order[np.searchsorted(dom[order], np.arange(len(xyz)))]
    by_time = np.argsort(event.time[first], kind="stable")
    first = first[by_time]
    return Hits(
        xyz=xyz[by_time],
        time=np.asarray(event.time, dtype=np.float64)[first],
        charge=np.bincount(dom, weights=event.charge)[by_time],
        pulses=np.bincount(dom)[by_time],
        auxiliary=auxiliary[first],
        sensor=None if event.sensor is None else np.asarray(event.sensor)[first],
    )


def charge_centre(event: Event) -> Array:
    """(3,) charge-weighted mean position of the HLC pulses, or of all pulses when there is no HLC pulse.

    Noise is auxiliary and lights the whole array: with it the centre would drift to the middle of the
    detector.
    """
    keep = ~np.asarray(event.auxiliary, dtype=bool)
    if not keep.any():
        keep[:] = True
    weight = np.asarray(event.charge, dtype=np.float64)[keep]
    return (weight[:, None] * event.xyz[keep]).sum(axis=0) / weight.sum()


def time_range(hits: Hits) -> tuple[float, float]:
    """Colour limits (ns) from the HLC hits: noise microseconds away must not flatten the event itself."""
    times = hits.time[~hits.auxiliary] if not hits.auxiliary.all() else hits.time
    low, high = np.quantile(times, (0.02, 0.98))
    return float(low), float(max(high, low + 1))


def angles_text(direction: Array) -> str:
    """Zenith and azimuth of a unit vector, in words."""
    azimuth = np.degrees(np.arctan2(direction[1], direction[0])) % 360
    zenith = np.degrees(np.arccos(np.clip(direction[2], -1, 1)))
    return f"zenith {zenith:.1f}°, azimuth {azimuth:.1f}°"
