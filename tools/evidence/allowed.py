"""Numbers in the prose of READMEs that are no measurements: pieces of text, each with the reason.

A piece covers the numbers in it: those of EVERYWHERE in all documents, those of ALLOWED in the one they are listed for.
"""

from __future__ import annotations

EVERYWHERE: dict[str, str] = {
    "torch 2.11": "version",
    "torch 2.15": "version",
    "95 %": "level of intervals",
    "95%": "level of intervals",
}
ALLOWED: dict[str, dict[str, str]] = {
    "README.md": {
        "(3.11 or newer)": "version",
    },
    "packages/iceaggr/README.md": {
        "all 132 million": "events of the public data set",
        "132 million real events": "events of the public data set",
    },
    "packages/iceaggr/RESULTS.md": {
        "vary by 30% and more": "said to warn, not to claim",
        "where that is below .05": "level of significance",
        "< 0.5 s | under 0.5 s, asserted by": "asserted by a test",
        "at 95% and beyond are 10 to 20% above": "rows of the table of realism",
    },
    "packages/attn_clustering/README.md": {
        "more than 0.02 nats above": "a constant of the analysis",
        "for 1% of the steps": "a constant of the experiment",
    },
    "packages/attn_clustering/RESULTS.md": {
        "again: .597 and .478": "asserted by tests/test_stated_levels.py",
        "for 1% of the steps": "a constant of the experiment",
        "CC BY 4.0": "licence",
    },
    "packages/gauge_attn/RESULTS.md": {
        ">= 500x the dense reference, within 1.5x of plain attention": "required, not measured",
        "within 2x of a GPT": "required, not measured",
    },
    "packages/rh_memory/README.md": {
        "about 1 % in its logarithm": "by the definition of the split",
    },
    "packages/rh_memory/RESULTS.md": {
        "1 % beyond the training heights": "by the definition of the split",
        "for 10 minutes": "a budget",
        "about -.25 for that model": "stated by the original",
        "by .6 at most": "required by the original",
    },
}
