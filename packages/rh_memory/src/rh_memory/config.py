"""Every option of a training run, and the presets. Imports no torch, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lab_shared.ranges import Count, Decay, Dropout, NonNegative, Positive, Seed, Share, Whole

ZEROS = 2_001_052
"""Zeros of the seed's table: those with ordinate below 1,132,490.66."""


@dataclass(frozen=True)
class ModelConfig:
    """A causal mixture-density transformer over unfolded spacings. The defaults are E0 (4,794,136 parameters)."""

    memory: Literal["none", "prefix", "postfix"] = "none"
    """prefix: slots before the data, which they cannot see (E1, E2). postfix: slots behind the data, which they see,
    and the only thing the prediction is read from (E3 to E5)."""
    context: Count = 256
    """Spacings in a full context."""
    d_model: Count = 256
    layers: Count = 6
    heads: Count = 8
    mlp_ratio: Count = 4
    dropout: Dropout = 0.1
    """Dropout on the embedded spacings and on what each attention and MLP adds to the residual stream."""
    attention_dropout: Dropout = 0.0
    """Dropout of attention weights."""
    pos: Literal["learned", "rope"] = "learned"
    """learned: absolute position embeddings (the seed). rope: rotary queries and keys by the index of the spacing."""
    inputs: Literal["spacing", "height"] = "spacing"
    """spacing: s. height: (s - 1, log(gamma / 2 pi) - 11.5), which tells the model the local density of zeros."""
    values: Literal["plain", "prime_rotary"] = "plain"
    """prime_rotary: values turn with gamma log q for prime powers q, so that a head forms tapered Landau sums."""
    frequencies: Literal["prime_powers", "shuffled", "random", "composite", "even"] = "prime_powers"
    """What takes the place of log q in prime_rotary; all but prime_powers are controls (see models/rotary.py)."""
    frequency_seed: Seed = 0
    """Of shuffled and random."""
    frequency_top: Positive | None = None
    """Largest frequency of random and even; None takes that of as many prime powers as there are pairs of channels."""
    frequency_count: Count | None = None
    """How many different frequencies there are, each for equally many pairs; None gives every pair its own."""
    height: Literal["true", "frozen"] = "true"
    """frozen: control; the model is told one constant height, and gamma is rebuilt from the spacings at that height."""
    mixture: Literal["gaussian", "lognormal"] = "gaussian"
    """gaussian: parity with the seed, puts some mass below zero. lognormal: positive spacings only."""
    components: Count = 8
    sigma_floor: Positive = 1e-4
    """Smallest scale of a component."""
    head_init: Literal["zero", "spread"] = "zero"
    """Biases of the mixture head: zero as in the seed, or components spread over the spacings' range."""
    block_norm: bool = False
    """Standardise inputs by the running mean and standard deviation of the window so far."""

    n_memory: Count = 8
    """Slots of a memory model."""
    slot_id_mode: Literal["fixed", "off", "permute_per_batch"] = "fixed"
    """Identity embedding of the slots: as learned, none, or dealt anew to the slots in every batch."""
    eval_slot_id_mode: Literal["same", "fixed", "off", "permute_per_batch"] = "same"
    """slot_id_mode outside training; permute_per_batch then uses permutations drawn from eval_perm_seed."""
    eval_perm_seed: Seed = 0
    eval_perm_average: Count = 1
    """Outside training, average the predicted densities over this many permutations (with permute_per_batch)."""
    content_mode: Literal["normal", "zeroed"] = "normal"
    """zeroed: slots have no learned content of their own."""
    slot_position: bool = True
    """Slots have positions of their own; False gives all slots of a group the same one."""
    readout_weight: Literal["learned", "uniform"] = "learned"
    """How a postfix model pools its slots."""
    causal_slots: bool = True
    """A slot sees itself and earlier slots; False: every slot of its group."""
    readouts: Count = 1
    """Groups of postfix slots, at contexts context/R, 2 context/R, ..., context. The data stream is computed once."""
    seed_slots: bool = False
    """Add the embedding of the last spacing in view to each postfix slot."""
    slot_dropout: Dropout = 0.0
    """Probability that a slot is left out of the pooling of a window while training."""
    norm_cap: Positive | None = None
    """Largest norm of a slot's content; longer ones are scaled down to it."""
    use_aux_loss: bool = False
    """Let memory slots also predict statistics of the window (mean squared error of z-scores; weights in loss)."""
    aux_target: Literal["q3", "stats"] = "q3"
    """q3: the eight proxies M0 to M7 (q3.py). stats: mean, standard deviation and autocorrelations 1 and 5."""


