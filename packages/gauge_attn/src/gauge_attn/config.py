"""Every option of a training run, and the presets. Imports no torch, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from lab_shared.ranges import Count, NonNegative, Positive, Seed, Whole

KappaMode = Literal["shared", "dim", "sqrt_dim", "standardised", "learnable"]
SEED_SPEC = "5x0e+3x1e+1x2e"


@dataclass(frozen=True)
class ModelConfig:
    """One language model; which fields count depends on `arch`."""

    arch: Literal["faithful", "practical", "gpt"] = "practical"
    """faithful: token beliefs attend to each other and nothing is projected. practical: KL attention inside an
    equivariant transformer block. gpt: the dot-product baseline."""
    spec: str = SEED_SPEC
    """Attention heads as irreps: 5x0e is five scalar heads, 1x2e one head of dimension five."""
    layers: Count = 1
    kappa: Positive = 0.43
    """Base temperature of softmax(-KL / kappa)."""
    kappa_mode: KappaMode = "shared"
    """kappa of a head of dimension d. shared: kappa. dim: kappa d. sqrt_dim: kappa sqrt(d). standardised: kappa times
    the std over keys of its KL, measured on the first batch. learnable: a parameter per head that starts at kappa."""
    self_mask: bool = True
    """A token does not attend to itself (the first one must)."""
    frames: Literal["learned", "frozen"] = "learned"
    """frozen: phi = 0 for good, so that transport is the identity."""
    frame_std: NonNegative = 0.1
    """Std of phi (rad) per component at the start."""
    mean_std: NonNegative | None = None
    """Std of the means at the start; None is sqrt(kappa), so that the KL per dimension starts near kappa."""

    positions: Literal["learned", "none"] = "learned"
    """faithful: whether a learned vector of the position is added to the mean."""
    residual: bool = True
    """faithful: add attention's mean to the incoming one."""
    evolve_sigma: bool = True
    """faithful: later layers see the covariance of the attended mixture, not the token's own."""
    gauge_fixed: bool = False
    """faithful: every token has the same belief up to its frame, which makes every KL zero."""
    vfe_step: bool = False
    """faithful: a natural-gradient step on the variational free energy after every attention."""
    route: Literal["exact", "dense"] = "exact"
    """faithful: exact features at any length, or the pairwise reference, which the options below need."""
    covariance: Literal["full", "diag_approx"] = "full"
    """dense: transported covariances whole, or their diagonal only, as the original did."""
    exponential: Literal["exact", "taylor4"] = "exact"
    """dense: the matrix exponential of a frame, or four terms of its series, as the original did."""
    curvature: NonNegative = 0.0
    """dense: strength c of exp(c phi_i x phi_j) between the frames of i and j; 0 is the flat connection."""

    scalars: Count = 48
    """practical: scalar channels of the residual stream."""
    copies: Count = 4
    """practical: channels of every l > 0 head's type in the residual stream, per head."""
    hidden: Count = 96
    """practical: hidden width of the gated MLP."""
    value_scalars: Count = 8
    """practical: scalars that a head carries beside a vector of its own type."""
    rope: bool = True
    """practical: gauge RoPE on heads of l > 0."""
    alibi: bool = True
    """practical: a learnable ALiBi slope per head; scalar heads see positions by nothing else."""
    precision: Literal["fp32", "bf16x3"] = "fp32"
    """practical: number format of attention. bf16x3: features split into bf16 head and tail, and weights rounded to
    bf16 as in any model trained in it; for GPUs, which have tensor cores for it and none for float32."""

    d_model: Count = 64
    """gpt: width."""
    heads: Count = 4
    """gpt: attention heads."""


@dataclass(frozen=True)
class OptimConfig:
    """Peak learning rates by what a parameter is; each parameter declares its role."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for hidden matrices, AdamW for the rest."""
    mean_lr: Positive = 0.02
    """Means of beliefs and position vectors."""
    sigma_lr: Positive = 0.005
    """Log variances."""
    phi_lr: Positive = 0.02
    """Frames."""
    kappa_lr: Positive = 0.01
    """Log temperatures and log ALiBi slopes."""
    lr: Positive = 3e-3
    """Hidden matrices (under AdamW), gains and biases, token embeddings of practical and gpt."""
    muon_lr: Positive = 0.02
    readout_lr: Positive = 0.01
    weight_decay: NonNegative = 0.01
    """On hidden matrices and the readout only."""
    clip: Positive = 1.0
    """Gradient-norm limit."""
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    warmup: Whole = 25
    """Steps."""
    alignment: NonNegative = 0.0
    """Weight of the alignment loss sum_j beta_ij KL_ij, a mean over heads, layers and batch."""
    alignment_reduction: Literal["none", "mean", "sum"] = "mean"
    """Over the N queries of a window. sum is the original's, N times the weight of mean; none leaves it out."""


