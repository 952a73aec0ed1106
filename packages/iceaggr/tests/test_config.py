import numpy as np
import pytest
from iceaggr.config import PRESETS, DataConfig, TrainConfig
from iceaggr.data.prepare import SplitError, refuse_overlap, split
from iceaggr.models.build import build_model
from lab_shared.config import ConfigError, from_json, preset_cli, to_json

# By the seed's formula: proj + d + 2L + L (4 d^2 + 2 d h) + (d H + H + 3 H + 3). 548,107 and 4,985,103 are its figures.
PARAMETERS = {
    "quick": 157_513,
    "small": 548_107,
    "5M": 4_985_103,
    "7M": 6_557_971,
    "8M": 7_745_871,
    "10M-deep": 9_703_707,
    "v1": 553_987,
    "v3": 560_139,
    "t1t2": 1_612_547,
}


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_have_the_parameters_they_say(name):
    model = PRESETS[name][1].model
    assert sum(p.numel() for p in build_model(model).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_survive_json(name):
    assert from_json(TrainConfig, to_json(PRESETS[name][1])) == PRESETS[name][1]


def test_a_misspelt_key_is_refused_by_name():
    text = to_json(PRESETS["quick"][1]).replace('"weight_decay"', '"weight_decy"')
    with pytest.raises(ConfigError, match=r"optim.weight_decy.*did you mean 'weight_decay'"):
        from_json(TrainConfig, text)


def test_flags_override_fields():
    config = preset_cli(PRESETS, ["small", "--optim.lr", "0.5", "--model.dom-cap", "128"], prog="test")
    assert (config.optim.lr, config.model.dom_cap, config.model.slots) == (0.5, 128, 16)


class Store:
    """The part of an event store that `split` reads."""

    def __init__(self, event_id, labelled=True):
        self.event_id = np.asarray(event_id)
        self.n_events = len(event_id)
        self.azimuth = np.zeros(len(event_id)) if labelled else None


def test_split_holds_out_the_last_events():
    train, held_out = split(Store(range(10)), DataConfig(val_events=3, train_events=5))
    assert (train.tolist(), held_out.tolist()) == ([0, 1, 2, 3, 4], [7, 8, 9])


@pytest.mark.parametrize(
    ("store", "config", "says"),
    [
        (Store(range(10), labelled=False), DataConfig(val_events=3), "labelled"),
        (Store(range(10)), DataConfig(val_events=10), "val-events"),
        (Store([0, 1, 2, 3, 4, 1]), DataConfig(val_events=1), "event_id 1"),
    ],
)
def test_split_refuses_what_would_not_be_honest(store, config, says):
    with pytest.raises(SplitError, match=says):
        split(store, config)


def test_overlap_names_how_many_and_which():
    with pytest.raises(SplitError, match=r"2 of 4 events.*event_id 5, 7"):
        refuse_overlap(np.array([1, 5, 7]), np.array([5, 6, 7, 8]))
