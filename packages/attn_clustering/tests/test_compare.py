"""Paired comparisons of orderings, the correction for a family, and the verdict."""

import pytest
from attn_clustering.analysis.compare import (
    Comparison,
    by_seed,
    compare,
    complete,
    metric,
    not_recovered,
    primary,
    table,
    verdict,
)
from attn_clustering.analysis.original import BANDS, JSON_RECORD, LOG_TABLE, band_values


def result(ordering, seed, accuracy, attention="mha", phase="drope", recal="r", bayes=0.9, excess=0.01):
    recal = recal if phase in ("drope", "extra") else None
    return {
        "run": {"attention": attention, "ordering": ordering, "seed": seed, "phase": phase, "recal": recal},
        "probe": {"middle": accuracy, "token": 0.3, "bayes": bayes, "middle_places": [1]},
        "attention": {"excess_lag": excess},
        "training": {"val_loss": 5.0, "recovered": ordering == "shuffled"},
    }


def matrix(gain, seeds=6, attentions=("mha", "gqa")):
    return [
        result(ordering, seed, 0.5 + 0.001 * seed + (gain if ordering == "topic_ordered" else 0), attention)
        for ordering in ("shuffled", "topic_ordered")
        for seed in range(seeds)
        for attention in attentions
    ]


def test_endpoint_is_the_fraction_of_floor_to_ceiling():
    assert metric(result("shuffled", 0, 0.6), "endpoint") == pytest.approx(0.5)
    assert metric(result("shuffled", 0, 0.6, bayes=None), "endpoint") is None
    assert metric(result("shuffled", 0, 0.6), "transfer") is None


def test_a_block_has_the_accuracy_after_it():
    one = result("shuffled", 0, 0.6)
    one["probe"]["accuracy"] = [0.2, 0.3, 0.4]  # embedding, block 1, block 2
    assert metric(one, "block 2") == 0.4


def test_primary_pairs_mha_runs_by_seed():
    found = primary(matrix(0.06), "r")
    assert found.seeds == tuple(range(6))
    assert found.attention == "mha"
    assert found.difference == pytest.approx(0.1)
    assert found.p == pytest.approx(2 / 64)
    assert found.stars == "*"
    assert primary(matrix(0.06), "another recalibration") is None
    assert by_seed(matrix(0.06), "probe", "gqa", "shuffled", "drope", "r")[3] == pytest.approx(0.503)


def test_a_seed_without_all_conditions_counts_nowhere():
    whole = matrix(0.06)
    incomplete = [r for r in whole if r is not whole[10]]  # mha, shuffled, seed 5
    assert {r["run"]["seed"] for r in complete(incomplete) if r["run"]["attention"] == "mha"} == set(range(5))
    assert primary(incomplete, "r").seeds == tuple(range(5))


def test_a_part_run_on_fewer_seeds_takes_none_from_the_others():
    some = matrix(0.06)[:-1]  # gqa, topic_ordered, seed 5 is missing
    some += [result(ordering, 0, 0.6, phase="nope") for ordering in ("shuffled", "topic_ordered")]
    assert primary(some, "r").seeds == tuple(range(6))
    by_contrast = {(c.attention, c.phase): c.seeds for c in table(some, "r") if c.role == "secondary"}
    assert by_contrast["gqa", "drope"] == tuple(range(5))
    assert by_contrast["mha", "nope"] == (0,)


@pytest.mark.parametrize(
    ("gain", "seeds", "expected"),
    [
        (0.06, 6, "supported"),
        (0.06, 5, "undecided"),
        (-0.06, 6, "refuted"),
        (0.06, 1, "undecided"),
        (0.004, 8, "real and negligible"),
    ],
)
def test_verdict(gain, seeds, expected):
    assert verdict(primary(matrix(gain, seeds), "r"))[0] == expected


def test_verdict_without_a_difference_depends_on_the_interval():
    def comparison(low, high):
        return Comparison(
            "endpoint", "a", "b", "all", "drope", tuple(range(8)), (0.0,) * 8, (0.0,) * 8, 0, low, high, 0.5
        )

    assert verdict(comparison(-0.02, 0.009))[0] == "refuted"
    assert verdict(comparison(-0.05, 0.05))[0] == "undecided"
    assert verdict(None)[0] == "undecided"
    no_ceiling = [{**r, "probe": {**r["probe"], "bayes": None}} for r in matrix(0.06)]
    assert verdict(primary(no_ceiling, "r"))[0] == "undecided"


def test_no_stars_below_six_seeds():
    five = compare(matrix(0.5, 5), "probe", "topic_ordered", "shuffled", recal="r")
    assert five.p == 2 / 32
    assert five.stars == ""


def test_secondary_family_is_the_registered_one():
    results = matrix(0.06, 8)
    for ordering in ("shuffled", "topic_ordered"):
        results += [
            result(ordering, seed, 0.6, "mha", phase) for phase in ("rope", "extra", "nope") for seed in range(8)
        ]
    results += [result("random_blocks", seed, 0.55) for seed in range(8)]
    found = table(results, "r")
    family = [one for one in found if one.role == "secondary"]
    assert [(c.metric, c.treated, c.control, c.attention, c.phase) for c in family] == [
        ("endpoint", "topic_ordered", "shuffled", "gqa", "drope"),
        ("endpoint", "random_blocks", "shuffled", "mha", "drope"),
        ("endpoint", "topic_ordered", "random_blocks", "mha", "drope"),
        ("endpoint", "topic_ordered", "shuffled", "mha", "rope"),
        ("endpoint", "topic_ordered", "shuffled", "mha", "extra"),
        ("endpoint", "topic_ordered", "shuffled", "mha", "nope"),
        ("excess_lag", "topic_ordered", "shuffled", "mha", "drope"),
    ]
    assert family[0].p == pytest.approx(2 / 256)
    assert family[0].p_holm == pytest.approx(7 * 2 / 256)
    rest = [one for one in found if one.role == "exploratory"]
    assert rest
    assert not any(one.stars or one.p_holm is not None for one in rest)
    first = primary(results, "r")
    assert first not in found
    assert not_recovered(results, first, "r") == (8, 16)


def test_the_two_records_of_the_original_disagree_in_every_row():
    assert JSON_RECORD.keys() == LOG_TABLE.keys()
    for name, row in JSON_RECORD.items():
        assert len(row.probe) == 9
        assert abs(row.val_loss - LOG_TABLE[name].val_loss) > 0.01
    json_effect = JSON_RECORD["mha-topic_ordered"].val_loss - JSON_RECORD["mha-shuffled"].val_loss
    log_effect = LOG_TABLE["mha-topic_ordered"].val_loss - LOG_TABLE["mha-shuffled"].val_loss
    assert json_effect > 0 > log_effect


@pytest.mark.parametrize("name", list(JSON_RECORD))
def test_the_record_itself_lies_in_the_acceptance_bands(name):
    row = JSON_RECORD[name]
    phase = "drope" if name.endswith("drope") else "rope"
    found = band_values(phase, row.val_loss, list(row.probe), row.within)
    assert set(found) < set(BANDS)
    assert all(inside for _, inside in found.values())
