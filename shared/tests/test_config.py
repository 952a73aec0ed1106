"""Strict configuration: what goes in comes out, and everything else is refused by name."""

from __future__ import annotations

import json
import math
import string
import subprocess
import sys
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab_shared.config import ConfigError, from_json, preset_cli, to_json


@dataclass(frozen=True)
class Optim:
    """How weights move."""

    lr: float = 3e-4
    """Peak rate."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True)
class Config:
    name: str
    optim: Optim = field(default_factory=Optim)
    layers: int = 4
    cap: int | None = None
    scale: int | float = 1
    widths: tuple[int, ...] = ()
    flags: dict[str, bool] = field(default_factory=dict)
    notes: list[str | None] = field(default_factory=list)
    head: Optim | None = None


text = st.text(string.printable + "äπ→", max_size=8)
optims = st.builds(
    Optim,
    lr=st.floats(allow_nan=False),
    schedule=st.sampled_from(["cosine", "wsd"]),
    betas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
configs = st.builds(
    Config,
    name=text,
    optim=optims,
    layers=st.integers(),
    cap=st.none() | st.integers(),
    scale=st.integers() | st.floats(allow_nan=False),
    widths=st.lists(st.integers(), max_size=3).map(tuple),
    flags=st.dictionaries(text, st.booleans(), max_size=3),
    notes=st.lists(st.none() | text, max_size=3),
    head=st.none() | optims,
)


@given(configs)
def test_round_trip(config):
    written = to_json(config)
    json.loads(written, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    read = from_json(Config, written)
    assert read == config
    assert type(read.scale) is type(config.scale)
    assert to_json(read) == written


def test_nan_survives():
    assert math.isnan(from_json(Optim, to_json(Optim(lr=math.nan))).lr)


def altered(path: str, value: Any) -> str:
    """The JSON of a good configuration with one place changed."""
    data = json.loads(to_json(Config("a")))
    *parents, last = path.split(".")
    inner = data
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("layer", 3, r"unknown key 'layer' \(did you mean 'layers'\?\); Config has name, optim"),
        ("optim.lrr", 1.0, r"unknown key 'optim.lrr' \(did you mean 'lr'\?\)"),
        ("zzzz", 1, r"unknown key 'zzzz'; Config has"),
        ("layers", 4.0, r"layers: expected int, found 4.0"),
        ("layers", True, r"layers: expected int, found true"),
        ("layers", "4", r'layers: expected int, found "4"'),
        ("name", None, r"name: expected str, found null"),
        ("optim.lr", "0.1", r"optim.lr: expected a number"),
        ("optim.lr", True, r"optim.lr: expected a number, found true"),
        (
            "optim.schedule",
            "cosin",
            r"optim.schedule: expected one of 'cosine', 'wsd' \(did you mean 'cosine'\?\)",
        ),
        ("optim.betas", [0.9], r"optim.betas: expected a list of 2 elements, found \[0.9\]"),
        ("optim.betas", [0.9, "x"], r"optim.betas\[1\]: expected a number"),
        ("optim", 3, r"optim: expected an object with the fields of Optim"),
        ("cap", 1.5, r"cap: expected int, found 1.5"),
        ("scale", "1", r"scale: expected int, found \"1\" \| scale: expected a number"),
        ("flags", {"on": 1}, r"flags.on: expected bool, found 1"),
        ("head", {"lr": 1, "beta": 2}, r"unknown key 'head.beta' \(did you mean 'betas'\?\)"),
    ],
)
def test_wrong_values_are_refused_by_name(path, value, message):
    with pytest.raises(ConfigError, match=message):
        from_json(Config, altered(path, value))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ('{"name": "a", "name": "b"}', "'name' appears 2 times"),
        ("{}", "missing key 'name'"),
        ("[]", "the configuration: expected an object"),
        ('{"name": "a"', "not JSON"),
        ('{"name": "a", "optim": {"lr": NaN}}', "NaN is not JSON"),
    ],
)
def test_bad_files(written, message):
    with pytest.raises(ConfigError, match=message):
        from_json(Config, written)


def test_absent_keys_take_the_default():
    assert from_json(Config, '{"name": "a", "optim": {"lr": 1}}') == Config("a", Optim(lr=1.0))


def test_a_config_that_breaks_its_own_types_is_not_written():
    with pytest.raises(ConfigError, match="layers: expected int"):
        to_json(Config("a", layers="four"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dataclass instance"):
        to_json(Config)


def test_an_annotation_json_cannot_hold_is_a_programming_error():
    @dataclass(frozen=True)
    class Odd:
        x: set = field(default_factory=set)

    with pytest.raises(TypeError, match=r"x: .*set.* is not a type"):
        from_json(Odd, '{"x": []}')


PRESETS = {
    "small": ("The small one.", Config("small")),
    "large": ("The large one.", Config("large", layers=8)),
}


def test_preset_cli_overrides_fields_of_a_preset():
    assert preset_cli(PRESETS, ["small"], "prog") == Config("small")
    got = preset_cli(PRESETS, ["large", "--optim.lr", "1e-3", "--optim.schedule", "wsd", "--cap", "7"], "prog")
    assert got == replace(PRESETS["large"][1], optim=Optim(lr=1e-3, schedule="wsd"), cap=7)


@pytest.mark.parametrize("argv", [["huge"], ["small", "--layerz", "3"], ["small", "--layers", "x"]])
def test_preset_cli_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        preset_cli(PRESETS, argv, "prog")
    assert stop.value.code == 2
    assert capsys.readouterr().err


def test_config_imports_no_torch():
    code = "import sys, lab_shared.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
