"""One self-contained HTML page from text, tables and figures: the same look for every report.

The page is a single file that needs no network (its content-security policy forbids any), follows the
reader's light or dark scheme, works on a phone and prints. Matplotlib figures are inlined as SVG. Plotly's
script is inlined once, and only into pages that have a plotly figure.

    page = Page("Run 12", "simulated data")
    page.section("Result")
    page.table(["predictor", "mean"], [["model", "51.9°"]], caption="Mean opening angle.", highlight={0})
    page.figure(fig, "Error against energy.", alt="Falling curve from 80° to 20°.")
    page.write(Path("report.html"))
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lab_shared.files import atomic_write, make_folder
from lab_shared.plotting import GREY, to_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Width = Literal["full", "half", "third"]
"""Share of the text column a figure takes on a wide screen; neighbours fill a row. Phones make all full."""


class Page:
    """Collects blocks in reading order for one file. All strings are escaped but `html`'s."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self._blocks: list[str] = []
        self._sections: list[str] = []
        self._figures = 0
        self._has_plotly = False

    def section(self, title: str) -> None:
        """A heading with an entry in the table of contents."""
        self._sections.append(title)
        self._blocks.append(f'<h2 id="s{len(self._sections)}">{html.escape(title)}</h2>')

    def text(self, text: str) -> None:
        """Paragraphs between blank lines, with `code`, **bold**, lists ("- item"), indented literals."""
        for block in re.split(r"\n\s*\n", text.strip("\n")):
            lines = block.splitlines()
            if all(line.startswith("    ") for line in lines):
                literal = "\n".join(line[4:] for line in lines)
                self._blocks.append(f'<pre tabindex="0">{html.escape(literal)}</pre>')
            elif all(line.startswith("- ") for line in lines):
                items = "".join(f"<li>{_inline(line[2:])}</li>" for line in lines)
                self._blocks.append(f"<ul>{items}</ul>")
            else:
                self._blocks.append(f"<p>{_inline(' '.join(line.strip() for line in lines))}</p>")

    def table(
        self,
        headers: Sequence[str],
        rows: Iterable[Sequence[object]],
        caption: str = "",
        *,
        highlight: Collection[int] = (),
        align: str = "",
    ) -> None:
        """A table; cells are shown with `str`. `highlight` holds row indices to tint.

        `align` has one letter (l or r) per column; by default the first is left and the others right.
        Raises ValueError when a row does not have as many cells as there are headers.
        """
        align = align or "l" + "r" * (len(headers) - 1)
        if len(align) != len(headers):
            raise ValueError(f"align {align!r} has {len(align)} letters for {len(headers)} columns")

        def cells(tag: str, values: Sequence[object]) -> str:
            if len(values) != len(headers):
                raise ValueError(f"table row {values!r} has {len(values)} cells for {len(headers)} headers")
            marks = (' class="r"' if side == "r" else "" for side in align)
            return "".join(f"<{tag}{m}>{_inline(str(v))}</{tag}>" for m, v in zip(marks, values, strict=True))

        head = f"<thead><tr>{cells('th', headers)}</tr></thead>"
        body = "".join(
            f'<tr class="mark">{cells("td", row)}</tr>' if i in highlight else f"<tr>{cells('td', row)}</tr>"
            for i, row in enumerate(rows)
        )
        title = f"<caption><span>{_inline(caption)}</span></caption>" if caption else ""
        self._blocks.append(f'<div class="scroll" tabindex="0"><table>{title}{head}<tbody>{body}</tbody></table></div>')

    def figure(self, figure: Figure, caption: str, alt: str, *, width: Width = "full") -> None:
        """A matplotlib figure as inline SVG. `alt` says in words what it shows."""
        self._figures += 1
        svg = to_svg(figure, prefix=f"f{self._figures}")
        svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1)
        self._figure(svg, caption, width)

    def plotly(self, figure: Any, caption: str, *, width: Width = "full", still: bytes | None = None) -> None:
        """An interactive plotly figure. `still`, a PNG, replaces it on paper and where scripts are off."""
        import plotly.graph_objects as go
        import plotly.io

        figure = go.Figure(figure)  # a copy: the caller's keeps its own look
        clear = "rgba(0,0,0,0)"
        figure.update_layout(paper_bgcolor=clear, plot_bgcolor=clear, font={"color": GREY, "family": "system-ui"})
        self._figures += 1
        live = plotly.io.to_html(
            figure,
            full_html=False,
            include_plotlyjs=False,
            div_id=f"f{self._figures}",
            auto_play=False,
            config={"responsive": True, "displayModeBar": False},
        )
        self._has_plotly = True
        if still is not None:
            live = f'<div class="live">{live}</div>{_image(still, caption, "still")}'
        self._figure(live, caption, width)

    def picture(self, png: bytes, caption: str, *, width: Width = "full") -> None:
        """A PNG, embedded."""
        self._figure(_image(png, caption, "picture"), caption, width)

    def html(self, fragment: str) -> None:
        """A trusted HTML fragment, as it is."""
        self._blocks.append(fragment)

    def render(self) -> str:
        """The whole page as text."""
        title, script, policy = html.escape(self.title), "", _POLICY
        if self._has_plotly:
            from plotly.offline import get_plotlyjs

            script = f"<script>{get_plotlyjs()}</script>"
            # Plotly compiles its shaders' bindings at run time (eval) and draws through blobs.
            policy += "; script-src 'unsafe-inline' 'unsafe-eval'; worker-src blob:"
        links = "".join(f'<a href="#s{i}">{html.escape(s)}</a>' for i, s in enumerate(self._sections, 1))
        nav = f'<nav aria-label="Contents">{links}</nav>' if links else ""
        subtitle = f'<p class="sub">{_inline(self.subtitle)}</p>' if self.subtitle else ""
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{_CSS}</style>{script}</head>\n"
            f"<body><header><h1>{title}</h1>{subtitle}{nav}</header>\n<main>\n"
            + "\n".join(self._blocks)
            + "\n</main></body></html>\n"
        )

    def write(self, path: Path) -> Path:
        """Write the page so that `path` always holds a whole one; the folder is created. Returns `path`.

        Raises StorageError when that fails.
        """
        make_folder(path.parent)
        atomic_write(path, self.render())
        return path

    def _figure(self, body: str, caption: str, width: Width) -> None:
        self._blocks.append(f'<figure class="{width}">{body}<figcaption>{_inline(caption)}</figcaption></figure>')


