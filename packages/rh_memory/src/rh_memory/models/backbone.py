"""The transformer all models share, and the one without memory (E0, explicit-formula).

Shapes: B batch, T tokens (T spacings, plus slots in memory models), D channels, H heads, C = D / H, F pairs of
channels of a head, K mixture components.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from lab_shared.attention import Backend, Mask, attend
from lab_shared.errors import UserError
from torch import Tensor, nn

from rh_memory.config import ModelConfig
from rh_memory.data.windows import WindowBatch
from rh_memory.mdn import MDNHead, Mixture
from rh_memory.models.rotary import index_turns, log_frequencies, rotate, rotations

Positions = Literal["all", "last", "readouts"]
HEIGHT_CENTRE = 11.5
"""log(gamma / 2 pi) near the middle of the first two million zeros; models see the difference from it."""


class Context(NamedTuple):
    """What a model sees: the spacings so far and where they are. `Context.of(batch)` leaves out the last spacing."""

    s_BT: Tensor
    log_height_BT: Tensor
    gamma_BT: Tensor

    @staticmethod
    def of(batch: WindowBatch) -> Context:
        return Context(batch.s_BW[:, :-1], batch.log_height_BW[:, :-1], batch.gamma_BW[:, :-1])


class Output(NamedTuple):
    """Of a training forward pass: tensors of the mixtures, and of memory models what their slots predict."""

    mixture: tuple[Tensor, Tensor, Tensor]
    aux_BMA: Tensor | None = None


class Rotary(NamedTuple):
    """cos and sin for queries and keys, and for values; None where nothing turns."""

    index_TF2: Tensor | None
    value_BTHF2: Tensor | None


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.d_model
        self.heads, self.dropout = config.heads, config.attention_dropout
        self.qk = nn.Linear(d, 2 * d, bias=False)
        # A constant value turned by gamma log q is the plain Landau sum, so turning values have a bias.
        self.v = nn.Linear(d, d, bias=config.values == "prime_rotary")
        self.out = nn.Linear(d, d, bias=False)

    def forward(
        self, x_BTD: Tensor, rotary: Rotary, mask: Mask, backend: Backend | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The attention's output (B, T, D), and its weights (B, H, T, T) from backend="reference" only."""
        qk_BT2HC = self.qk(x_BTD).unflatten(-1, (2, self.heads, -1))
        v_BTHC = self.v(x_BTD).unflatten(-1, (self.heads, -1))
        if rotary.index_TF2 is not None:
            qk_BT2HC = rotate(qk_BT2HC, rotary.index_TF2[:, None, None])
        if rotary.value_BTHF2 is not None:
            v_BTHC = rotate(v_BTHC, rotary.value_BTHF2, back=True)
        q, k, v = (x.transpose(1, 2) for x in (*qk_BT2HC.unbind(2), v_BTHC))
        weights = None
        if backend == "reference":
            out, weights = attend(q, k, v, mask, backend=backend, return_weights=True)
        else:
            dropout = self.dropout if self.training else 0.0
            out = attend(q, k, v, mask, dropout=dropout, backend=backend)
        out_BTHC = out.transpose(1, 2)
        if rotary.value_BTHF2 is not None:
            out_BTHC = rotate(out_BTHC, rotary.value_BTHF2)
        return self.out(out_BTHC.flatten(2)), weights


class Block(nn.Module):
    """Pre-norm attention and GELU MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, wide = config.d_model, config.mlp_ratio * config.d_model
        self.norm_attention = nn.LayerNorm(d, bias=False)
        self.attention = Attention(config)
        self.norm_mlp = nn.LayerNorm(d, bias=False)
        self.up = nn.Linear(d, wide, bias=False)
        self.down = nn.Linear(wide, d, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_BTD: Tensor, rotary: Rotary, mask: Mask, backend: Backend | None = None
    ) -> tuple[Tensor, Tensor | None]:
        attended_BTD, weights = self.attention(self.norm_attention(x_BTD), rotary, mask, backend)
        x_BTD = x_BTD + self.dropout(attended_BTD)
        x_BTD = x_BTD + self.dropout(self.down(F.gelu(self.up(self.norm_mlp(x_BTD)))))
        return x_BTD, weights


class Backbone(nn.Module):
    """Embedding of spacings, blocks, final norm. n_positions: rows of the learned position table."""

    turns_per_gamma_HF: Tensor

    def __init__(self, config: ModelConfig, n_positions: int) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.embed_data = nn.Linear(1 if config.inputs == "spacing" else 2, config.d_model)
        self.position = nn.Embedding(n_positions, config.d_model) if config.pos == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.d_model, bias=False)
        log_q = torch.from_numpy(log_frequencies(config)) if config.values == "prime_rotary" else torch.zeros(0)
        turns = (log_q.double() / (2 * math.pi)).view(-1, config.heads).T.contiguous()
        self.register_buffer("turns_per_gamma_HF", turns, persistent=False)

    def see(self, data: Context) -> Context:
        """What the configuration lets the model see: with height="frozen" one height, and zeros spaced by it."""
        if self.config.height == "true":
            return data
        u_BT = (data.s_BT.double().cumsum(-1) - data.s_BT[:, :1]) * (2 * math.pi / HEIGHT_CENTRE)
        return Context(data.s_BT, torch.full_like(data.log_height_BT, HEIGHT_CENTRE), u_BT)

    def embed(self, data: Context) -> Tensor:
        """(B, T, D) of the spacings, without positions."""
        s_BT = data.s_BT
        if self.config.block_norm:
            s_BT = running_standard(s_BT)
        if self.config.inputs == "spacing":
            return self.embed_data(s_BT[..., None])
        return self.embed_data(torch.stack([s_BT - 1, data.log_height_BT - HEIGHT_CENTRE], -1))

    def rotary(self, position_T: Tensor, gamma_BT: Tensor) -> Rotary:
        pairs = self.config.d_model // self.config.heads // 2
        index = rotations(index_turns(position_T, pairs)) if self.config.pos == "rope" else None
        if self.config.values == "plain":
            return Rotary(index, None)
        return Rotary(index, rotations(gamma_BT[..., None, None] * self.turns_per_gamma_HF))

    def forward(
        self,
        x_BTD: Tensor,
        position_T: Tensor,
        gamma_BT: Tensor,
        mask: Mask,
        backend: Backend | None = None,
        kept: list[Tensor] | None = None,
    ) -> Tensor:
        """Final states (B, T, D). With backend="reference", each layer's weights (B, H, T, T) are added to `kept`."""
        rotary = self.rotary(position_T, gamma_BT)
        if self.position is not None:
            x_BTD = x_BTD + self.position(position_T)
        x_BTD = self.dropout(x_BTD)
        for block in self.blocks:
            x_BTD, weights = block(x_BTD, rotary, mask, backend)
            if kept is not None and weights is not None:
                kept.append(weights)
        return self.norm(x_BTD)


