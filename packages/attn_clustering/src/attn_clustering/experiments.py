"""The experiments: matrices of runs, and the complete configuration of each run. Imports no torch.

An `Experiment` is a list of conditions (attention x ordering) over seeds, each trained (`run_config`) and then
recalibrated (`phase2_config`). `EXPERIMENTS` holds those that have a name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from lab_shared.errors import UserError

from attn_clustering.config import (
    Attention,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Ordering,
    Recalibration,
    RunConfig,
)
from attn_clustering.data.settings import LANGUAGES

Parts = Literal["endpoint", "all"]
"""endpoint: what the primary contrast rests on; see `matrix.jobs`."""
PARTS: tuple[Parts, ...] = get_args(Parts)


@dataclass(frozen=True)
class Experiment:
    """A matrix of runs: attentions x orderings x seeds, each followed by its recalibrations."""

    name: str
    model: ModelConfig
    """The MHA model; GQA has half its key and value heads."""
    data: DataConfig
    optim: OptimConfig
    attentions: tuple[Attention, ...] = ("mha", "gqa")
    orderings: tuple[Ordering, ...] = ("shuffled", "topic_ordered")
    seeds: int = 1
    first_seed: int = 0
    recals: tuple[Recalibration, ...] = (Recalibration(),)
    """DroPE of every trained run, analysed; the first is the experiment's primary one."""
    sweep: tuple[Recalibration, ...] = ()
    """Further DroPE runs of the first seed, for their validation loss only."""
    controls: bool = False
    """Also RoPE kept for the steps of the primary recalibration, and NoPE from scratch."""


