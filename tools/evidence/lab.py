"""What all experiments share: optimiser and attention on one GPU."""

from __future__ import annotations

from typing import Any

from evidence import attn_matrices, gauge_attn, iceaggr, iceaggr_oracle, rh_memory
from evidence.record import ROOT, Claim, bare, markdown, read, verdict

OPTIM, ATTENTION = (f"shared/results/bench/{name}-cuda.json" for name in ("optim", "attention"))
FAULTS, FUZZ = "tools/results/faults.json", "tools/results/fuzz.json"
SCALING = "shared/results/bench/scaling-cuda.json"
_STEP_LIMIT, _BLOCKS_LIMIT_MS = 1.12, 1.0


def _attention(bench: str, way: str, path: str = ATTENTION, **shape: int) -> float:
    """Median milliseconds of a row."""
    rows = read(path)["records"]
    wanted = {"bench": bench, "way": way, **shape}
    found = next(row for row in rows if all(row[key] == value for key, value in wanted.items()))
    return 1e3 * float(found["median_s"])


def _step(name: str) -> float:
    """Median milliseconds of a training step."""
    return 1e3 * float(read(OPTIM)["results"][name]["step_s"]["median_s"])


def speed() -> str:
    """Both suites, in a row each."""
    shape: dict[str, Any] = {"heads": 8, "dim": 32}
    packed = {way: _attention("forward+backward", way, **shape) for way in ("flex", "sdpa", "varlen")}
    before = _attention("forward+backward", "flex", "shared/results/bench/attention-cuda-blocks-of-128.json", **shape)
    ratio = _step("muon_fused") / _step("adamw")
    body = [
        [
            "step of a 27,403,776-parameter transformer, fused Muon over AdamW alone",
            f"<= {_STEP_LIMIT}x",
            f"{ratio:.2f}x ({_step('muon_fused'):.1f} against {_step('adamw'):.1f} ms; torch.optim.Muon "
            f"{_step('muon_torch'):.1f}, muon-optimizer {_step('muon_keller'):.1f})",
            "`tools/bench_optim.py`",
        ],
        [
            "block lists for 230,000 packed tokens from offsets",
            f"< {_BLOCKS_LIMIT_MS:g} ms",
            f"{_attention('block mask', 'from offsets'):.2f} ms (causal "
            f"{_attention('block mask', 'from offsets, causal'):.2f}); `create_block_mask` "
            f"{_attention('block mask', 'create_block_mask'):.1f} ms",
            "`tools/bench_attention.py`",
        ],
        [
            "packed attention forward + backward, 2^18 tokens, 8 heads of 32, bf16",
            "",
            f"flex {packed['flex']:.2f} ms ({before:.2f} with blocks of 128), sdpa {packed['sdpa']:.2f}, "
            f"varlen {packed['varlen']:.2f}",
            "`tools/bench_attention.py`",
        ],
    ]
    return markdown(["what", "required", "measured", "command"], body)


def headline() -> str:
    """A row per experiment: what was known or stated before, what is measured here, and what to hold it against."""
    predictors = iceaggr.evaluation("small-h200-seed0")["predictors"]
    error = {name: predictors[name]["mean_deg"] for name in ("linefit", "model")}
    zeros = next(row["nll_last"] for row in rh_memory.judged()["experiments"] if row["experiment"] == "explicit")
    phases = next(row["value"] for row in rh_memory.judged()["baselines"] if row["name"] == "prime phases")
    body = [
        [
            "`iceaggr`",
            "mean opening angle, degrees (simulated data, one seed)",
            f"{error['linefit']['value']:.1f} (best line fit)",
            f"**{error['model']['value']:.1f}**",
            iceaggr_oracle.limit_text(),
        ],
        [
            "`rh_memory`",
            "negative log-likelihood of a window's last spacing, nats, lower is better",
            ".194 (the best as first stated, of E4)",
            f"**{bare(zeros['mean'], 2)}** (sd {bare(zeros['sd'], 2)}, {zeros['n']} seeds; `explicit`, without memory)",
            f"{bare(phases, 2)} (linear regression on prime phases; no bound is known)",
        ],
        ["`gauge_attn`", *gauge_attn.headline()],
        [
            "`attn_clustering`",
            "topic probe after DroPE, ordered less shuffled (generated language)",
            "positive (as first stated)",
            attn_matrices.primary_text(),
            "",
        ],
    ]
    return markdown(["experiment", "measure", "before", "here", "for comparison"], body, "llrrl")


