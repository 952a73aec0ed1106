"""What is published about the real data of the Kaggle competition: the figures `iceaggr inspect` compares with.

Batch 1 (200,000 real events) unless the comment says otherwise; tolerances are this project's own requirements. Tables
map a quantile to its value: times in ns, charges in p.e., angles in rad.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

CHARGE_GRID = 0.025
"""p.e."""
N_PULSES: dict[float, float] = {
    0.01: 30,
    0.05: 36,
    0.1: 40,
    0.25: 48,
    0.5: 63,
    0.75: 89,
    0.9: 144,
    0.95: 219,
    0.99: 1130,
}
N_PULSES |= {0: 15, 0.001: 24, 0.995: 3320, 0.999: 19553, 0.9999: 70707, 1: 110517}
SPAN: dict[float, float] = {
    0.01: 8408,
    0.05: 9114,
    0.1: 9446,
    0.25: 9990,
    0.5: 10965,
    0.75: 12431,
    0.9: 14426,
    0.95: 17532,
}
SPAN |= {0: 4732, 0.001: 7446, 0.99: 21872, 0.999: 28156, 1: 36758}
DOMS: dict[float, float] = {0.5: 49, 0.75: 65, 0.9: 92, 0.95: 120, 0.99: 242, 0.999: 872, 1: 2256}
CHARGE: dict[float, float] = {0.25: 0.775, 0.5: 1.075, 0.75: 1.775}
AUXILIARY_CHARGE: dict[float, float] = {0.25: 0.675, 0.5: 0.875, 0.75: 1.125}  # the 8 public events
HLC_CHARGE: dict[float, float] = {0.25: 0.675, 0.5: 0.975, 0.75: 1.175}  # likewise
PULSES_PER_DOM: dict[float, float] = {0.9: 3, 0.95: 5, 0.99: 43, 0.999: 147, 1: 455}
TIME: dict[float, float] = {0.25: 10566, 0.5: 11815, 0.75: 13916}
AZIMUTH: dict[float, float] = {0.25: 1.571, 0.5: 3.142, 0.75: 4.712}  # uniform
CLASSES: dict[str, tuple[float, float, float]] = {
    "below 100": (0, 100, 0.801),
    "100 to 1,000": (100, 1000, 0.188),
    "1,000 to 10,000": (1000, 10_000, 0.009),
}
CLASSES |= {"from 10,000": (10_000, np.inf, 0.002)}  # all 132 million events, as published with one digit
TAIL_FROM = 100  # pulses
ZENITH: dict[float, float] = {0.25: 1.005, 0.5: 1.527, 0.75: 2.055}


@dataclass(frozen=True)
class Target:
    """A published figure, and how far a simulation may be from it."""

    real: float
    tolerance: float | None = None
    """None: shown, not judged."""
    kind: Literal["relative", "absolute"] = "relative"


def _targets() -> dict[str, Target]:
    targets: dict[str, Target] = {}

    def add(name: str, table: dict[float, float], judged: tuple[float, float], tolerance: float) -> None:
        for q, value in sorted(table.items()):
            inside = judged[0] <= q <= judged[1]
            targets[quantile_name(name, q)] = Target(value, tolerance if inside else None)

    add("n_pulses", N_PULSES, (0.05, 0.99), 0.10)
    targets["n_pulses mean"] = Target(164.0)
    targets["n_pulses std"] = Target(1553.0)  # all 132 million events
    targets |= {f"events {name} pulses": Target(share) for name, (_, _, share) in CLASSES.items()}
    targets["events above 1,000 pulses"] = Target(0.0112)
    targets["n_pulses tail exponent"] = Target(2.48)
    add("span", SPAN, (0.05, 0.95), 0.10)
    targets["span mean"] = Target(11665.0)
    targets["span correlation with n_pulses"] = Target(0.265)
    add("doms", DOMS, (0.5, 0.5), 0.05)
    targets["doms mean"] = Target(60.6)
    targets["doms with one pulse"] = Target(0.78)
    targets["doms with at most 16 pulses"] = Target(0.981)
    add("pulses per dom", PULSES_PER_DOM, (2, 2), 0)
    add("charge", CHARGE, (0.25, 0.75), 0.15)
    targets["charge mean"] = Target(3.91)
    targets["charge std"] = Target(16.3)
    targets["charge min"] = Target(0.025)
    targets["charge max"] = Target(2762.0)
    add("auxiliary charge", AUXILIARY_CHARGE, (2, 2), 0)
    add("coincident charge", HLC_CHARGE, (2, 2), 0)
    targets["auxiliary per event"] = Target(0.64, 0.03, "absolute")
    targets["auxiliary per pulse"] = Target(0.28)
    targets["events without coincidence"] = Target(0.0)
    add("time", TIME, (2, 2), 0)
    targets["time mean"] = Target(13130.0)
    targets["time max"] = Target(77785.0)
    targets["first pulse median"] = Target(6129.0)
    targets["first pulse min"] = Target(5714.0)
    add("zenith", ZENITH, (2, 2), 0)
    targets["zenith mean"] = Target(1.534)
    targets["zenith std"] = Target(0.690)
    add("azimuth", AZIMUTH, (2, 2), 0)
    return targets


def quantile_name(name: str, q: float) -> str:
    return f"{name} {100 * q:g}%"


TARGETS = _targets()
"""Real Kaggle data, batch 1: pulses and time spans of all 200,000 events, the rest as public notebooks report
it. Times in ns, charges in p.e., angles in rad."""