def _image(png: bytes, alt: str, name: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img class="{name}" alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _inline(text: str) -> str:
    """Escaped text with `code` and **bold**; what stands in code is left alone."""
    parts = re.split(r"`([^`]+)`", text)
    for i, part in enumerate(parts):
        escaped = html.escape(part)
        bold = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", escaped)
        parts[i] = f"<code>{escaped}</code>" if i % 2 else bold
    return "".join(parts)


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:"

# The main column is a grid of six: a full block spans all, a half three, a third two.
_CSS = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1d2329;--soft:#5b6670;--rule:#d9dee4;--tint:#f4f6f8;
--mark:#e8f0f8;--link:#2c5f8f;--serif:Charter,"Bitstream Charter","Iowan Old Style",Cambria,Georgia,serif;
--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
@media screen and (prefers-color-scheme:dark){:root{--bg:#15181b;--ink:#dde2e6;--soft:#98a3ad;--rule:#363d45;
--tint:#1c2025;--mark:#1f2d3a;--link:#8cbbe3}}
*{box-sizing:border-box}
html{background:var(--bg);color:var(--ink);font:17px/1.6 var(--serif);-webkit-text-size-adjust:100%}
body{max-width:62rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;font-weight:600;margin:0}
h2{font-size:1.25rem;font-weight:600;margin:2.2rem 0 .2rem;padding-top:.9rem;border-top:1px solid var(--rule)}
.sub{color:var(--soft);margin:.4rem 0 0}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin-top:1rem;font:.85rem/1.6 var(--sans)}
a{color:var(--link);text-decoration:none}a:hover{text-decoration:underline}
main{display:grid;grid-template-columns:repeat(6,minmax(0,1fr));gap:0 1.6rem;align-items:start}
main>*{grid-column:1/-1}
main>p,main>ul{max-width:42rem;margin:.7rem 0}
.half{grid-column:span 3}.third{grid-column:span 2}
figure{margin:1.1rem 0 .6rem;min-width:0}
figure svg,figure img{display:block;width:100%;height:auto}
figure .still{display:none}
figcaption,caption{font:.85rem/1.45 var(--sans);color:var(--soft);text-align:left;max-width:46rem}
figcaption{margin-top:.4rem}
caption span{display:block;max-width:min(46rem,100vw - 2.5rem);padding-bottom:.45rem}
.scroll{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font:.88rem/1.4 var(--sans);font-variant-numeric:tabular-nums;min-width:50%}
th,td{padding:.32rem .9rem .32rem .5rem;text-align:left;vertical-align:top;
border-bottom:1px solid var(--rule)}
th{font-weight:600;border-bottom:1.5px solid var(--soft)}
.r{text-align:right;white-space:nowrap}
.mark td{background:var(--mark);font-weight:600}
code,pre{font-family:var(--mono);font-size:.86em;background:var(--tint);border-radius:3px}
code{padding:.1em .3em;overflow-wrap:anywhere}
pre{padding:.8rem 1rem;overflow-x:auto;line-height:1.5;margin:.8rem 0}
@media (max-width:44rem){html{font-size:16px}body{padding-top:1.5rem}.half,.third{grid-column:1/-1}
.third svg{max-width:24rem}}
@media print{html{font-size:10pt}body{max-width:none;padding:0}nav{display:none}
figure,tr,pre{break-inside:avoid}h2{break-after:avoid}.scroll,pre{overflow:visible}pre{white-space:pre-wrap}
.live:has(+.still){display:none}figure .still{display:block}.mark td{print-color-adjust:exact}}
@media (scripting:none){.live:has(+.still){display:none}figure .still{display:block}}
"""
