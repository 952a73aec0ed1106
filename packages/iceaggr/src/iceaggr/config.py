"""Every option of a training run, and the presets. Imports no torch, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from lab_shared.ranges import Count, Decay, Dropout, NonNegative, Positive, Range, Share, Whole

EventSeed = Annotated[int, Range(0, 2**31 - 1)]
"""Seeds that the simulator has events for."""


@dataclass(frozen=True)
class ModelConfig:
    """A flat transformer over hit DOMs. The defaults are the seed's small v2 model (548,107 parameters)."""

    arch: Literal["v1", "v2", "hierarchical"] = "v2"
    """v2: functional RMSNorm, QK norm, ReLU^2, no biases, residual scaling. v1: pre-norm LayerNorm/GELU.
    hierarchical: T1 turns the pulses of each DOM into its embedding, T2 the DOMs of an event into its direction, with
    `layers` layers each; of the options of the features only `features` = seed applies."""
    features: Literal["seed", "summary"] = "seed"
    """seed: [x, y, z, n, t1, q1, a1, ..., tK, qK, aK]. summary: aggregates per DOM relative to the event."""
    slots: Count = 16
    """K, the pulses per DOM in seed features."""
    empty: Literal["marker", "zero"] = "marker"
    """What fills absent pulse slots: values no real pulse has, or zeros as in the seed (which real pulses have)."""
    input: Literal["none", "linear", "mlp"] = "linear"
    """Projection of the features to d_model; none pads them with zeros."""
    d_model: Count = 128
    d_hidden: Count = 256
    layers: Count = 4
    heads: Count = 8
    head_hidden: Count = 128
    """Hidden width of the direction head."""
    dropout: Dropout = 0.0
    """Dropout on attention output (the seed used 0.1 on attention weights)."""
    dom_cap: Count | None = None
    """Keep at most this many DOMs per event; None keeps all (the seed kept 128)."""
    dom_select: Literal["earliest", "hlc"] = "hlc"
    """Which DOMs survive dom_cap: the earliest, or those with HLC pulses first and then the brightest."""
    max_batch_size: Count | None = None
    """hierarchical: T1 works on at most this many sequences of 512 pulses at once, which bounds its memory; None
    takes a batch whole, which is faster."""
    checkpoint: bool = False
    """hierarchical: T1 keeps no activations for the backward pass but computes them again there."""
    input_norm: Literal["rms", "none"] = "rms"
    """v2 only. rms: RMSNorm of the projected features, as in the seed; with input = none that rescales a DOM's
    coordinates by how many of its slots are filled. none: no such norm; with input = none one column of the padding
    holds 1, against which the norms inside the blocks keep absolute values."""
    fourier: Whole = 0
    """Sines and cosines of x, y, z, first time and first charge at so many wavelengths beside the features; 0: none."""
    aggregates: bool = False
    """Per-DOM summaries relative to the event (those of features = summary) beside seed features."""
    ice: bool = False
    """Scattering and absorption length of the ice at the DOM, and its quantum efficiency, beside the features."""
    interval: bool = False
    """Attention scores learn from the space-time interval (c_ice dt)^2 - dx^2 between two DOMs."""
    head_mixture: Count = 1
    """Von Mises-Fisher components of the answer; more than 1 needs optim.vmf_weight."""


@dataclass(frozen=True)
class OptimConfig:
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for hidden matrices, AdamW for the rest."""
    lr: Positive = 3e-4
    """Peak AdamW learning rate."""
    muon_lr: Positive = 0.02
    """Peak Muon learning rate."""
    weight_decay: NonNegative = 0.01
    clip: Positive = 1.0
    """Gradient-norm limit."""
    schedule: Literal["constant", "cosine", "one_cycle", "wsd"] = "cosine"
    warmup: Share = 0.05
    """Warm-up as a fraction of all steps."""
    vmf_weight: NonNegative = 0.0
    """Weight of the von Mises-Fisher negative log-likelihood (kappa = length of the output vector)."""
    angle_weight: NonNegative = 1.0
    """Weight of the opening angle in radians."""
    rotate: bool = False
    """Rotate each training event about the vertical axis by a random angle."""
    ema: Decay = 0.0
    """Decay per step of the moving average of the weights that evaluation uses; 0 uses the weights themselves."""


@dataclass(frozen=True)
class DataConfig:
    data: str | None = None
    """Kaggle-format folder; None simulates one under `store` (or reuses the one already there). "stream" trains on
    events simulated on the way, none of them twice and none on disk; an epoch is then train_events of them."""
    store: str = "data/iceaggr"
    """Where simulated folders and caches are kept."""
    cache: str | None = None
    """Folder of the binary event store; None derives one under `store` from the data folder."""
    geometry: str | None = None
    """A sensor_geometry.csv that replaces the one in the data folder or the built-in array."""
    train_events: Count | None = None
    """Use at most this many training events. With simulated data: how many to simulate."""
    val_events: Count = 20_000
    """Held-out events; taken from the end of the event list, disjoint by event id."""


@dataclass(frozen=True)
class TrainConfig:
    """One run. `iceaggr train PRESET --optim.lr 1e-3` overrides any field."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    epochs: Positive = 10.0
    """Passes over the training events."""
    tokens_per_batch: Count | None = None
    """Tokens (CLS + DOMs) of one step on one process; None is 4,096 on a CPU (5,161
    without dom_cap, for the largest possible event) and 262,144 on a GPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast type of the forward pass; auto is bfloat16 on a GPU and float32 on a CPU."""
    compile: bool | None = None
    """torch.compile the model; None compiles on a GPU only."""
    tta: Count = 1
    """Rotations about the vertical axis, evenly spaced, over which a prediction is averaged."""
    oracle: Whole | None = None
    """Held-out simulated events whose direction the simulator's own likelihood is asked for, as the limit in the
    result table; None: 5,000 on a GPU, none on a CPU."""
    seed: EventSeed = 0
    """Of weights, order and simulated events."""
    log_every: Count = 20
    """Steps between log lines."""
    checkpoint_every: Count = 500
    """Steps between checkpoints."""
    eval_every: Count = 500
    """Steps between looks at the held-out set."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Mirror of the metrics; the record is metrics.jsonl in the run folder."""