@dataclass(frozen=True)
class OptimConfig:
    lr: NonNegative = 3e-4
    """Peak learning rate."""
    memory_lr: NonNegative = 0.3
    """Factor on the learning rate of slot contents, identities and readout weights."""
    weight_decay: NonNegative = 0.01
    """On matrices only: not on biases, norms, embeddings and slots."""
    beta2: Decay = 0.95
    warmup: Whole = 0
    """Steps of linear warm-up."""
    final: Share = 0.1
    """The cosine ends at this fraction of the peak."""
    clip: Positive = 1.0
    """Gradient-norm limit."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for hidden matrices, AdamW for the rest."""
    muon_lr: NonNegative = 0.02
    ema: Decay = 0.0
    """Evaluate and keep an average of the weights that decays by this factor a step (0.999, say); 0: the weights."""


@dataclass(frozen=True)
class LossConfig:
    entropy_weight: NonNegative = 0.0
    """Bonus for the entropy of the mixture weights, in nats."""
    aux_mode: Literal["mean", "diagonal"] = "mean"
    """mean: the average of all slots' predictions. diagonal: slot i predicts statistic i only."""
    aux_weight: tuple[NonNegative, NonNegative] = (1e-3, 1e-2)
    """Weights at the ends of the two linear ramps, which start at 0."""
    aux_ramp: tuple[Whole, Whole] = (500, 3000)
    """Steps at which the two ramps end."""
    ortho_weight: tuple[NonNegative, NonNegative] = (0.0, 0.0)
    """Weight of ||G - I||^2, G the cosines between slot contents, at the ends of two ramps."""
    ortho_ramp: tuple[Whole, Whole] = (500, 5000)
    drift_weight: NonNegative = 0.0
    """Weight of the rollout loss: |cumulated error| of mean predictions fed back, later steps counting more."""
    drift_every: Count = 20
    drift_horizon: Count = 10
    drift_batch: Count = 16
    drift_context: Count = 10


@dataclass(frozen=True)
class DataConfig:
    source: Literal["zeta", "shuffled", "gue"] = "zeta"
    """shuffled: the zeta spacings in random order (nothing to learn but the marginal). gue: random matrices."""
    zeros: Count = ZEROS
    """How many zeros, from the first; of GUE eigenvalues, how many spacings. Of a `file` all are used."""
    file: str | None = None
    """A table written by `rh-memory zeros` or `import`; None computes the zeros, or reads those computed before."""
    folder: str = "data/rh_memory"
    """Where computed zeros are kept."""
    split: Literal["tail", "interleaved"] = "tail"
    """tail: the last tenth is held out (extrapolation in height). interleaved: blocks from everywhere."""
    windows: Literal["sliding", "rows"] = "sliding"
    """rows: only the seed's non-overlapping rows of 256 spacings."""
    mirror: bool = False
    """Read every other training window (drawn at random) downwards, as the zeros at -gamma follow each other."""
    seed: Seed = 0
    """Of the shuffle and of the random matrices."""


@dataclass(frozen=True)
class TrainConfig:
    """One run. `rh-memory train PRESET --optim.lr 1e-3` overrides any field."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    steps: Count = 20_000
    batch_size: Count = 512
    """Windows of one step, over all processes."""
    perm_warmup_steps: Whole = 0
    """Steps with fixed slot identities before permute_per_batch begins."""
    early_stop: bool = False
    """Stop when the validation loss has not improved for `patience` steps, and keep the best weights."""
    patience: Count = 10_000
    eval_every: Count = 500
    """Steps between looks at the validation windows."""
    eval_windows: Count = 4096
    """Validation windows of each look, evenly spaced and the same every time."""
    use_amp: bool | None = None
    """bfloat16 autocast; None uses it on a GPU only."""
    compile: bool | None = None
    """torch.compile the training step; None compiles on a GPU only."""
    seed: Seed = 0
    log_every: Count = 20
    checkpoint_every: Count = 1000
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Mirror of the metrics; the record is metrics.jsonl in the run folder."""


E0 = TrainConfig(
    model=ModelConfig(attention_dropout=0.1),
    optim=OptimConfig(warmup=1500, final=1e-5 / 3e-4),
    loss=LossConfig(entropy_weight=0.005),
)
"""The seed's SpacingMDN recipe, on sliding windows."""

_MODERN = OptimConfig(lr=1e-3, weight_decay=0.1, warmup=300, final=0.03)
_POSTFIX = OptimConfig(weight_decay=0.1, beta2=0.999, final=0.1)


