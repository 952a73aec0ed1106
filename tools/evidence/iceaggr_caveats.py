"""How far the ablation studies go: trainings on the plateau, verdicts that correction would not leave, events kept."""

from __future__ import annotations

import math

from evidence.iceaggr_ablations import RESULTS, corrected, curves_of, path_of, studies, study_claim
from evidence.record import ROOT, Claim, bare, read

SIGNIFICANT = 0.05


def claims() -> list[Claim]:
    """Of every study: when its runs left the plateau, and which of its verdicts stand after Holm's correction."""
    found = [claim for study in studies() for claim in (_plateau(study), _corrected(study))]
    return [*found, _kept_events()] if studies() else found


def _plateau(study: str) -> Claim:
    """How many runs were still on the plateau, and whether those that left it late ended worse."""
    from iceaggr.ablation_curves import PLATEAU_DEG, left_plateau, still_on_plateau

    record, curves = read(path_of(study)), read(curves_of(study))
    half, end = (sum(still_on_plateau(run, share) for run in curves) for share in (0.5, 1.0))
    ends = {
        (row["name"], seed): mean
        for row in record["rows"]
        for seed, mean in zip(record["budget"]["seeds"], row["seed_means"], strict=True)
    }
    left = [left_plateau(run) or math.inf for run in curves]
    final = [ends[run["variant"], run["seed"]] for run in curves]
    values = [half, end, spearman(left, final)]
    off = [(x, y) for x, y in zip(left, final, strict=True) if x < math.inf]
    those = ""
    if len(off) < len(left):
        values.append(spearman([x for x, _ in off], [y for _, y in off]))
        those = f", {bare(values[-1], 2)} over the {len(off)} that did"
    return study_claim(
        study,
        "plateau",
        f"{half} of the {len(curves)} trainings had not fallen below {PLATEAU_DEG:g} degrees of training angle by half "
        f"of their events, {end} not by the end; Spearman's correlation over the runs between when they did and their "
        f"final error is {bare(values[2], 2)}{those} ({record['label']}).",
        "runs on the plateau at half and at the end; rank correlation of leaving it with the final error, of all runs "
        "(never is last) and of those that left it",
        values,
        "measured",
        raw=[path_of(study), curves_of(study)],
    )


def spearman(x: list[float], y: list[float]) -> float:
    """Correlation of the ranks, ties at their mean: that of the package, with everything in one event."""
    import torch
    from iceaggr.analysis.ranks import ranks_within, spearman_within

    event_R = torch.zeros(len(x), dtype=torch.int64)
    ranks_R2 = ranks_within(torch.tensor([x, y], dtype=torch.float64).T, event_R)
    return spearman_within(ranks_R2[:, :1], ranks_R2[:, 1:], event_R, 1).item()


def _corrected(study: str) -> Claim:
    """Which comparisons are lower or higher by Holm's correction of the t-tests over seeds too."""
    record, p_of = read(path_of(study)), corrected(study)
    judged = [row for row in record["contrasts"] if row["finding"] != "not shown"]
    p = [p_of[row["treated"], row["control"]] for row in judged]
    stand, fall = (
        [
            f"{row['question']} ({'< .001' if value < 0.001 else bare(value, 3)})"
            for row, value in zip(judged, p, strict=True)
            if value is not None and (value < SIGNIFICANT) is which
        ]
        for which in (True, False)
    )
    return study_claim(
        study,
        "corrected",
        f"Were the test over seeds corrected too (Holm over {len(record['contrasts'])} comparisons), these of the "
        f"differences that are shown would stand, with p: {'; '.join(stand) or 'none'}; these would not: "
        f"{'; '.join(fall) or 'none'} ({record['label']}).",
        "Holm's p of the t-tests over seeds of the differences that are shown",
        [value for value in p if value is not None],
        "measured",
        test="Student's paired t over seeds, Holm over the comparisons of the study",
    )


def _kept_events() -> Claim:
    """How much of the errors of single events the records hold."""
    from lab_shared.arrays import load_arrays

    sizes = set()
    for study in studies():
        for file in sorted((ROOT / RESULTS / study / "errors").glob("*.npz")):
            if file.name != "events.npz":
                error_SN = load_arrays(file)["error_deg"]
                sizes.add((error_SN.shape[1], str(error_SN.dtype), read(path_of(study))["budget"]["held_out"]))
    said = " or ".join(f"{kept:,} of the {held_out:,}" for kept, _, held_out in sorted(sizes))
    return Claim(
        "iceaggr/ablate-kept-events",
        f"The records keep the errors of {said} held-out events of each training, as "
        f"{' or '.join(sorted({kind for _, kind, _ in sizes}))}.",
        "events whose errors are in the records; held-out events",
        [n for kept, _, held_out in sorted(sizes) for n in (kept, held_out)],
        "measured",
        [path_of(study) for study in studies()],
        test="counted",
    )
