"""Speeds of KL attention and of its models, on CPUs and on a GPU."""

from __future__ import annotations

from typing import Any

from evidence import speeds
from evidence.record import Claim, markdown, read, verdict

RESULTS = "packages/gauge_attn/results"
CPU_SPEEDS, GPU_SPEEDS, GPU_LENGTHS, GPU_MODELS = (
    f"{RESULTS}/bench/gauge-attn-{of}.json" for of in ("cpu", "cuda", "lengths-cuda", "models-cuda")
)
OWN_KERNEL, OWN_KERNEL_MODELS = (f"{RESULTS}/bench/own-kernel-{of}.json" for of in ("cuda", "models-cuda"))
"""Runs with a float32 kernel that was tried and removed; number formats other than float32 did not go through it."""
BF16X3 = "practical-small, bf16x3"
WAYS = (
    "features, mean",
    "features, mean and covariance",
    "plain attention of width 21",
    "dense reference, diagonal approximation",
    "dense reference, full covariance",
)
_AS_FAST_AS_DENSE = 50


def speed() -> str:
    """Forward and backward by length, and how many times as long as exact features the dense reference takes."""
    found = [row for row in read(CPU_SPEEDS)["rows"] if row["section"] == "speed"]
    body = []
    for n in sorted({row["n"] for row in found}):
        here = {row["name"]: row for row in found if row["n"] == n}
        body.append([str(n), *(_speed_cell(name, here.get(name)) for name in WAYS)])
    return markdown(["N", *WAYS], body, "rrrrrr")


def _speed_cell(name: str, row: dict[str, Any] | None) -> str:
    if row is None:
        return "not run (minutes)"
    times = f" ({row['times features']:.3g}x)" if "dense" in name else ""
    return f"{speeds.plain(row['ms'])} ms{times}"


def gpu_speed() -> str:
    """Every measurement of the attention on a GPU: milliseconds, memory, and times as long as exact features."""
    body = []
    other_lengths = [row for row in read(GPU_LENGTHS)["rows"] if "ms" in row and row["n"] != 1024]
    for row in [*read(GPU_SPEEDS)["rows"], *other_lengths]:
        if "ms" in row:
            times = f"{row['times features']:.3g}" if "times features" in row else ""
            body.append([row["name"], f"{row['n']:,}", speeds.plain(row["ms"]), speeds.plain(row["peak MB"]), times])
    return markdown(["forward and backward", "N", "ms", "MB", "times exact features"], body, "lrrrr")


def gpu_requirements() -> str:
    return speeds.requirements("gauge_attn", GPU_SPEEDS, "on one H200")[0]


def gpu_models() -> str:
    return speeds.table({"one H200": GPU_MODELS})


def own_kernel() -> str:
    """The float32 kernel that was tried, beside PyTorch's."""
    usual = {(row["section"], row["name"], row["n"]): row for row in read(GPU_SPEEDS)["rows"]}
    body = []
    for row in read(OWN_KERNEL)["rows"]:
        if row["name"].startswith(("features", "K=")):
            other = usual[row["section"], row["name"], row["n"]]
            times = f"{row['ms'] / other['ms']:.2f}"
            body.append([row["name"], f"{row['n']:,}", *(speeds.plain(x["ms"]) for x in (other, row)), times])
    return markdown(["forward and backward", "N", "ms with PyTorch's", "ms with our own", "ratio"], body, "lrrrr")


