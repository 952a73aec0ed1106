"""Attention maps of every head in one page, chosen by clicking, with styles alone.

The page's policy forbids scripts, so the choice lives in radio buttons: `:has(:checked)` picks the run's picture (all
its heads in one PNG) and the part of it that is shown. The grid of buttons is itself the layer x head map of a score.
"""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from lab_shared.plotting import BLUE, CYAN, GREEN, GREY, PURPLE, RED, YELLOW

TOPIC_COLOURS = (BLUE, RED, GREEN, YELLOW, CYAN, PURPLE, GREY, "#44aa99")


class HeadMaps(NamedTuple):
    """One run: pattern_LHTS uint8, score_LH shown in the grid, and the topics (t,) of the sequence shown."""

    name: str
    pattern_LHTS: np.ndarray
    score_LH: np.ndarray
    topics_t: np.ndarray


def picker(runs: Sequence[HeadMaps], score_name: str) -> str:
    """An HTML fragment. Runs may differ in layers and heads; the first run's most clustering head is shown first.

    Raises ValueError without runs.
    """
    if not runs:
        raise ValueError("no runs to pick from")
    rules, choices, grids = [_STYLE], [], []
    for r, run in enumerate(runs):
        score_LH = np.nan_to_num(run.score_LH)  # a head that looks at nothing but itself and the token before
        layers, heads = score_LH.shape
        sprite = base64.b64encode(_sprite(run.pattern_LHTS)).decode()
        chosen = f"#picker:has(#run{r}:checked)"
        rules.append(
            f"{chosen} .map{{background-image:url(data:image/png;base64,{sprite});"
            f"background-size:{100 * heads}% {100 * layers}%}}{chosen} .grid{r}{{display:grid}}"
            f"{chosen} .across{{background:{_strip(run.topics_t, 'right')}}}"
            f"{chosen} .down{{background:{_strip(run.topics_t, 'bottom')}}}"
        )
        checked = " checked" if r == 0 else ""
        choices.append(f'<label><input type="radio" name="run" id="run{r}"{checked}> {html.escape(run.name)}</label>')
        limit = float(np.abs(score_LH).max()) or 1.0
        best = int(score_LH.argmax())
        cells = []
        for i, score in enumerate(score_LH.ravel()):
            layer, head = divmod(i, heads)
            x, y = (100 * k / max(1, n - 1) for k, n in ((head, heads), (layer, layers)))
            rules.append(f"{chosen}:has(#r{r}h{i}:checked) .map{{background-position:{x:.4f}% {y:.4f}%}}")
            colour = RED if score > 0 else BLUE
            title = f"layer {layer}, head {head}: {score_name} {score:+.4f}"
            cells.append(
                f'<label title="{title}" style="--c:{colour}{round(255 * abs(score) / limit):02x}"><input type="radio" '
                f'name="head{r}" id="r{r}h{i}" aria-label="{title}"{" checked" if i == best else ""}></label>'
            )
        grids.append(
            f'<div class="grid grid{r}" style="grid-template-columns:repeat({heads},1fr)">{"".join(cells)}</div>'
        )
    return (
        f"<style>{''.join(rules)}</style><figure id='picker' class='full'><div class='runs'>{''.join(choices)}</div>"
        f"<div class='views'><div><p>layer (down) and head (across), coloured by {html.escape(score_name)}: "
        f"red positive, blue negative</p>{''.join(grids)}</div>"
        "<div class='frame'><i></i><i class='across'></i><i class='down'></i><div class='map'></div></div></div>"
        "<figcaption>Causal attention of one held-out sequence: queries down, keys across, strips in the colours of "
        "the topics. Blocks of neighbouring tokens are averaged, each row is scaled to its largest weight, and the "
        "shade is its square root. Click a head in the grid.</figcaption></figure>"
    )


def _strip(topics_t: np.ndarray, towards: str) -> str:
    """A CSS gradient with hard edges: one stretch of colour per run of equal topics."""
    n = len(topics_t)
    edges = [0, *(np.flatnonzero(np.diff(topics_t)) + 1).tolist(), n]
    stops = [
        f"{TOPIC_COLOURS[int(topics_t[a]) % len(TOPIC_COLOURS)]} {100 * a / n:.2f}% {100 * b / n:.2f}%"
        for a, b in pairwise(edges)
    ]
    return f"linear-gradient(to {towards},{','.join(stops)})"


def _sprite(pattern_LHTS: np.ndarray) -> bytes:
    """A palette PNG with one tile per head, layers down and heads across."""
    from matplotlib import colormaps

    layers, heads, t, _ = pattern_LHTS.shape
    pixels = pattern_LHTS.transpose(0, 2, 1, 3).reshape(layers * t, heads * t)
    # 64 shades are as many as one can tell apart, and compress far better than 256.
    index = np.ascontiguousarray(pixels >> 2)
    shades = (colormaps["cividis"](np.linspace(0, 1, 64))[:, :3] * 255).round().astype(np.uint8)
    lines = np.concatenate([np.zeros((len(index), 1), np.uint8), index], axis=1)
    header = struct.pack(">IIBBBBB", index.shape[1], index.shape[0], 8, 3, 0, 0, 0)
    parts = [
        (b"IHDR", header),
        (b"PLTE", shades.tobytes()),
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    ]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


_STYLE = """
#picker .runs{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font:.85rem/1.6 var(--sans)}
#picker .views{display:grid;grid-template-columns:minmax(10rem,1fr) minmax(0,2fr);gap:1.2rem;margin-top:.6rem}
#picker p{font:.8rem/1.4 var(--sans);color:var(--soft);margin:0 0 .4rem}
#picker .grid{display:none;gap:2px}
#picker .grid label{aspect-ratio:1;background:var(--c);border:1px solid var(--rule);cursor:pointer}
#picker .grid label:has(:checked){outline:2px solid var(--ink)}
#picker .grid label:focus-within{outline:2px solid var(--link)}
#picker .grid input{opacity:0;width:1px;height:1px;margin:0}
#picker .frame{display:grid;grid-template-columns:.7rem 1fr;grid-template-rows:.7rem auto;gap:2px}
#picker .map{aspect-ratio:1;image-rendering:pixelated}
@media (max-width:44rem){#picker .views{grid-template-columns:1fr}}
"""