class SpacingMDN(nn.Module):
    """E0 and its descendants without memory: every position t predicts spacing t + 1 from spacings 0..t."""

    n_memory = 0

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, config.context)
        self.head = MDNHead(config)
        initialise(self)

    def training_mask(self, n_data: int, device: torch.device) -> Mask:
        """The mask that `forward` wants, to be made once before the loop."""
        return Mask.causal()

    def forward(self, data: Context, mask: Mask, id_perm_M: Tensor | None = None) -> Output:
        """Mixture tensors (B, T, K) for every position. id_perm_M: of memory models; ignored here."""
        return Output(self.head(self.states(data, mask)))

    def states(self, data: Context, mask: Mask, backend: Backend | None = None) -> Tensor:
        """Final states (B, T, D)."""
        data = self.backbone.see(data)
        position_T = torch.arange(data.s_BT.size(1), device=data.s_BT.device)
        return self.backbone(self.backbone.embed(data), position_T, data.gamma_BT, mask, backend)

    def predict(self, batch: WindowBatch, positions: Positions = "all") -> Mixture:
        """Densities of the spacings 1..W-1 of each window (B, W - 1), or of the last one only (B,).

        The last spacing of the batch is a target and is not seen; position t is predicted from spacings 0..t.
        """
        h_BTD = self.states(Context.of(batch), Mask.causal())
        return self.head.mixture(pick(h_BTD, positions))


def pick(h_BTD: Tensor, positions: Positions) -> Tensor:
    """The states that `positions` asks for. Raises ValueError for readouts, which only a postfix memory has."""
    if positions == "readouts":
        raise ValueError("positions='readouts' is for postfix memories; use 'all' or 'last'")
    return h_BTD[:, -1] if positions == "last" else h_BTD


def running_standard(s_BT: Tensor, prior: int = 16, mean: float = 1.0, std: float = 0.41) -> Tensor:
    """Each spacing minus the running mean, over the running standard deviation, of the window up to and with it.

    `prior` pseudo-observations of the given mean and standard deviation steady the first positions. Causal.
    """
    n_T = torch.arange(1, s_BT.size(-1) + 1, device=s_BT.device) + prior
    m_BT = (s_BT.cumsum(-1) + prior * mean) / n_T
    square_BT = (s_BT.square().cumsum(-1) + prior * (mean**2 + std**2)) / n_T
    return (s_BT - m_BT) * (square_BT - m_BT.square()).clamp(min=1e-6).rsqrt()


def initialise(model: nn.Module) -> None:
    """N(0, 0.02) for matrices, 0.02 / sqrt(2 layers) where a block writes to the residual stream, biases zero."""
    layers = sum(isinstance(module, Block) for module in model.modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            residual = name.endswith((".attention.out", ".down"))
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, MDNHead):
            module.reset_bias()


_OPTIONS_OF: dict[tuple[str, ...], tuple[str, ...]] = {
    ("memory", "postfix"): ("readouts", "seed_slots", "slot_dropout", "readout_weight"),
    ("memory", "prefix", "postfix"): (
        "slot_id_mode", "eval_slot_id_mode", "eval_perm_average", "content_mode", "slot_position", "causal_slots",
        "norm_cap",
    ),
    ("values", "prime_rotary"): ("frequencies", "frequency_seed", "frequency_top", "frequency_count"),
}  # fmt: skip
"""A field with some of its values, and the options that nothing reads under its other values."""


def _check(config: ModelConfig) -> None:
    for (field, *values), options in _OPTIONS_OF.items():
        for name in options if getattr(config, field) not in values else ():
            if (value := getattr(config, name)) != getattr(ModelConfig(), name):
                raise UserError(
                    f"model.{name} = {value} would change nothing: it is for model.{field} = {' or '.join(values)}, "
                    f"here it is {getattr(config, field)}"
                )
    for name in ("context", "d_model", "layers", "heads", "mlp_ratio", "components", "n_memory", "readouts"):
        if (value := getattr(config, name)) < 1:
            raise UserError(f"model.{name} is {value}: it must be at least 1")
    if config.d_model % (2 * config.heads):
        raise UserError(
            f"model.d_model = {config.d_model} is no multiple of 2 x model.heads = {2 * config.heads}: "
            "heads hold pairs of channels"
        )
    if config.context % config.readouts:
        raise UserError(f"model.readouts = {config.readouts} does not divide model.context = {config.context}")
