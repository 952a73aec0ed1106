"""What the pre-registered rules conclude from a matrix: the verdict, and what it has to name besides."""

from __future__ import annotations

from dataclasses import dataclass

from attn_clustering.analysis import compare
from attn_clustering.report_data import MatrixFiles, above_floor

LEARNED_WITHIN = 0.15
"""Nats above the Bayes floor up to which a language counts as learned; see PREREGISTRATION.md."""


@dataclass(frozen=True)
class Conclusion:
    """The primary comparison of a matrix, judged by PREREGISTRATION.md."""

    primary: compare.Comparison | None
    word: str
    """"supported", "refuted", "real and negligible" or "undecided"."""
    why: str
    not_recovered: int
    """Of the compared DroPE models: how many stayed above the loss they had with RoPE."""
    models: int
    """How many DroPE models are compared."""
    above_floor: float | None
    """Mean final loss of the shuffled RoPE models above the Bayes floor, nats; None without a floor."""
    left_out: tuple[int, ...]
    """Seeds with a result but not with every condition: no part of the comparison."""

    @property
    def broken(self) -> bool:
        """Whether the claim is about models that DroPE left broken: more than half of them did not recover."""
        return 2 * self.not_recovered > self.models

    @property
    def learned(self) -> bool | None:
        """Whether the language counts as learned; None without a floor."""
        return None if self.above_floor is None else self.above_floor <= LEARNED_WITHIN

    @property
    def named(self) -> str:
        """The verdict with what it must name: "undecided, about models that DroPE left broken"."""
        caveats = ["about models that DroPE left broken"] if self.broken else []
        caveats += ["on a language that counts as not learned"] if self.learned is False else []
        return ", ".join([self.word, *caveats])

    def sentences(self) -> list[str]:
        """Recovery, learning and seeds left out, each in a sentence."""
        said = []
        if self.models:
            much = ": the claim is about models that DroPE left broken" if self.broken else ""
            said.append(
                f"{self.not_recovered} of {self.models} of these models did not recover the loss they had with "
                f"RoPE{much}."
            )
        if self.above_floor is not None:
            word = "counts as learned" if self.learned else "counts as not learned"
            said.append(
                f"Shuffled models with RoPE end {self.above_floor:+.3f} nats from the Bayes floor on average: the "
                f"language {word} (limit {LEARNED_WITHIN} nats)."
            )
        if self.left_out:
            said.append(f"Seeds without all conditions, left out: {', '.join(map(str, self.left_out))}.")
        return said


def conclude(files: MatrixFiles) -> Conclusion:
    """Judge a matrix by its primary comparison."""
    found = compare.primary(files.results, files.recal)
    word, why = compare.verdict(found)
    broken, models = (0, 0) if found is None else compare.not_recovered(files.results, found, files.recal)
    attention = files.experiment.attentions[0]
    begun = {r["run"]["seed"] for r in files.results if r["run"]["attention"] == attention}
    left_out = begun - set(found.seeds if found is not None else ())
    return Conclusion(found, word, why, broken, models, above_floor(files), tuple(sorted(left_out)))