def _with(config: TrainConfig, **sections: dict[str, Any] | Any) -> TrainConfig:
    """A copy with fields of the named sections replaced: _with(E0, model={"pos": "rope"}, steps=100)."""
    parts = {
        name: replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return replace(config, **parts)


E0_ROPE = _with(E0, model={"pos": "rope", "sigma_floor": 1e-3}, optim=_MODERN, loss=LossConfig(), steps=4000)
E1 = _with(E0, model={"memory": "prefix"}, loss={"drift_weight": 0.01})
E2 = _with(E1, loss={"drift_weight": 0.1, "drift_every": 10, "drift_horizon": 20, "drift_batch": 32})
_DETOX: dict[str, Any] = {
    "model": {"slot_id_mode": "permute_per_batch", "use_aux_loss": True},
    "early_stop": True,
}
_SPECIAL: dict[str, Any] = {
    "model": {"slot_dropout": 0.1, "norm_cap": 1.0, "block_norm": True},
    "loss": {"aux_mode": "diagonal", "ortho_weight": (1e-3, 1e-2)},
}
E3_ORIGINAL = _with(E0, model={"memory": "postfix", "attention_dropout": 0.0}, optim=_POSTFIX, loss=LossConfig())
E4_ORIGINAL = _with(E3_ORIGINAL, **_DETOX, patience=800)
E3 = _with(
    E0_ROPE,
    # FlexAttention, which these masks want, drops no weights.
    model={"memory": "postfix", "readouts": 16, "seed_slots": True, "attention_dropout": 0.0},
    steps=10_000,
)
E4 = _with(E3, **_DETOX)
_EXPLICIT: dict[str, Any] = {"inputs": "height", "values": "prime_rotary"}
EXPLICIT = _with(E0_ROPE, model=_EXPLICIT | {"attention_dropout": 0.0}, steps=5000)
EXPLICIT_SMALL = _with(
    EXPLICIT,
    # Two heads of 32: on CPUs attention costs by the head, and two learned as fast as four.
    model={"d_model": 64, "layers": 2, "heads": 2, "dropout": 0.0, "head_init": "spread"},
    # After 160 steps, one seed each: nll_last -1.12 with Muon, -0.80 with AdamW at any rate from 3e-3 to 1e-2.
    optim=replace(_MODERN, optimizer="muon", lr=5e-3, warmup=50),
    steps=1200,
    batch_size=32,
    eval_every=400,
    eval_windows=512,
    checkpoint_every=400,
)

# The first sentence of each description is what `rh-memory train --help` shows.
PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "explicit-small": ("100,504 parameters, explicit-formula attention, minutes on two CPU cores.", EXPLICIT_SMALL),
    "explicit": ("The flagship: 4.7 million parameters, explicit-formula attention. For one GPU.", EXPLICIT),
    "explicit-shuffled": (
        "Control: gaps between the log prime powers in shuffled order.",
        _with(EXPLICIT, model={"frequencies": "shuffled"}),
    ),
    "explicit-random": (
        "Control: random frequencies over the range of the log prime powers.",
        _with(EXPLICIT, model={"frequencies": "random"}),
    ),
    "explicit-even": (
        "Control: evenly spaced frequencies over the range of the log prime powers.",
        _with(EXPLICIT, model={"frequencies": "even"}),
    ),
    "explicit-composite": (
        "Control: logarithms of numbers with two or more different primes.",
        _with(EXPLICIT, model={"frequencies": "composite"}),
    ),
    "explicit-frozen": ("Control: the model is told one constant height.", _with(EXPLICIT, model={"height": "frozen"})),
    "e0": ("The seed's model without memory: learned positions, 4.79 million parameters.", E0),
    "e0-rope": ("E0 with rotary positions.", E0_ROPE),
    "e1": ("Prefix memory with the rollout loss.", E1),
    "e2": ("Prefix memory with the stronger rollout loss.", E2),
    "e1-rope": ("E1 with rotary positions.", _with(E0_ROPE, model={"memory": "prefix"}, loss=E1.loss)),
    "e2-rope": ("E2 with rotary positions.", _with(E0_ROPE, model={"memory": "prefix"}, loss=E2.loss)),
    "e3": ("Postfix memory, 16 readouts a window, rotary positions, slots seeded with the last spacing.", E3),
    "e4": ("E3 with permuted slot identities and auxiliary targets.", E4),
    "e5": ("E4 with orthogonal, capped and dropped slots, running normalisation, one target a slot.", E4),
    "e3-explicit": (
        "E3 with explicit-formula attention; the average of its weights is kept.",
        _with(E3, model=_EXPLICIT, optim={"ema": 0.999}, steps=5000),
    ),
    "e3-original": ("E3 as in the seed: one readout a window, learned positions.", E3_ORIGINAL),
    "e4-original": ("E4 as in the seed.", E4_ORIGINAL),
    "e5-original": ("E5 as in the seed.", E4_ORIGINAL),
}
for _name in ("e5", "e5-original"):
    PRESETS[_name] = (PRESETS[_name][0], _with(PRESETS[_name][1], **_SPECIAL))
