"""What the runs of a grid say about each claim: holds, fails, or undecided, computed from the records and nothing else.

A run is {"grid", "cell", "seed", "settings", "summary"} as `grid.train_cell` leaves it; runs that two grids share count
once. Intervals are Student's t over seeds, but that of H2, which is a bootstrap over runs; a claim about means is
decided only where such an interval excludes the alternative, so that one seed decides nothing. Claims about every
single run (the closed form of H1, the zeros of H5) are decided by the run farthest off, and that of the threshold by
definition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gauge_attn import hypotheses, seed_claims
from gauge_attn.comparisons import Run, Verdict


def verdicts(runs: Sequence[Run]) -> list[Verdict]:
    """One record, as `Verdict` has it, per claim that any of the runs bears on."""
    checks: list[Callable[[Sequence[Run]], Verdict | None]] = [
        seed_claims.low_spin_cannot,
        seed_claims.order_is_capacity,
        seed_claims.lower_kappa_no_variation,
        seed_claims.tiny_kappa_unstable,
        hypotheses.closed_form,
        seed_claims.shared_kappa_makes_the_order,
        hypotheses.l_matters_once_standardised,
        hypotheses.alignment_is_harmless,
        hypotheses.alignment_makes_uniform,
        hypotheses.taylor_changes_high_l,
        hypotheses.gauge_fixed_is_zero,
        hypotheses.diagonal_matters,
        hypotheses.frames_matter,
        hypotheses.curvature_matters,
        hypotheses.more_tensors_help,
        hypotheses.pure_tensors_help,
        seed_claims.low_spin_is_useless,
        seed_claims.threshold_is_reachable,
    ]
    return [verdict for check in checks if (verdict := check(runs)) is not None]
