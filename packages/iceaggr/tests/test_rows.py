"""The rows that a hierarchical model's pulses are laid out in."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from iceaggr.data.grouping import group_doms
from iceaggr.data.pulses import Pulses
from iceaggr.data.rows import SEQUENCE, attended_bound, count_attended, lay_out, plan_rows


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(1, 900), min_size=1, max_size=8),
    sensors=st.sampled_from([1, 3, 60, 5160]),
    limit=st.sampled_from([None, 2, 3]),
    spare=st.integers(0, 700),
)
def test_rows_hold_each_pulse_once_and_whole_chunks(make_pulses, counts, sensors, limit, spare):
    doms = group_doms(make_pulses(counts, sensors=sensors))
    n_pulses, n_attended = sum(counts), count_attended(doms)
    plan = plan_rows(n_pulses + spare, min(n_attended + spare, n_pulses + spare), limit)
    row_P, offsets_BK = lay_out(doms, plan)
    assert offsets_BK.shape == (plan.batches, plan.batch_rows + 1)
    assert len(set(row_P.tolist())) == n_pulses
    assert int(row_P.max()) < plan.rows
    dom_R = np.full(plan.rows, -1)
    dom_R[row_P.numpy()] = doms.dom_of_pulse_P.numpy()
    attended = plan.batches * plan.batch_rows
    segments: dict[int, list[int]] = {}
    for b, offsets in enumerate(offsets_BK.numpy()):
        for low, high in pairwise(offsets):
            rows = dom_R[b * plan.batch_rows + low : b * plan.batch_rows + high]
            if rows.size:
                assert 0 <= rows.min() == rows.max()  # pulses of one DOM, no unused row
                segments.setdefault(int(rows[0]), []).append(rows.size)
        assert (dom_R[b * plan.batch_rows + offsets[-1] : (b + 1) * plan.batch_rows] == -1).all()
    count_D = doms.count_D.numpy()
    for dom, lengths in segments.items():
        assert sum(lengths) == count_D[dom]
        assert len(lengths) == -(-count_D[dom] // SEQUENCE)
        assert max(lengths) - min(lengths) <= 1
    behind = dom_R[attended:]
    assert (count_D[behind[behind >= 0]] == 1).all()
    assert set(np.flatnonzero(count_D > 1)) <= set(segments)
    if limit is not None:
        assert plan.batch_rows <= SEQUENCE * limit


def test_the_bound_is_known_without_looking_at_pulses(make_pulses):
    for sensors in (1, 5, 60, 5160):
        pulses = make_pulses(np.random.default_rng(1).integers(1, 200, 40), sensors=sensors)
        doms = group_doms(pulses)
        several_D = torch.where(doms.count_D > 1, doms.count_D, 0)
        attended_E = torch.zeros(40, dtype=torch.int64).index_add_(0, doms.event_D, several_D).numpy()
        bound_E = attended_bound(pulses.counts_E.numpy(), doms.offsets_E1.diff().numpy())
        assert (attended_E <= bound_E).all()
        assert (bound_E <= pulses.counts_E.numpy()).all()
    # exact where no DOM has more than two
    assert attended_bound(np.array([7]), np.array([5])).tolist() == [4]


@pytest.mark.parametrize("sizes", [[512] * 40, [513] * 40, [511, 2] * 30, [20_000], [1] * 3000 + [600] * 20])
def test_mini_batches_lose_about_511_rows_each(sizes):
    """DOMs whose chunks fit the mini-batches badly."""
    n = sum(sizes)
    pulses = Pulses(
        event_id_E=torch.tensor([1]),
        offsets_E1=torch.tensor([0, n]),
        sensor_P=torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).int(),
        time_P=torch.arange(n).int(),
        charge_P=torch.ones(n),
        auxiliary_P=torch.zeros(n, dtype=torch.bool),
    )
    doms = group_doms(pulses)
    attended = count_attended(doms)
    plan = plan_rows(n, attended, 4)
    row_P, _ = lay_out(doms, plan)
    assert plan.batches == -(-attended // (4 * 512 - 511))
    assert len(torch.unique(row_P)) == n
    assert int(row_P.max()) < plan.rows <= n + 511 * (plan.batches - 1) + 4 * 512


def test_no_mini_batch_is_too_small_for_a_chunk():
    assert (plan_rows(178_250, 170_000, 64).batch_rows, plan_rows(178_250, 170_000, 64).batches) == (32_768, 6)
    with pytest.raises(ValueError, match="max_batch_size is 1"):
        plan_rows(10, 5, 1)