def _seed(**model: object) -> TrainConfig:
    """The seed's v2 models under this package's training recipe."""
    return TrainConfig(
        model=ModelConfig(**model),  # type: ignore[arg-type]
        optim=OptimConfig(optimizer="muon", lr=1e-3, vmf_weight=1.0, angle_weight=0.3, rotate=True),
        data=DataConfig(train_events=2_000_000, val_events=50_000),
    )


V3_PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "fourier": {"model": {"fourier": 8}},
    "aggregates": {"model": {"aggregates": True}},
    "ice": {"model": {"ice": True}},
    "interval": {"model": {"interval": True}},
    "mixture": {"model": {"head_mixture": 3}},
    "ema": {"optim": {"ema": 0.999}},
    "tta": {"run": {"tta": 6}},
}
"""What v3 adds to v2: name -> the fields it sets, by part of the configuration."""


V3_KEPT = ("fourier", "aggregates", "tta")
"""The parts that win their comparison with v2 (results/ablate-v3); the preset has these, `iceaggr ablate v3` all."""
STUDIES = ("seed-table", "choices", "v3", "scale")
"""What `iceaggr ablate` can do; `iceaggr.ablations.study` says what each is."""


def with_parts(config: TrainConfig, *parts: str) -> TrainConfig:
    """The configuration with these of `V3_PARTS` switched on."""
    for part in parts:
        fields = V3_PARTS[part]
        config = replace(
            config,
            model=replace(config.model, **fields.get("model", {})),
            optim=replace(config.optim, **fields.get("optim", {})),
            **fields.get("run", {}),
        )
    return config


# The first sentence of each description is what `iceaggr train --help` shows.
PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "quick": (
        "157,513 parameters, minutes on two CPU cores: per-DOM summaries, at most 64 DOMs an event, 60,000 events.",
        TrainConfig(
            model=ModelConfig(
                features="summary", d_model=64, d_hidden=256, layers=3, heads=4, head_hidden=128, dom_cap=64
            ),
            optim=OptimConfig(optimizer="muon", lr=1e-3, vmf_weight=1.0, angle_weight=0.3, rotate=True),
            data=DataConfig(train_events=60_000, val_events=12_000),
            epochs=2.5,
        ),
    ),
    "small": (
        "The seed's small v2 model, 548,107 parameters (K=16, linear input, d=128, 4 layers). For one GPU.",
        _seed(),
    ),
    "5M": (
        "The seed's scale-up, 4,985,103 parameters (K=41, features straight into the residual stream, 6 layers).",
        _seed(slots=41, input="none", d_model=256, d_hidden=1024, layers=6, head_hidden=1024),
    ),
    "7M": (
        "As 5M with 8 layers, 6.6 million parameters.",
        _seed(slots=41, input="none", d_model=256, d_hidden=1024, layers=8, head_hidden=1024),
    ),
    "8M": (
        "As 5M with d=320, a hidden width of 1280 and a linear input, 7.7 million parameters.",
        _seed(slots=41, input="linear", d_model=320, d_hidden=1280, layers=6, head_hidden=1024),
    ),
    "10M-deep": (
        "As 5M with 12 layers, 9.7 million parameters.",
        _seed(slots=41, input="none", d_model=256, d_hidden=1024, layers=12, head_hidden=1024),
    ),
    "v1": (
        "The seed's first model, 553,987 parameters: LayerNorm, GELU, biases.",
        _seed(arch="v1"),
    ),
    "t1t2": (
        "The seed's hierarchical model, 1,612,547 parameters: pulses to DOMs (T1), DOMs to events (T2), "
        "d=128, 8 heads, 4 layers each.",
        _seed(arch="hierarchical", d_hidden=512),
    ),
    "v3": (
        "Small v2 with what won against it, 560,139 parameters: Fourier and event-relative features, 6 rotations.",
        with_parts(_seed(), *V3_KEPT),
    ),
}
