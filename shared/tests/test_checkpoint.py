"""Checkpoints: exact round trips, no half files, damage noticed, weights that fit or say why not."""

from __future__ import annotations

import errno
import os
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_shared.checkpoint import (
    CheckpointError,
    checkpoint_path,
    encode_tree,
    load_tree,
    load_weights,
    model_tensors,
    newest_checkpoint,
    rng_state,
    save_checkpoint,
    save_weights,
    seed_everything,
    set_rng_state,
)
from lab_shared.files import StorageError, atomic_write
from lab_shared.tree_file import decode_tree
from torch import nn

CPU = torch.device("cpu")


def assert_same(a, b):
    """Equal in value, type and bits."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.contiguous().numpy().tobytes() == b.numpy().tobytes()
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b or (a != a and b != b)


def make_tensor(dtype, shape, seed):
    bits = torch.from_numpy(np.random.default_rng(seed).integers(0, 2, shape).astype(np.uint8))
    return bits.to(dtype)


tensors = st.builds(
    make_tensor,
    st.sampled_from([torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.integers(0, 9),
)
arrays = st.builds(
    lambda kind, n: np.arange(n).astype(kind),
    st.sampled_from(["u4", "f4", "i8", "c16", "U3", "?"]),
    st.integers(0, 4),
)
keys = st.text(max_size=4) | st.sampled_from(["~tensor", "a.b", "~dict"]) | st.integers() | st.none()
trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | tensors | arrays,
    lambda x: st.lists(x, max_size=3) | st.lists(x, max_size=3).map(tuple) | st.dictionaries(keys, x, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(["model", "optim", "rng"]), trees))
def test_any_tree_comes_back_as_it_was(tree):
    assert_same(tree, decode_tree(encode_tree(tree)))


def test_names_in_the_file_are_paths_in_the_tree():
    import safetensors.torch

    data = encode_tree({"optim": {"state": {3: {"exp_avg": torch.ones(2)}}}, "rng": [torch.zeros(1)]})
    assert sorted(safetensors.torch.load(data)) == ["optim.state.3.exp_avg", "rng.0"]


def test_colliding_paths_do_not_lose_a_tensor():
    tree = {"a": {"b": torch.zeros(1)}, "a.b": torch.ones(1), "c": {1: torch.zeros(1), "1": torch.ones(1)}}
    assert_same(tree, decode_tree(encode_tree(tree)))


def test_views_and_aliases():
    x = torch.arange(6.0)
    tree = {"whole": x, "again": x, "part": x[:3], "turned": x.view(2, 3).T, "empty": x[:0], "none": x[3:3]}
    back = decode_tree(encode_tree(tree))
    for name in tree:
        assert torch.equal(back[name], tree[name])
    assert back["whole"] is back["again"]


def test_bf16_bits_survive():
    x = torch.randn(5).bfloat16()
    assert torch.equal(decode_tree(encode_tree({"x": x}))["x"].view(torch.int16), x.view(torch.int16))


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: 0, np.array([object()])])
def test_other_objects_are_refused_by_place(value):
    with pytest.raises(TypeError, match=r"state\.data\.1 "):
        encode_tree({"state": {"data": [0, value]}})


def test_every_kind_of_damage_is_noticed(tmp_path):
    data = encode_tree({"model": {"w": torch.randn(50)}, "loop": {"step": 3}})
    path = tmp_path / "x.safetensors"
    damaged = [data[:n] for n in (0, 4, 20, len(data) // 2, len(data) - 1)]
    damaged += [data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :] for i in range(0, len(data), 7)]
    for text in [*damaged, b"PK\x03\x04 a pickle in a zip", data + b"x"]:
        path.write_bytes(text)
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            load_tree(path)
    with pytest.raises(CheckpointError, match=r"cannot read .*absent"):
        load_tree(tmp_path / "absent")


def test_pruning_keeps_the_newest(tmp_path):
    for step in (1, 2, 10, 9):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step_000000009.safetensors",
        "step_000000010.safetensors",
    ]


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path):
    assert newest_checkpoint(tmp_path) == (None, [])
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"step": step}, keep=3)
    path = checkpoint_path(tmp_path, 3)
    path.write_bytes(path.read_bytes()[:-5])
    tree, skipped = newest_checkpoint(tmp_path)
    assert tree == {"step": 2}
    assert len(skipped) == 1
    assert "step_000000003" in skipped[0]
    assert newest_checkpoint(tmp_path) == ({"step": 2}, [])
    for step in (1, 2):
        checkpoint_path(tmp_path, step).write_bytes(b"")
    for _ in range(2):  # the second time too: nothing begins from zero by itself
        with pytest.raises(CheckpointError, match=r"no readable checkpoint .* delete that folder to begin"):
            newest_checkpoint(tmp_path)
    assert len(list(tmp_path.glob("step_*.safetensors"))) == 2


@pytest.mark.parametrize("call", ["fsync", "replace", "write"])
def test_a_full_disk_costs_no_checkpoint(tmp_path, monkeypatch, call):
    save_checkpoint(tmp_path, 1, {"x": torch.zeros(3)}, keep=1)
    before = checkpoint_path(tmp_path, 1).read_bytes()

    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if call == "write":
            patch.setattr("lab_shared.files.open", _FullFile, raising=False)
        else:
            patch.setattr(f"lab_shared.files.os.{call}", full)
        with pytest.raises(StorageError, match=r"step_000000002.*No space left.*free some space.*step_000000001"):
            save_checkpoint(tmp_path, 2, {"x": torch.ones(3)}, keep=1)
    assert checkpoint_path(tmp_path, 1).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["step_000000001.safetensors"]


class _FullFile:
    """A file on a disk that fills up in the middle of a write."""

    def __init__(self, path, mode):
        self.file = open(path, mode)  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*file/sub: .*choose another folder"):
        save_checkpoint(tmp_path / "file" / "sub", 1, {})
    with pytest.raises(StorageError, match="No such file"):
        atomic_write(tmp_path / "absent" / "x", "text")


class Tied(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embed.weight


def test_weights_round_trip_with_ties_and_wrappers(tmp_path):
    import safetensors.torch

    path, model, other = tmp_path / "w.safetensors", Tied(), Tied()
    model.norm.running_mean.fill_(3)
    save_weights(path, torch.compile(model), {"step": "5"})
    assert "head.weight" not in safetensors.torch.load_file(path)
    assert load_weights(path, torch.compile(other))["step"] == "5"
    for name, x in model_tensors(model).items():
        assert torch.equal(x, model_tensors(other)[name])
    assert other.head.weight is other.embed.weight
    assert not any("_orig_mod" in name for name in model_tensors(nn.Sequential(torch.compile(nn.Linear(1, 1)))))


def test_weights_that_do_not_fit_change_nothing_and_say_why(tmp_path):
    import safetensors.torch

    path, model = tmp_path / "w.safetensors", Tied()
    before = {name: x.clone() for name, x in model_tensors(model).items()}
    bad = {
        "embed.weight": torch.zeros(7, 5),
        "norm.weight": torch.zeros(4, dtype=torch.int64),
        "norm.bias": torch.zeros(4),
        "extra": torch.zeros(1),
    }
    safetensors.torch.save_file(bad, path)
    with pytest.raises(CheckpointError) as caught:
        load_weights(path, model)
    for part in (
        "w.safetensors does not fit the model",
        "unexpected extra",
        "embed.weight has shape (7, 5), the model wants (7, 4)",
        "norm.weight has type torch.int64, the model wants torch.float32",
        "missing norm.running_mean",
    ):
        assert part in str(caught.value)
    for name, x in model_tensors(model).items():
        assert torch.equal(x, before[name])


def test_tied_tensors_that_differ_in_the_file_are_refused(tmp_path):
    import safetensors.torch

    untied = {name: x.clone() for name, x in model_tensors(Tied()).items()}
    safetensors.torch.save_file(untied, tmp_path / "w")
    load_weights(tmp_path / "w", Tied())
    untied["head.weight"] += 1
    safetensors.torch.save_file(untied, tmp_path / "w")
    with pytest.raises(CheckpointError, match=r"embed.weight and head.weight are one tensor .* but differ"):
        load_weights(tmp_path / "w", Tied())


def draw():
    return random.random(), np.random.rand(), torch.rand(3).tolist()  # noqa: NPY002


def test_random_state_round_trip():
    seed_everything(5)
    first = draw()
    state = decode_tree(encode_tree(rng_state(CPU)))
    second = draw()
    set_rng_state(state, CPU)
    assert draw() == second != first
    seed_everything(5)
    assert draw() == first


def test_random_state_of_another_device_is_refused():
    state = {**rng_state(CPU), "cuda": torch.zeros(16, dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match="written on cuda, this run is on cpu"):
        set_rng_state(state, CPU)


def test_a_checkpoint_that_cannot_be_read_now_is_left_alone(tmp_path, monkeypatch):
    path = save_checkpoint(tmp_path, 1, {"x": 1})

    def fail(self):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(type(path), "read_bytes", fail)
        with pytest.raises(CheckpointError, match="Permission denied: make it readable"):
            newest_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path) == ({"x": 1}, [])
