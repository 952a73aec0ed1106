"""What the pre-registered rules make of a matrix: recovery, learning, and seeds that are not complete."""

from dataclasses import replace
from pathlib import Path

import pytest
from attn_clustering.conclusion import LEARNED_WITHIN, conclude
from attn_clustering.data.levels import FLOORS
from attn_clustering.experiments import EXPERIMENTS
from attn_clustering.report_data import MatrixFiles, condition_rows

EXPERIMENT = EXPERIMENTS["controlled-small"][1]
RECAL = EXPERIMENT.recals[0].name
FLOOR = 2.0


def analysed(ordering, seed, phase, *, probe=0.6, recovered=True, above=0.1):
    """The part of an analysis.json that conclusions rest on."""
    return {
        "run": {
            "name": f"{ordering}-s{seed}-{phase}",
            "attention": "mha",
            "ordering": ordering,
            "seed": seed,
            "phase": phase,
            "recal": RECAL if phase == "drope" else None,
        },
        "probe": {"middle": probe, "token": 0.3, "bayes": 0.9, "middle_places": [1]},
        "attention": {},
        "training": {"val_loss": FLOOR + above, "recovered": recovered},
    }


def matrix(*, seeds=8, gain=0.06, recovered=True, above=0.1, levels=True):
    """gain of the topic_ordered probe over the shuffled one; both models of every seed, before and after DroPE."""
    results = [
        analysed(ordering, seed, phase, probe=0.6 + 0.01 * seed + (ordering == "topic_ordered") * gain,
                 recovered=recovered, above=above)
        for seed in range(seeds)
        for ordering in ("shuffled", "topic_ordered")
        for phase in ("rope", "drope")
    ]  # fmt: skip
    floors = {str(seed): FLOOR for seed in range(10)}
    floor = {FLOORS: floors, "unigram_filter": {"value": 4.0}} if levels else None
    return MatrixFiles(Path("nowhere"), EXPERIMENT, results, {}, [], floor)


def test_a_clean_matrix_is_judged_by_its_primary_contrast_alone():
    found = conclude(matrix())
    assert (found.word, found.named) == ("supported", "supported")
    assert found.primary.difference == pytest.approx(0.06 / 0.6)
    assert (found.not_recovered, found.models, found.left_out) == (0, 16, ())
    assert found.above_floor == pytest.approx(0.1)
    assert found.learned
    assert "counts as learned" in " ".join(found.sentences())
    assert conclude(matrix(gain=-0.06)).word == "refuted"
    assert conclude(matrix(seeds=5)).word == "undecided"


def test_the_verdict_names_broken_models_and_a_language_not_learned():
    broken = conclude(matrix(recovered=False))
    assert broken.named == "supported, about models that DroPE left broken"
    assert "16 of 16 of these models did not recover" in broken.sentences()[0]
    half = matrix()
    for r in half.results:
        r["training"]["recovered"] = r["run"]["ordering"] == "shuffled"
    assert not conclude(half).broken  # more than half is asked
    hard = conclude(matrix(above=LEARNED_WITHIN + 0.01))
    assert hard.named == "supported, on a language that counts as not learned"
    assert conclude(matrix(levels=False)).learned is None


def test_a_seed_without_all_conditions_is_left_out_and_named():
    files = matrix(seeds=7)
    partly = replace(files, results=[*files.results, analysed("shuffled", 9, "rope")])
    found = conclude(partly)
    assert found.primary.seeds == tuple(range(7))
    assert found.left_out == (9,)
    assert "left out: 9." in found.sentences()[-1]


def test_conditions_list_complete_seeds_with_their_numbers():
    files = matrix(seeds=2)
    rows = condition_rows(replace(files, results=[*files.results, analysed("shuffled", 9, "rope")]))
    assert [(row["phase"], row["ordering"], row["seeds"]) for row in rows] == [
        (phase, ordering, 2) for ordering in ("shuffled", "topic_ordered") for phase in ("rope", "drope")
    ]
    assert rows[0]["endpoint"] == pytest.approx([0.5, 0.31 / 0.6])
    assert rows[0]["above"] == pytest.approx([0.1, 0.1])
    assert condition_rows(matrix(levels=False))[0]["above"] == []
