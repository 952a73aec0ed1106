"""What the columns of the model's input mean: names, types, and what each DOM token says about its pulses.

Shape suffixes: T tokens, F features.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from iceaggr.config import ModelConfig
from iceaggr.data.features import AGGREGATES, SUMMARY_FEATURES
from iceaggr.data.features_v3 import ICE_FEATURES

# The seed's five types; in summaries what they have become, and what is new.
_SUMMARY_TYPES = {
    "xyz": ("x", "y", "z"),
    "centred xyz": ("dx", "dy", "dz"),
    "n": ("pulses", "event_doms"),
    "time": ("first_time", "hlc_time", "near_time", "delay", "spread"),
    "charge": ("charge", "first_charge", "event_charge"),
    "aux": ("hlc",),
    "optics": ("efficiency", "scattering"),
}
_SHOWN_SLOTS = 4

PROPERTIES = ("t1", "z", "q1", "n_pulses")
"""Of a DOM: time and charge of its first pulse, height, number of pulses."""


class Columns(NamedTuple):
    """Names of the features, in order; column numbers of each type and of each pulse slot; those of PROPERTIES.

    In either set of features each of the properties is in a column that grows with it inside an event, so that its
    rank correlations are those of the property itself (first times further than 17 us from the event's reference time
    are equal in summaries).
    """

    names: tuple[str, ...]
    types: dict[str, list[int]]
    slots: dict[str, list[int]]
    properties: dict[str, int]
    event_level: frozenset[int]
    """Columns with one value per event."""


def columns_of(config: ModelConfig) -> Columns:
    """The columns of a flat model's features, in the order of `iceaggr.data.features.dom_features`."""
    slots: dict[str, list[int]] = {}
    if config.features == "seed":
        numbers = range(1, config.slots + 1)
        names = ["x", "y", "z", "n", *(f"{kind}{slot}" for slot in numbers for kind in "tqa")]
        types = {"xyz": [0, 1, 2], "n": [3]}
        types |= {kind: list(range(4 + i, len(names), 3)) for i, kind in enumerate(("time", "charge", "aux"))}
        slots = {f"slot {slot}": [1 + 3 * slot, 2 + 3 * slot, 3 + 3 * slot] for slot in numbers}
        properties = {"t1": 4, "z": 2, "q1": 5, "n_pulses": 3}
    else:
        names = list(SUMMARY_FEATURES)
        types = {kind: [names.index(name) for name in members] for kind, members in _SUMMARY_TYPES.items()}
        own = {"t1": "first_time", "z": "z", "q1": "first_charge", "n_pulses": "pulses"}
        properties = {name: names.index(column) for name, column in own.items()}
    extras = {
        "aggregates": [SUMMARY_FEATURES[i] for i in AGGREGATES] if config.aggregates else [],
        "ice": list(ICE_FEATURES) if config.ice else [],
        "fourier": [f"{wave} {what} {k}" for wave in ("sin", "cos") for what in "xyztq" for k in range(config.fourier)],
    }
    for kind, members in extras.items():
        if members:
            types[kind] = list(range(len(names), len(names) + len(members)))
            names += members
    event_level = frozenset(i for i, name in enumerate(names) if name in ("event_charge", "event_doms"))
    return Columns(tuple(names), types, slots, properties, event_level)


def permuted_groups(columns: Columns) -> dict[str, list[int]]:
    """Columns that permutation importance shuffles together: types, then single features or pulse slots."""
    groups = {f"all {kind}": members for kind, members in columns.types.items() if len(members) > 1}
    if not columns.slots:
        waves = columns.types.get("fourier", [])
        return groups | {name: [i] for i, name in enumerate(columns.names) if i not in waves}
    groups |= {name: [columns.names.index(name)] for name in ("n", "t1", "q1", "a1")}
    shown = list(columns.slots)[:_SHOWN_SLOTS]
    groups |= {name: columns.slots[name] for name in shown}
    if rest := list(columns.slots)[_SHOWN_SLOTS:]:
        last = rest[-1].removeprefix("slot ")
        groups[f"slots {_SHOWN_SLOTS + 1}-{last}"] = [i for name in rest for i in columns.slots[name]]
    return groups


def pulses_of_doms(features_TF: Tensor, config: ModelConfig, columns: Columns) -> Tensor:
    """(T,) int64 pulses of each DOM, read back from its feature. Rows that are no DOMs give meaningless numbers."""
    log_T = features_TF[:, columns.properties["n_pulses"]].to(torch.float64)
    log_T = 3 * (log_T + 1) if config.features == "seed" else log_T + math.log(2)
    return torch.expm1(log_T).round().to(torch.int64)
