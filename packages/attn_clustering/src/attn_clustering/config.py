"""Every option of a run, and the experiments. Imports no torch, so that `--help` answers at once.

An `Experiment` is a list of conditions (attention x ordering) over seeds; `run_config` derives the complete
configuration of each run from it. A condition's name says what it is: mha-shuffled, gqa-topic_ordered.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from lab_shared.errors import UserError

from attn_clustering.data.settings import LANGUAGES, LanguageConfig

Attention = Literal["mha", "gqa"]
Parts = Literal["endpoint", "all"]
Ordering = Literal["shuffled", "topic_ordered", "homogeneous_blocks", "random_blocks", "reversed", "interleaved"]
Phase = Literal["rope", "nope", "drope", "extra"]
ATTENTIONS: tuple[Attention, ...] = get_args(Attention)
ORDERINGS: tuple[Ordering, ...] = get_args(Ordering)
PARTS: tuple[Parts, ...] = get_args(Parts)


@dataclass(frozen=True)
class ModelConfig:
    """A Mini-Qwen3. The defaults are the first run's MHA model (27,403,776 parameters)."""

    vocab: int = 4096
    d_model: int = 512
    layers: int = 8
    heads: int = 8
    kv_heads: int = 8
    """Key and value heads; divides `heads`."""
    head_dim: int = 64
    mlp: int = 1376
    """Hidden width of the SwiGLU."""
    rope: bool = True
    """Rotary positions; False is NoPE from scratch."""
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    init_std: float = 0.02
    """Standard deviation of every matrix and the embedding at the start."""

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads) < 1 or self.heads % self.kv_heads:
            raise UserError(f"kv_heads={self.kv_heads} must divide heads={self.heads}")
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs")


@dataclass(frozen=True)
class DataConfig:
    """Where the sequences come from: a micro-language, or a corpus that `attn-clustering prepare` has made."""

    language: LanguageConfig | None = None
    corpus: str | None = None
    """Folder of a prepared corpus; used when `language` is None."""
    mode: Literal["repeated", "fresh"] = "repeated"
    """repeated: the training sequences again and again; fresh: steps x batch different ones, each seen once."""
    cooldown: float = 0.0
    """Fraction of the steps, at the end, on a shuffled stream that all orderings of a seed share."""
    partial: Literal["matched", "cut"] = "matched"
    """A last incomplete pass: the same sequences in every ordering, or the beginning of the ordered pass."""


@dataclass(frozen=True)
class OptimConfig:
    """How a model is trained. The defaults are the first run's constants."""

    steps: int = 10_000
    batch: int = 64
    """Sequences of one step, over all processes."""
    warmup: int = 500
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    """wsd: constant, then linear to 0 over the last fifth."""
    muon_lr: float = 0.02
    """Peak rate of Muon (hidden matrices)."""
    lr: float = 3e-4
    """Peak rate of AdamW (embedding and gains)."""
    weight_decay: float = 0.01
    """Decoupled, times the rate; on matrices."""
    decay_gains: bool = False
    """Also on the norms' gains, as in the first run."""
    adam_eps: float = 1e-10
    clip: float = 1.0
    """Gradient-norm limit."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast type of training and evaluation; auto is bfloat16 on a GPU and float32 on a CPU."""
    residual: Literal["float32", "bfloat16"] = "float32"
    """Type of the residual stream under bfloat16 autocast."""
    compile: Literal["auto", "off", "block"] = "auto"
    """block: torch.compile of one block, used for all, of embedding and head. auto: block on a GPU from 100 steps."""
    step_graph: Literal["auto", "off", "on"] = "auto"
    """Record the whole step, optimiser included, as one CUDA graph. auto: alone on a GPU, from 100 steps."""
    eval_every: int = 500
    """Steps between looks at the validation loss."""
    eval_sequences: int = 3200
    """Validation sequences of a look; rounded down to whole batches. The final loss uses as many."""
    log_every: int = 50
    checkpoint_every: int = 1000
    wandb: Literal["offline", "online", "disabled"] = "disabled"
    """Mirror of the metrics; the record is metrics.jsonl in the run folder."""


@dataclass(frozen=True)
class Recalibration:
    """Phase 2 of a trained model: positions removed (DroPE) or kept (the control), then more training.

    The peak rates are those of phase 1 times `lr_factor`; warm-up, then half a cosine to 0.
    """

    fraction: float = 0.01
    """Steps, as a fraction of phase 1's. 0 removes the positions and trains nothing."""
    lr_factor: float = 0.1
    order: Literal["shared", "own"] = "shared"
    """shared: one shuffled stream, the same for all conditions of a seed. own: the condition's own order from its
    start, as in the first run, where it is confounded with the ordering."""
    warmup: int = 10
    """Steps of linear warm-up, at most half of the steps."""
    parent: str = ""
    """Folder of the trained run, relative to this run's; filled in by `phase2_config`."""

    @property
    def name(self) -> str:
        return f"{100 * self.fraction:g}pct-x{self.lr_factor:g}" + ("-own" if self.order == "own" else "")


@dataclass(frozen=True)
class RunConfig:
    """One training run, complete: RUN/config.json holds exactly this."""

    experiment: str
    attention: Attention
    ordering: Ordering
    seed: int
    """Of the weights, the plan and (through data.language.seed) the data."""
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    phase: Phase = "rope"
    recal: Recalibration | None = None
    """Phases drope and extra only."""

    @property
    def condition(self) -> str:
        return f"{self.attention}-{self.ordering}"

    @property
    def name(self) -> str:
        """The run's folder in a matrix: mha-shuffled-s0, ...-nope, ...-drope-1pct-x0.1, ...-extra-1pct-x0.1."""
        base = f"{self.condition}-s{self.seed}"
        if self.phase == "rope":
            return base
        return f"{base}-{self.phase}" + (f"-{self.recal.name}" if self.recal else "")


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
    recal = Recalibration(fraction=0.2, lr_factor=1.0, warmup=20)
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
    "text": ("Real text at 34M parameters, 3 seeds; make the corpus with `attn-clustering prepare`.", _text()),
    "v2": ("The seed's plan for real text: 97.5M parameters, 30,000 steps; for a corpus of many tokens.", _v2()),
}


def experiment_named(name: str) -> Experiment:
    """The experiment of that name. Raises UserError with the possible names."""
    if name not in EXPERIMENTS:
        raise UserError(f"no experiment {name!r}; there are {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name][1]