def claims() -> list[Claim]:
    """Features beside the dense reference, other shapes and number formats, whole models."""
    dense_row = next(row for row in read(CPU_SPEEDS)["rows"] if row["name"] == WAYS[3] and row["n"] == 512)
    dense = dense_row["times features"]
    turns = "lowest" in dense_row
    spread = f" ({dense_row['lowest']:.0f} to {dense_row['highest']:.0f} in alternating rounds)" if turns else ""
    full = next(row for row in read(CPU_SPEEDS)["rows"] if row["name"] == WAYS[4] and row["n"] == 256)["times features"]
    precision = [row for row in read(GPU_LENGTHS)["rows"] if row["section"] == "precision"]
    return [
        Claim(
            "gauge_attn/speed-dense",
            f"At N = 512 on 2 cores exact features are {dense:.0f} times{spread} as fast as the dense reference's "
            f"diagonal approximation, required {_AS_FAST_AS_DENSE} times; at N = 256 {full:.0f} times as fast as its "
            "full covariance.",
            "dense milliseconds over those of exact features",
            [dense, full],
            "met" if dense >= _AS_FAST_AS_DENSE else "NOT met",
            [CPU_SPEEDS],
            test="median of ratios in alternating rounds" if turns else "ratio of medians",
            required=f"at least {_AS_FAST_AS_DENSE} times at N = 512",
        ),
        Claim(
            "gauge_attn/speed-other",
            _other_speeds(),
            "milliseconds; mean total variation",
            [],
            "measured",
            [CPU_SPEEDS],
        ),
        *speeds.requirements("gauge_attn", GPU_SPEEDS, "on one H200")[1],
        Claim(
            "gauge_attn/precision-gpu",
            f"On one H200 the {_rounding(precision)} (generated data).",
            "mean total variation",
            [],
            "measured",
            [GPU_LENGTHS],
        ),
        _models(),
        _split_models(),
    ]


def _models() -> Claim:
    """How much faster a dot-product model of as many parameters trains."""
    record = read(GPU_MODELS)
    *ours, gpt = record["rows"]
    slower = {row["name"]: gpt["tokens_per_s"] / row["tokens_per_s"] for row in ours}
    least, most = min(slower.values()), record["required"]
    said = ", ".join(f"{times:.2f} times as fast as {name}" for name, times in slower.items())
    return Claim(
        "gauge_attn/speed-models",
        f"A dot-product GPT of as many parameters trains {said} on one H200; required at most {most:g} times.",
        "tokens per second of the GPT over those of the practical model",
        list(slower.values()),
        verdict(least, most, at_most=True),
        [GPU_MODELS],
        test="ratio of medians",
        required=f"at most {most:g} times",
    )


def _split_models() -> Claim:
    """The same with the practical model's features split into pairs of bfloat16."""
    record = read(OWN_KERNEL_MODELS)
    rows = {row["name"]: row["tokens_per_s"] for row in record["rows"]}
    gpt, times, most = rows["gpt, width 168"], record["gpt_over"][BF16X3], record["required"]
    word = verdict(times, most, at_most=True)
    return Claim(
        "gauge_attn/speed-models-bf16x3",
        f"With features in pairs of bfloat16 practical-small trains {rows[BF16X3]:,.0f} tokens/s on one H200, the GPT "
        f"{gpt:,.0f} in the same run, {times:.2f} times as fast; required at most {most:g} times: {word}.",
        "tokens per second of the GPT over those of the practical model",
        [times],
        word,
        [OWN_KERNEL_MODELS],
        test="ratio of medians",
        required=f"at most {most:g} times",
    )


def _other_speeds() -> str:
    """Long sequences, wide layouts and low precisions in one sentence."""
    sections: dict[str, list[dict[str, Any]]] = {}
    for row in read(CPU_SPEEDS)["rows"]:
        sections.setdefault(row["section"], []).append(row)
    longer, layouts = (" / ".join(speeds.plain(row["ms"]) for row in sections[name]) for name in ("memory", "layouts"))
    return (
        f"With mean and covariance N = 1,024 / 2,048 / 4,096 take {longer} ms; layouts of "
        f"K = 64 / 108 / 128 at N = 256: {layouts} ms; {_rounding(sections['precision'])}."
    )


def _rounding(precision: list[dict[str, Any]]) -> str:
    """What the number formats cost, in the worst regime."""
    worst = {name: max(row[f"{name} TV"] for row in precision) for name in ("fp32", "fp16", "bf16x3")}
    return f"mean total variation against float64 in the worst of {len(precision)} regimes: " + ", ".join(
        f"{name} {x:.0e}" for name, x in worst.items()
    )


TABLES = {
    "gauge_attn.speed": speed,
    "gauge_attn.gpu-requirements": gpu_requirements,
    "gauge_attn.gpu-speed": gpu_speed,
    "gauge_attn.gpu-models": gpu_models,
    "gauge_attn.own-kernel": own_kernel,
}
