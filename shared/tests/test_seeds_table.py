"""Tables over seeds, and the quantiles of Student's t that their intervals rest on."""

from __future__ import annotations

import math

import pytest
from lab_shared.stats import seeds_table, student_t_cdf, student_t_quantile


@pytest.mark.parametrize(
    ("p", "dof", "expected"),  # Abramowitz and Stegun, table 26.10
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 3, 3.182),
        (0.95, 4, 2.132),
        (0.995, 7, 3.499),
        (0.975, 30, 2.042),
    ],
)
def test_student_t(p: float, dof: int, expected: float) -> None:
    assert student_t_quantile(p, dof) == pytest.approx(expected, abs=5e-4)


def test_student_t_limits() -> None:
    assert student_t_quantile(0.5, 3) == pytest.approx(0, abs=1e-12)
    assert student_t_quantile(0.9, 1) == pytest.approx(math.tan(math.pi * 0.4))  # Cauchy
    assert student_t_quantile(0.975, 10_000) == pytest.approx(1.96, abs=1e-3)
    with pytest.raises(ValueError, match=r"p=1\.0"):
        student_t_quantile(1.0, 3)


@pytest.mark.parametrize("dof", [1, 2, 3, 8, 31])
def test_student_t_cdf(dof: int) -> None:
    for p in (0.6, 0.9, 0.999):
        t = student_t_quantile(p, dof)
        assert student_t_cdf(t, dof) == pytest.approx(p)
        assert student_t_cdf(-t, dof) == pytest.approx(1 - p)
    assert student_t_cdf(math.inf, dof) == pytest.approx(1)


def test_seeds_table() -> None:
    table = seeds_table([{"seed": 7, "loss": 1.0, "angle": 50.0}, {"seed": 8, "loss": 2.0, "angle": 50.0}])
    loss = table.summary["loss"]
    assert (loss.n, loss.mean, loss.sd) == (2, 1.5, pytest.approx(math.sqrt(0.5)))
    assert loss.high - loss.mean == pytest.approx(12.7062 * 0.5, abs=1e-3)
    assert table.summary["angle"].low == table.summary["angle"].high == 50
    assert table.text().splitlines() == [
        "seed                     loss     angle",
        "7                           1        50",
        "8                           2        50",
        "mean                      1.5        50",
        "sd                     0.7071         0",
        "95% interval  -4.853 to 7.853  50 to 50",
    ]
    lines = table.markdown().splitlines()
    assert lines[1] == "| ------------ | --------------: | -------: |"
    assert len({line.count("|") for line in lines}) == 1
    assert len({len(line) for line in lines}) == 1


def test_one_seed_has_no_interval() -> None:
    table = seeds_table([{"seed": 0, "loss": 1.25}])
    assert table.summary["loss"].sd is None
    assert table.text().splitlines()[-1].split() == ["95%", "interval", "n/a"]


def test_seeds_table_refuses() -> None:
    with pytest.raises(ValueError, match="no rows"):
        seeds_table([])
    with pytest.raises(ValueError, match="own 'seed'"):
        seeds_table([{"seed": 1, "loss": 1.0}, {"seed": 1, "loss": 2.0}])
    with pytest.raises(ValueError, match="own 'seed'"):
        seeds_table([{"loss": 1.0}])
    with pytest.raises(ValueError, match="seed 2: metric 'lost' is not in every row"):
        seeds_table([{"seed": 1, "lost": 1.0}, {"seed": 2}])
