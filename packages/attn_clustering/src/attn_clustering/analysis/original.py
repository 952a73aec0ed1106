"""What the original experiment published, and where a faithful run must land.

Two records exist and disagree in all eight rows: the experiment log's table and the committed all_results.json. The
JSON carries the training logs it came from, so it is taken as the record and the log's table as unverified; even the
sign of ordering's effect on validation loss differs (the log has topic-ordered better by .016 to .019 nats with RoPE,
the JSON worse by .018 and .030). Its within-topic shares and entropies were measured without the causal mask.

One seed, probes scored on a split by token. Losses in nats, shares and accuracies as fractions.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    val_loss: float
    within: float
    entropy: float
    probe: tuple[float, ...]
    """Topic accuracy after the embedding and after each block; the log gives block 4 alone."""


JSON_RECORD = {
    "mha-shuffled": Row(8.0146, 0.715, 4.43, (0.554, 0.651, 0.933, 0.947, 0.948, 0.954, 0.958, 0.959, 0.958)),
    "mha-shuffled-drope": Row(8.1898, 0.474, 5.50, (0.554, 0.645, 0.703, 0.734, 0.743, 0.744, 0.733, 0.727, 0.730)),
    "mha-topic_ordered": Row(8.0323, 0.690, 4.44, (0.554, 0.672, 0.937, 0.947, 0.950, 0.955, 0.956, 0.957, 0.957)),
    "mha-topic_ordered-drope": Row(
        8.2022, 0.466, 5.55, (0.554, 0.658, 0.742, 0.764, 0.776, 0.780, 0.776, 0.769, 0.769)
    ),
    "gqa-shuffled": Row(7.9835, 0.715, 4.47, (0.554, 0.626, 0.931, 0.947, 0.946, 0.955, 0.958, 0.959, 0.960)),
    "gqa-shuffled-drope": Row(8.1737, 0.476, 5.59, (0.554, 0.617, 0.680, 0.728, 0.726, 0.738, 0.731, 0.725, 0.715)),
    "gqa-topic_ordered": Row(8.0135, 0.710, 4.42, (0.554, 0.659, 0.931, 0.940, 0.946, 0.955, 0.958, 0.959, 0.960)),
    "gqa-topic_ordered-drope": Row(
        8.2000, 0.470, 5.68, (0.554, 0.649, 0.728, 0.747, 0.752, 0.766, 0.758, 0.753, 0.752)
    ),
}

LOG_TABLE = {
    "mha-shuffled": Row(7.9702, 0.593, 3.66, (0.930,)),
    "mha-shuffled-drope": Row(8.0973, 0.464, 4.61, (0.738,)),
    "mha-topic_ordered": Row(7.9545, 0.595, 3.67, (0.936,)),
    "mha-topic_ordered-drope": Row(8.0629, 0.473, 4.56, (0.776,)),
    "gqa-shuffled": Row(7.9965, 0.594, 3.53, (0.930,)),
    "gqa-shuffled-drope": Row(8.1075, 0.471, 4.50, (0.732,)),
    "gqa-topic_ordered": Row(7.9776, 0.592, 3.52, (0.933,)),
    "gqa-topic_ordered-drope": Row(8.0843, 0.472, 4.47, (0.765,)),
}


SANITY_NOTE = (
    "For its sanity configuration the original committed no results; its log gives about 3.8 million parameters. One "
    "token alone tells the topic there, so that no probe and no attention statistic can show what ordering does: the "
    "experiment checks that everything runs and that the loss comes down to the floor."
)
SANITY_LEVELS = {
    "unigram_filter": 5.274,
    "bayes_floor": 4.534,
    "one_token_accuracy": 0.980,
    "bigram_filter_accuracy": 0.997,
    "within_ratio_chance": 0.694,
}
"""Reference levels worked out from the original's definitions; the floor by a filter with constant hazard."""


class Band(NamedTuple):
    text: str
    phase: str
    """"rope", "drope" or "any"."""
    low: float
    high: float


BANDS = {
    "val_loss rope": Band("validation loss with RoPE", "rope", 7.97, 8.04),
    "val_loss drope": Band("validation loss after DroPE", "drope", 8.15, 8.22),
    "probe deep rope": Band("probe accuracy with RoPE, every block from 3 on", "rope", 0.93, 0.97),
    "probe block 4 drope": Band("probe accuracy after DroPE, block 4", "drope", 0.70, 0.80),
    "probe embedding": Band("probe accuracy on the embedding", "any", 0.550, 0.559),
    "legacy within drope": Band("legacy within-ratio after DroPE", "drope", 0.46, 0.49),
}
"""Wide, because the reference is one seed on another draw of the data. The last is about chance: attention uniform over
all tokens scores .477 on the sequences the original analysed, and .458 on average over such sequences."""


def band_values(phase: str, val_loss: float, probe: list[float], legacy_within: float) -> dict[str, tuple[float, bool]]:
    """The bands that apply to a run of this phase: {key of BANDS: (the value furthest out, inside?)}.

    probe: accuracy after the embedding and each block.
    """
    deep = probe[3:]
    values = {
        "val_loss rope": [val_loss],
        "val_loss drope": [val_loss],
        "probe deep rope": deep,
        "probe block 4 drope": probe[4:5],
        "probe embedding": probe[:1],
        "legacy within drope": [legacy_within],
    }
    out = {}
    for key, band in BANDS.items():
        if band.phase in (phase, "any") and values[key]:
            middle = (band.low + band.high) / 2
            worst = max(values[key], key=lambda x: abs(x - middle))
            out[key] = (worst, band.low <= worst <= band.high)
    return out
