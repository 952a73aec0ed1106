"""Every option of a run. Imports no torch, so that `--help` answers at once.

A condition is attention x ordering, and its name says what it is: mha-shuffled, gqa-topic_ordered. `experiments.py`
derives the complete configuration of every run of an experiment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lab_shared.errors import UserError
from lab_shared.ranges import Count, NonNegative, Positive, Seed, Share, Whole

from attn_clustering.data.settings import LanguageConfig

Attention = Literal["mha", "gqa"]
Ordering = Literal["shuffled", "topic_ordered", "homogeneous_blocks", "random_blocks", "reversed", "interleaved"]
Phase = Literal["rope", "nope", "drope", "extra"]
ATTENTIONS: tuple[Attention, ...] = get_args(Attention)
ORDERINGS: tuple[Ordering, ...] = get_args(Ordering)


@dataclass(frozen=True)
class ModelConfig:
    """A Mini-Qwen3. The defaults are the first run's MHA model (27,403,776 parameters)."""

    vocab: Count = 4096
    d_model: Count = 512
    layers: Count = 8
    heads: Count = 8
    kv_heads: Count = 8
    """Key and value heads; divides `heads`."""
    head_dim: Count = 64
    mlp: Count = 1376
    """Hidden width of the SwiGLU."""
    rope: bool = True
    """Rotary positions; False is NoPE from scratch."""
    rope_theta: Positive = 1e6
    norm_eps: Positive = 1e-6
    init_std: NonNegative = 0.02
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
    cooldown: Share = 0.0
    """Fraction of the steps, at the end, on a shuffled stream that all orderings of a seed share."""
    partial: Literal["matched", "cut"] = "matched"
    """A last incomplete pass: the same sequences in every ordering, or the beginning of the ordered pass."""

    def __post_init__(self) -> None:
        if self.language is not None and self.corpus is not None:
            raise UserError(
                f"corpus={self.corpus}: these data are a micro-language already; for a corpus take the experiment "
                "text or v2"
            )


@dataclass(frozen=True)
class OptimConfig:
    """How a model is trained. The defaults are the first run's constants."""

    steps: Whole = 10_000
    """0 only saves the weights of the start: a recalibration that removes the positions and trains nothing."""
    batch: Count = 64
    """Sequences of one step, over all processes."""
    warmup: Whole = 500
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    """wsd: constant, then linear to 0 over the last fifth."""
    muon_lr: Positive = 0.02
    """Peak rate of Muon (hidden matrices)."""
    lr: Positive = 3e-4
    """Peak rate of AdamW (embedding and gains)."""
    weight_decay: NonNegative = 0.01
    """Decoupled, times the rate; on matrices."""
    decay_gains: bool = False
    """Also on the norms' gains, as in the first run."""
    adam_eps: Positive = 1e-10
    clip: Positive = 1.0
    """Gradient-norm limit."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast type of training and evaluation; auto is bfloat16 on a GPU and float32 on a CPU."""
    residual: Literal["float32", "bfloat16"] = "float32"
    """Type of the residual stream under bfloat16 autocast."""
    compile: Literal["auto", "off", "block"] = "auto"
    """block: torch.compile of one block, used for all, of embedding and head. auto: block on a GPU from 100 steps."""
    step_graph: Literal["auto", "off", "on"] = "auto"
    """Record the whole step, optimiser included, as one CUDA graph. auto: alone on a GPU, from 100 steps."""
    eval_every: Count = 500
    """Steps between looks at the validation loss."""
    eval_sequences: Count = 3200
    """Validation sequences of a look; rounded down to whole batches. The final loss uses as many."""
    log_every: Count = 50
    checkpoint_every: Count = 1000
    wandb: Literal["offline", "online", "disabled"] = "disabled"
    """Mirror of the metrics; the record is metrics.jsonl in the run folder."""


@dataclass(frozen=True)
class Recalibration:
    """Phase 2 of a trained model: positions removed (DroPE) or kept (the control), then more training.

    The peak rates are those of phase 1 times `lr_factor`; warm-up, then half a cosine to 0.
    """

    fraction: NonNegative = 0.01
    """Steps, as a fraction of phase 1's. 0 removes the positions and trains nothing."""
    lr_factor: Positive = 0.1
    order: Literal["shared", "own"] = "shared"
    """shared: one shuffled stream, the same for all conditions of a seed. own: the condition's own order from its
    start, as in the first run, where it is confounded with the ordering."""
    warmup: Whole = 10
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
    seed: Seed
    """Of the weights, the plan and (through data.language.seed) the data."""
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    phase: Phase = "rope"
    recal: Recalibration | None = None
    """Phases drope and extra only."""

    def __post_init__(self) -> None:
        model = self.model
        if (self.attention == "gqa") != (model.kv_heads < model.heads):
            raise UserError(
                f"attention={self.attention} with heads={model.heads} and kv_heads={model.kv_heads}: mha has as many "
                "key and value heads as query heads, gqa fewer"
            )
        if (self.phase == "nope") == model.rope:
            raise UserError(
                f"phase={self.phase} with model.rope={model.rope}: a model without positions from the start is phase "
                "nope, and only that; `train CONDITION --nope` sets both"
            )
        if (self.phase in ("drope", "extra")) != (self.recal is not None):
            raise UserError(
                f"phase={self.phase} {'with' if self.recal else 'without'} a recalibration: a trained run is "
                "recalibrated with `attn-clustering drope RUN`"
            )

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