def with_attention(model: ModelConfig, attention: Attention) -> ModelConfig:
    """The MHA model itself, or its grouped-query variant: half as many key and value heads."""
    return model if attention == "mha" else replace(model, kv_heads=max(1, model.heads // 2))


def run_config(
    experiment: Experiment, attention: Attention, ordering: Ordering, seed: int, *, nope: bool = False
) -> RunConfig:
    """Phase 1 of a condition. Everything but the order depends on (attention, seed) alone, so orderings are paired.

    homogeneous_blocks alone trains on other sequences (single-topic ones, see `runs.training_data`).
    """
    data, model = experiment.data, with_attention(experiment.model, attention)
    if data.language is not None:
        language = replace(data.language, seed=seed)
        if data.mode == "fresh":
            language = replace(language, train_sequences=experiment.optim.steps * experiment.optim.batch)
        data = replace(data, language=language)
    return RunConfig(
        experiment.name,
        attention,
        ordering,
        seed,
        replace(model, rope=False) if nope else model,
        data,
        experiment.optim,
        phase="nope" if nope else "rope",
    )


def phase2_config(
    trained: RunConfig,
    recal: Recalibration,
    phase: Literal["drope", "extra"] = "drope",
    *,
    folder: str | None = None,
) -> RunConfig:
    """Recalibration of a trained run whose folder (default: its name) lies beside this one's."""
    optim = trained.optim
    steps = round(recal.fraction * optim.steps)
    optim = replace(
        optim,
        steps=steps,
        warmup=min(recal.warmup, steps // 2),
        schedule="cosine",
        muon_lr=optim.muon_lr * recal.lr_factor,
        lr=optim.lr * recal.lr_factor,
    )
    return replace(trained, optim=optim, phase=phase, recal=replace(recal, parent=f"../{folder or trained.name}"))


def _smoke() -> Experiment:
    return Experiment(
        "smoke",
        ModelConfig(vocab=128, d_model=64, layers=2, heads=4, kv_heads=4, head_dim=16, mlp=176),
        DataConfig(LANGUAGES["smoke"]),
        OptimConfig(steps=120, batch=16, warmup=12, lr=0.03, eval_every=60, eval_sequences=128, log_every=20),
        recals=(Recalibration(fraction=0.1, lr_factor=1.0),),
    )


def _sanity() -> Experiment:
    return Experiment(
        "sanity",
        ModelConfig(vocab=512, d_model=256, layers=4, heads=4, kv_heads=4, mlp=688),
        DataConfig(LANGUAGES["sanity"], partial="cut"),
        OptimConfig(
            steps=5000, warmup=250, decay_gains=True, eval_every=1250, eval_sequences=1984, checkpoint_every=5000
        ),
        attentions=("mha",),
        first_seed=42,
        recals=(Recalibration(order="own"),),
    )


def _faithful() -> Experiment:
    return Experiment(
        "faithful-v1",
        ModelConfig(),
        DataConfig(LANGUAGES["faithful-v1"], partial="cut"),
        OptimConfig(decay_gains=True, eval_every=1000, checkpoint_every=2500),
        first_seed=42,
        recals=(Recalibration(order="own"), Recalibration()),
    )


def _controlled() -> Experiment:
    recal = Recalibration(fraction=1.0, lr_factor=1.0, warmup=20)  # at 0.2 a pilot's model was still broken
    return Experiment(
        "controlled-v1",
        ModelConfig(vocab=256, d_model=256, layers=6, heads=4, kv_heads=4, mlp=688),
        DataConfig(LANGUAGES["controlled-v1"], mode="fresh", cooldown=0.2),
        OptimConfig(
            steps=1200,
            warmup=60,
            schedule="wsd",
            lr=3e-3,
            eval_every=400,
            eval_sequences=1280,
            checkpoint_every=1200,
        ),
        orderings=("shuffled", "topic_ordered", "random_blocks"),
        seeds=8,
        recals=(recal,),
        sweep=tuple(
            replace(recal, fraction=fraction, lr_factor=lr_factor)
            for fraction in (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
            for lr_factor in ((0.1, 0.3, 1.0) if fraction else (1.0,))
            if (fraction, lr_factor) != (recal.fraction, recal.lr_factor)
        ),
        controls=True,
    )


def _controlled_small() -> Experiment:
    controlled = _controlled()
    return replace(
        controlled,
        name="controlled-small",
        model=ModelConfig(vocab=32, d_model=64, layers=3, heads=2, kv_heads=2, head_dim=32, mlp=160),
        data=replace(controlled.data, language=LANGUAGES["controlled-small"]),
        optim=replace(
            controlled.optim,
            steps=400,
            batch=32,
            warmup=20,
            muon_lr=0.03,
            lr=0.01,
            eval_every=200,
            eval_sequences=512,
            checkpoint_every=400,
        ),
        attentions=("mha",),
        recals=(Recalibration(fraction=0.2, lr_factor=1.0, warmup=7),),
        sweep=(),
    )


def _text() -> Experiment:
    return Experiment(
        "text",
        ModelConfig(vocab=16_384),
        DataConfig(corpus="data/attn_clustering/corpus"),
        OptimConfig(steps=1500, warmup=75, lr=3e-3, eval_every=300, eval_sequences=640),
        attentions=("mha",),
        seeds=3,
        recals=(Recalibration(fraction=0.1, lr_factor=1.0, warmup=30),),
    )


def _v2() -> Experiment:
    return replace(
        _text(),
        name="v2",
        model=ModelConfig(vocab=16_384, d_model=768, layers=12, heads=12, kv_heads=12, mlp=2048),
        optim=OptimConfig(steps=30_000, warmup=1000, eval_every=1000),
        attentions=("mha", "gqa"),
        seeds=1,
        first_seed=42,
        recals=(Recalibration(),),
    )


# The first sentence of each description is what `--help` shows.
EXPERIMENTS: dict[str, tuple[str, Experiment]] = {
    "smoke": ("2 layers of width 64 on a permutation language: all parts in a minute on two CPU cores.", _smoke()),
    "sanity": ("The seed's easy data: 3.3M parameters, 5,000 steps, MHA.", _sanity()),
    "faithful-v1": ("Every constant of the seed's first run: 27M parameters, 10,000 steps, one seed.", _faithful()),
    "controlled-v1": (
        "The pre-registered test: bigram-only topics, fresh data, shared cooldown, 8 paired seeds, controls.",
        _controlled(),
    ),
    "controlled-small": (
        "The same design, small enough for two CPU cores: 3 layers of width 64, an experiment of its own.",
        _controlled_small(),
    ),
    "text": ("Real text at 34M parameters, 3 seeds; make the corpus with `attn-clustering prepare`.", _text()),
    "v2": ("The seed's plan for real text: 97.5M parameters, 30,000 steps; for a corpus of many tokens.", _v2()),
}


def experiment_named(name: str) -> Experiment:
    """The experiment of that name. Raises UserError with the possible names."""
    if name not in EXPERIMENTS:
        raise UserError(f"no experiment {name!r}; there are {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name][1]
