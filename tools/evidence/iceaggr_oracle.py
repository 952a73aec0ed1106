"""The information limit of iceaggr's simulated events: the oracle's record."""

from __future__ import annotations

from evidence.record import Claim, interval, markdown, read

FOLDER = "packages/iceaggr/results/oracle"
FIRST = f"{FOLDER}/first-likelihood-h200-seed7.json"
"""Of a likelihood that the code no longer has."""
ORACLE = f"{FOLDER}/oracle-cpu-seed7.json"
DEFAULT, THOROUGH = f"{FOLDER}/oracle-300-cpu-seed7.json", f"{FOLDER}/oracle-300-thorough-cpu-seed7.json"
"""The same few events, searched as all are and with more directions and steps."""


def table(path: str) -> str:
    """The information limit: directions from the likelihood of the simulation itself."""
    record = read(path)
    body = [
        [name, f"{row['n']:,}", interval(row["mean_deg"], 2), interval(row["median_deg"], 2)]
        for name in ("all", "track", "cascade", "n_pulses>=100", "truth start, all", "scan only, all")
        if (row := record.get(name))
    ]
    return markdown([f"oracle, degrees ({record['label']})", "events", "mean", "median"], body, "lrrr")


def limit_text() -> str:
    """The oracle's mean error."""
    found = read(ORACLE)["all"]
    return f"{interval(found['mean_deg'], 1)} (maximum likelihood, {found['n']:,} events)"


def claims() -> list[Claim]:
    record = read(ORACLE)
    mean, covered = record["all"]["mean_deg"], record["self_test"]["cascade, all"]
    direction = record["self_test"]["direction"]
    inside, inside_direction = (
        [row[f"within {nominal}"] for nominal in ("50%", "90%", "99%")] for row in (covered, direction)
    )
    return [
        Claim(
            "iceaggr/oracle",
            f"The likelihood of the simulation itself reaches {mean['value']:.1f} degrees on {record['all']['n']:,} "
            f"events ({record['label']}).",
            "mean opening angle, degrees",
            [mean["value"]],
            "measured",
            [ORACLE],
            interval=(mean["low"], mean["high"]),
            test="bootstrap over events, 95 %",
        ),
        Claim(
            "iceaggr/oracle-coverage",
            f"Regions of 50, 90 and 99 % of all seven parameters hold the truth of {covered['n']:,} cascades in "
            f"{_shares(inside)} %, those of the direction of {direction['n']:,} events in "
            f"{_shares(inside_direction)} % ({record['label']}).",
            "coverage of likelihood-ratio regions",
            [*inside, *inside_direction],
            "measured",
            [ORACLE],
        ),
        Claim(
            "iceaggr/oracle-scan",
            f"The climb from the scan ends higher than the one from the truth in {record['scan_won']:.1%} of the "
            f"events, lower in {record['scan_short']:.1%} ({record['label']}).",
            "share of events",
            [record["scan_won"], record["scan_short"]],
            "measured",
            [ORACLE],
        ),
        _thorough(),
    ]


def _thorough() -> Claim:
    """How much further from the truth the higher maxima lie that a longer search finds."""
    import numpy as np
    from lab_shared.bootstrap import bca_interval

    records = read(DEFAULT), read(THOROUGH)
    usual_E, longer_E = (np.array(record["errors_deg"]) for record in records)
    more_E = longer_E - usual_E
    mean, (low, high) = float(more_E.mean()), bca_interval(more_E)
    (scan, steps), (more_scan, more_steps) = ((r["settings"]["scan"], r["settings"]["steps"]) for r in records)
    return Claim(
        "iceaggr/oracle-steps",
        f"With {more_scan} directions and {more_steps} steps a climb instead of {scan} and {steps} the mean error "
        f"of {usual_E.size} events changes by {mean:+.1f} degrees ({low:+.1f} to {high:+.1f}; {records[0]['label']}).",
        "mean difference of opening angles, degrees",
        [mean],
        "measured",
        [DEFAULT, THOROUGH],
        interval=(low, high),
        test="bootstrap over events, 95 %",
    )


def _shares(values: list[float]) -> str:
    return " / ".join(f"{100 * value:.1f}" for value in values)


TABLES = {"iceaggr.oracle": lambda: table(ORACLE), "iceaggr.oracle-first": lambda: table(FIRST)}