def faults() -> str:
    """What was killed, how often, and what went wrong."""
    body = [
        [name, f"{row['kills']}", f"{row.get('full_disks', 0) or ''}", f"{len(row['faults'])}"]
        for name, row in sorted(read(FAULTS).items())
    ]
    return markdown(["work", "kill -9", "full disks", "faults"], body, "lrrr")


def fuzz() -> str:
    """What every reader did with damaged and forged files."""
    body = [
        [
            name,
            f"{row['cases']:,}",
            f"{row['outcomes'].get('accepted', 0):,}",
            f"{sum(n for outcome, n in row['outcomes'].items() if outcome != 'accepted'):,}",
            "" if row["fault"] is None else "**yes**",
        ]
        for name, row in sorted(read(FUZZ).items())
    ]
    return markdown(["reader", "cases", "read", "refused by name", "fault"], body, "lrrrl")


def scaling() -> str:
    """Speed of several processes over that of one, each with the batch that one has alone."""
    record = read(SCALING)
    words = {None: "", True: "met", False: "**NOT met**"}
    body = [
        [row["name"], _rate(row), f"{row['speedup']:.2f}x", f"{row['required'] or ''}", words[row["met"]]]
        for row in record["rows"]
    ]
    return markdown([f"on {record['environment']['device']}", "median", "of one", "required", ""], body, "lrrrl")


def _rate(row: dict[str, Any]) -> str:
    key = next(key for key in row if key.endswith("_per_s"))
    return f"{row[key]:,.0f} {key.removesuffix('_per_s')}/s"


def _robustness() -> list[Claim]:
    found = []
    if (ROOT / FAULTS).is_file():
        rows = list(read(FAULTS).values())
        kills, wrong = sum(row["kills"] for row in rows), sum(len(row["faults"]) for row in rows)
        found.append(
            Claim(
                "shared/faults",
                f"{kills} kill -9 in {len(rows)} kinds of work on a CPU: {wrong} faults (a file cut short, work done "
                "twice, or a bit that differs from an uninterrupted run).",
                "faults",
                [wrong],
                verdict(wrong, 0, at_most=True),
                [FAULTS],
                test="comparison with an uninterrupted run",
                required="no fault",
            )
        )
    if (ROOT / FUZZ).is_file():
        rows = list(read(FUZZ).values())
        cases, wrong = sum(row["cases"] for row in rows), sum(row["fault"] is not None for row in rows)
        found.append(
            Claim(
                "shared/fuzz",
                f"{cases:,} damaged or forged files through {len(rows)} readers: {wrong} of the readers with a fault, "
                "all else a correct result or a named error.",
                "readers with a fault",
                [wrong],
                verdict(wrong, 0, at_most=True),
                [FUZZ],
                required="no fault",
            )
        )
    return found


def claims() -> list[Claim]:
    ratio, blocks = _step("muon_fused") / _step("adamw"), _attention("block mask", "from offsets")
    causal = _attention("block mask", "from offsets, causal")
    several = read(SCALING)["rows"] if (ROOT / SCALING).is_file() else []
    return [
        *(
            Claim(
                f"shared/scaling-{'-'.join(row['name'].replace(',', '').split())}",
                f"{row['name']}: {_rate(row)}, {row['speedup']:.2f} times one alone; required {row['required']} times.",
                "speed over that of one process",
                [row["speedup"]],
                "met" if row["met"] else "NOT met",
                [SCALING],
                test="ratio of medians",
                required=f"at least {row['required']} times",
            )
            for row in several
            if row["required"] is not None
        ),
        *_robustness(),
        Claim(
            "shared/muon-step",
            f"A step of a 27,403,776-parameter transformer takes {ratio:.2f} times as long with fused Muon as with "
            "AdamW alone on one H200.",
            "median step over AdamW's",
            [ratio],
            verdict(ratio, _STEP_LIMIT, at_most=True),
            [OPTIM],
            test="ratio of medians of 30 steps",
            required=f"at most {_STEP_LIMIT} times",
        ),
        Claim(
            "shared/block-lists",
            f"Block lists for 230,000 packed tokens take {blocks:.2f} ms from offsets on one H200, causal ones "
            f"{causal:.2f} ms; required 1 ms.",
            "milliseconds",
            [blocks, causal],
            verdict(blocks, _BLOCKS_LIMIT_MS, at_most=True),
            [ATTENTION],
            test="median of 20",
            required="below 1 ms",
        ),
    ]


TABLES = {
    "shared.speed": speed,
    "lab.headline": headline,
    **({"lab.scaling": scaling} if (ROOT / SCALING).is_file() else {}),
    **({"lab.faults": faults} if (ROOT / FAULTS).is_file() else {}),
    **({"lab.fuzz": fuzz} if (ROOT / FUZZ).is_file() else {}),
}
