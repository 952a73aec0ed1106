"""Diagnostics as plain text for a terminal."""

from __future__ import annotations

from typing import Any


def cell(x: dict[str, Any], spec: str = "+.4f") -> str:
    """value [low, high]"""
    text = format(x["value"], spec)
    return text if x["low"] is None else f"{text} [{format(x['low'], spec)}, {format(x['high'], spec)}]"


def summary_text(result: dict[str, Any]) -> str:
    """What `diagnose` found in one run; costs are nats, positive where the change hurts."""
    head = f"{result['run']} (memory: {result['memory']}, seed {result['seed']}) on {result['label']}"
    if "legacy" in result:
        return "\n".join([head, *_legacy_lines(result["legacy"])])
    lines = [
        f"{head}, {result['windows']:,} golden windows",
        f"nll_last {cell(result['base'], '.4f')}",
    ]
    if blocks := result.get("blocks"):
        lines.append(
            f"stretches differ: p = {blocks['p']:.4f}, spread {blocks['std_between']:.4f} "
            f"(noise alone: {blocks['std_expected_from_noise']:.4f})"
        )
    for name, title in (("removed", "removed"), ("mean", "state averaged"), ("resampled", "state of another window")):
        lines += [f"slot {row['slot']} {title}: {cell(row)}" for row in result.get(name, [])]
    for row in result.get("subsets", {}).get("by_size", []):
        lines.append(
            f"best {row['slots']} slots {row['best_slots']}: NLL {row['best']:.4f} "
            f"(mean of all {row['mean']:.4f}, worst {row['worst']:.4f})"
        )
    for name, row in result.get("permutation", {}).items():
        lines.append(f"{name} permuted: {cell(row)}, range {row['smallest']:+.4f} to {row['largest']:+.4f}")
    if content := result.get("content"):
        lines.append(f"identity only (contents zeroed): {cell(content['identity_only'])}")
        share = content["content_only_share_of_gain"]
        of_gain = "" if share is None else f", {share:.1%} of the gain over the marginal"
        lines.append(f"content only (identities averaged): {cell(content['content_only'])}{of_gain}")
    if gradient := result.get("gradient"):
        lines.append(
            f"gradients of the contents: cosine {cell(gradient['cosine_within_groups'], '+.3f')}, "
            f"effective rank {gradient['effective_rank']:.2f} ({gradient['effective_rank_share']:.0%} of the slots)"
        )
    for row in result.get("attention", []):
        figures = ", ".join(f"{name} {x['value']:.3g}" for name, x in row.items() if name != "layer")
        lines.append(f"layer {row['layer']}: {figures}")
    for row in result["rollout"]["phase_errors"]:
        figures = ", ".join(f"{name} {row[name]['value']:.3f}" for name in ("model", "AR", "constant"))
        lines.append(f"RMS error of u after {row['steps']} steps: {figures}")
    for row in result["rollout"]["spectral"]:
        lines.append(
            f"{row['statistic']}: zeros {row['zeros']['value']:.4f}, sampled {row['model']['value']:.4f}, "
            f"difference {cell(row['difference'])}"
        )
    lines += [f"left out, {name}: {reason}" for name, reason in result.get("left_out", {}).items()]
    return "\n".join(lines)


def _legacy_lines(tests: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, test in tests.items():
        figures = ", ".join(f"{key} {_short(x)}" for key, x in test.items() if key not in ("passes", "vacuous"))
        said = {True: "passes the", False: "fails the", None: "has no"}[test["passes"]]
        lines.append(f"{name}: {figures} ({said} original threshold)")
        lines.append(f"    but: {test['vacuous']}")
    return lines


def _short(x: Any) -> str:
    if isinstance(x, float):
        return f"{x:.4g}"
    if isinstance(x, list):
        return "[" + ", ".join(_short(v) for v in x) + "]"
    if isinstance(x, dict):
        return "{" + ", ".join(f"{k}: {_short(v)}" for k, v in x.items()) + "}"
    return str(x)