@dataclass(frozen=True)
class DataConfig:
    data: str = "induction"
    """A text file or folder, wikitext-2, tinyshakespeare, or induction (generated)."""
    folder: str | None = None
    """Where wikitext-2 and tinyshakespeare lie or are downloaded to; None is $GAUGE_ATTN_DATA, then data/gauge_attn."""
    tokenizer: Literal["byte", "bpe", "word"] = "byte"
    """How text is cut; byte has 256 symbols."""
    vocab: Count = 2048
    """Symbols of bpe and word."""
    split: Literal["contiguous", "documents"] = "contiguous"
    """90/5/5 for training, validation and test: in stretches of the text, or of whole documents."""
    window: Count = 64
    """Tokens that the model sees at once, N."""
    batch: Count = 24
    """Windows of a step, over all processes."""
    keys: Count = 16
    """induction: distinct keys, and as many values."""
    val_windows: Count = 512
    """induction: held-out windows."""


@dataclass(frozen=True)
class TrainConfig:
    """One run. `gauge-attn train PRESET --model.kappa 0.1` overrides any field."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    steps: Count = 1000
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast type of projections and readout; auto is bfloat16 on a GPU. KL logits stay in float32."""
    compile: bool | None = None
    """torch.compile the model; None compiles on a GPU for runs of 2000 steps or more."""
    seed: Seed = 0
    log_every: Count = 20
    checkpoint_every: Count = 500
    eval_every: Count = 200
    """Steps between looks at the validation split and at the attention."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Mirror of the metrics; the record is metrics.jsonl in the run folder."""


_TEXT = DataConfig(tokenizer="word", vocab=2048)


def faithful(kappa: float = 0.43, **model: object) -> TrainConfig:
    """The faithful model without alignment loss, at the seed's size; text is cut into words."""
    return TrainConfig(
        model=ModelConfig(arch="faithful", kappa=kappa, **model),  # type: ignore[arg-type]
        data=_TEXT,
        steps=1000,
    )


def seed_run(kappa: float) -> TrainConfig:
    """The seed's run: exact exponential and covariance, alignment summed over queries, its initialisation."""
    config = faithful(kappa, mean_std=0.02)
    return replace(config, optim=replace(config.optim, alignment=1.0, alignment_reduction="sum"))


def as_original(config: TrainConfig) -> TrainConfig:
    """The same run with the original's diagonal covariance and four-term exponential (dense, so slow)."""
    return replace(config, model=replace(config.model, route="dense", covariance="diag_approx", exponential="taylor4"))


_QUICK_DATA = DataConfig(batch=16, keys=4)
_QUICK_OPTIM = OptimConfig(optimizer="muon", lr=0.01, muon_lr=0.05, kappa_lr=0.03)
_SMALL_DATA = DataConfig(window=256, batch=64)

PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "quick": (
        "Practical model on the generated induction language, minutes on two CPU cores.",
        TrainConfig(
            model=ModelConfig(layers=2, kappa_mode="learnable", kappa=1.0),
            optim=_QUICK_OPTIM,
            data=_QUICK_DATA,
            steps=400,
            eval_every=50,
            wandb="disabled",
        ),
    ),
    "gpt-quick": (
        "Dot-product GPT with the parameters of quick.",
        TrainConfig(
            model=ModelConfig(arch="gpt", layers=2, d_model=44, heads=2),
            optim=_QUICK_OPTIM,
            data=_QUICK_DATA,
            steps=400,
            eval_every=50,
            wandb="disabled",
        ),
    ),
    "faithful-seed-a": ("The seed's first row: kappa 0.43, alignment loss summed over queries.", seed_run(0.43)),
    "faithful-seed-b": ("The seed's second row: kappa 0.00043.", seed_run(0.00043)),
    "faithful-seed-c": ("The seed's third row: kappa 0.0086.", seed_run(0.0086)),
    "faithful-seed-c-original": (
        "faithful-seed-c with the original's diagonal covariance and four-term exponential.",
        as_original(seed_run(0.0086)),
    ),
    "faithful-free": ("No alignment loss, kappa 0.43.", faithful()),
    "faithful-sharp": ("No alignment loss, kappa 0.0086.", faithful(0.0086)),
    "faithful-learnable": ("No alignment loss, a learnable temperature per head.", faithful(kappa_mode="learnable")),
    "faithful-standardised": ("No alignment loss, logits standardised per head.", faithful(kappa_mode="standardised")),
    "faithful-gauge-fixed": ("One belief seen in many frames: every KL is zero.", faithful(gauge_fixed=True)),
    "faithful-vfe": ("With a free-energy step after attention.", faithful(vfe_step=True)),
    "practical-small": (
        "Practical model for text on one GPU: 4 layers, window 256, bytes.",
        TrainConfig(
            model=ModelConfig(
                spec="4x0e+4x1e+4x2e", layers=4, kappa_mode="learnable", kappa=1.0, scalars=192, copies=4,
                hidden=512, value_scalars=16,
            ),
            optim=replace(_QUICK_OPTIM, lr=1e-3),
            data=_SMALL_DATA,
            steps=3000,
        ),
    ),
    "gpt-small": (
        "Dot-product GPT with the parameters of practical-small.",
        TrainConfig(
            model=ModelConfig(arch="gpt", layers=4, d_model=168, heads=6),
            optim=replace(_QUICK_OPTIM, lr=1e-3),
            data=_SMALL_DATA,
            steps=3000,
        ),
    ),
}  # fmt: skip
