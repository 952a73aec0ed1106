"""Several seeds of one experiment: mean and spread of what diagnostics found, and E4's own criteria."""

from dataclasses import replace

import pytest
from lab_shared.config import to_json
from lab_shared.errors import UserError
from rh_memory import diagnostics
from rh_memory.config import PRESETS
from rh_memory.diagnostics import aggregate


def _result(seed: int, removal: float, zeroed: float, share: float) -> dict:
    return {
        "seed": seed,
        "base": {"value": 0.1 * seed},
        "removed": [{"slot": 0, "value": removal, "low": removal / 2, "high": 2 * removal}],
        "content": {
            "identity_only": {"value": zeroed},
            "content_only": {"value": 0.01},
            "content_only_share_of_gain": share,
        },
    }


def test_e4_verdict_and_seeds_table():
    good = [_result(7, 0.03, 0.05, 0.1), _result(42, 0.03, 0.05, 0.1), _result(1337, 0.0, 0.05, 0.1)]
    assert aggregate.e4_verdict(good)["met"] is True
    assert aggregate.e4_verdict(good[:2])["met"] is None
    bad = [_result(1, 0.01, 0.05, 0.1), _result(2, 0.01, 0.05, 0.1), _result(3, 0.03, 0.05, 0.1)]
    verdict = aggregate.e4_verdict(bad)
    assert [row["met"] for row in verdict["criteria"]] == [False, True, True]
    assert verdict["met"] is False
    assert aggregate.over_seeds(good).summary["nll_last"].n == 3
    with pytest.raises(UserError, match="twice"):
        aggregate.over_seeds([good[0], good[0]])


def test_seeds_by_the_original_formulas_get_mean_and_spread(tmp_path, monkeypatch, capsys):
    def by_formula(run, **_):
        value = float(run.name[-1])
        tests = {
            "A ablation": {"nll": value, "largest": 2 * value},
            "C gradient correlation": {"mean_abs_correlation": 0.3},
            "G error growth": {"slope": None},
            "J permutation": {"relative_increase": 0.01},
            "K gradient rank": {"ratio": value},
        }
        tests = {name: {**found, "passes": None, "vacuous": "why"} for name, found in tests.items()}
        return {"run": run.name, "label": "made-up", "seed": int(value), "memory": "postfix", "legacy": tests}

    monkeypatch.setattr(diagnostics, "diagnose", by_formula)
    for seed in (1, 2, 3):
        (tmp_path / f"e4-seed{seed}").mkdir()
        config = to_json(replace(PRESETS["e4"][1], seed=seed))
        (tmp_path / f"e4-seed{seed}" / "config.json").write_text(config)
    result = diagnostics.main(tmp_path / "e4-seed*", legacy=True)
    assert result["summary"]["nll"]["mean"] == pytest.approx(2)
    assert result["summary"]["largest_ablation"]["sd"] == pytest.approx(2)
    assert "error_growth_slope" not in result["summary"]  # too few steps for one
    assert "e4" not in result
    assert "gradient_rank_ratio" in capsys.readouterr().out
