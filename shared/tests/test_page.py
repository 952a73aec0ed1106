"""lab_shared.page and lab_shared.plotting: escaping, one file without network, same input, same bytes."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab_shared.errors import UserError
from lab_shared.page import Page

VOID = {"meta", "img", "br", "path", "use", "image", "rect", "circle", "stop"}
TAGS = set(
    re.findall(
        r"\w+",
        """html head meta title style body header h1 h2 nav a main div table caption
    span thead tbody tr th td p pre ul li code strong""",
    )
)


class Outline(HTMLParser):
    """Checks that tags nest, and collects tags, ids, visible text and everything a browser might fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.stack == [], f"not closed: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for key, value in attrs if key == "id"]
        self.fetched += [value for key, value in attrs if key in ("src", "href", "xlink:href", "srcset", "action")]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text += data


def draw(scale=1.0):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    from lab_shared.plotting import BLUE, axes, style

    with style():
        fig, ax = axes()
        ax.plot([1, 2, 3], [scale, 4 * scale, 9 * scale], color=BLUE, label="a < b & c")
        ax.legend()
    return fig


@given(st.text(), st.text(), st.text())
def test_any_text_is_escaped_and_kept(title, cell, paragraph):
    page = Page(title)
    page.section(cell)
    page.table([cell, "b"], [[cell, 1]], caption=cell)
    page.text(paragraph)
    outline = Outline(page.render())
    assert set(outline.tags) <= TAGS


def test_markup_characters_survive_as_text():
    page = Page("<script>alert(1)</script>", 'a & "b"')
    page.text("x < y & z")
    outline = Outline(page.render())
    assert "script" not in outline.tags
    assert "<script>alert(1)</script>" in outline.text
    assert "x < y & z" in outline.text


def test_text_blocks():
    page = Page("t")
    page.text("one **bold** and `code **kept**`\nstill one\n\n- first\n- second\n\n    make `x` <y>")
    text = page.render()
    assert "<p>one <strong>bold</strong> and <code>code **kept**</code> still one</p>" in text
    assert "<ul><li>first</li><li>second</li></ul>" in text
    assert "make `x` &lt;y&gt;</pre>" in text


def test_table_alignment_and_highlight():
    page = Page("t")
    page.table(["name", "x"], [["a", 1], ["b", 2.5]], highlight={1})
    text = page.render()
    assert '<tr class="mark"><td>b</td><td class="r">2.5</td></tr>' in text
    assert text.count('class="mark"') == 1


def test_table_of_uneven_rows_is_refused():
    with pytest.raises(ValueError, match="3 cells for 2 headers"):
        Page("t").table(["a", "b"], [[1, 2, 3]])
    with pytest.raises(ValueError, match="3 letters for 2 columns"):
        Page("t").table(["a", "b"], [], align="lrr")


def test_contents_link_to_the_sections():
    page = Page("t")
    page.section("First")
    page.section("Second")
    outline = Outline(page.render())
    assert outline.fetched == [f"#{i}" for i in outline.ids]
    assert "nav" not in Outline(Page("t").render()).tags


def test_figures_fetch_nothing_and_share_no_id():
    page = Page("t")
    page.figure(draw(), "a caption", "rising <curve>")
    page.figure(draw(), "another", "the same curve", width="half")
    text = page.render()
    outline = Outline(text)
    assert len(outline.ids) == len(set(outline.ids))
    assert all(target.startswith("#") for target in outline.fetched)
    assert {target[1:] for target in outline.fetched} <= set(outline.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(outline.ids)
    assert 'aria-label="rising &lt;curve&gt;"' in text
    assert text.count("<style>") == 1, "a figure's own style sheet would leak into the page"
    assert "default-src 'none'" in text


def test_figure_follows_the_colour_scheme_of_the_page():
    from lab_shared.plotting import BLUE, INK, RULE, to_svg

    svg = to_svg(draw())
    assert INK not in svg
    assert RULE not in svg
    assert "currentColor" in svg
    assert "var(--rule)" in svg
    assert BLUE in svg


def test_same_figure_same_bytes():
    from lab_shared.plotting import to_png, to_svg

    fig = draw()
    assert to_svg(fig) == to_svg(fig) == to_svg(draw())
    assert to_png(fig) == to_png(draw())
    assert to_svg(fig) != to_svg(draw(2.0))
    assert not re.search(r"20\d\d-\d\d-\d\d", to_svg(fig)), "a date would differ from run to run"


def test_style_ignores_the_users_settings_and_puts_them_back():
    pytest.importorskip("matplotlib")
    import matplotlib
    from lab_shared.plotting import style

    with matplotlib.rc_context({"lines.linewidth": 7.0, "axes.titlesize": 30}):
        with style():
            assert matplotlib.rcParams["lines.linewidth"] == 1.6
            assert matplotlib.rcParams["axes.titlesize"] == 9.5
        assert matplotlib.rcParams["lines.linewidth"] == 7.0


def test_plotly_script_comes_once_and_only_when_used():
    go = pytest.importorskip("plotly.graph_objects", reason="interactive figures need plotly")
    from plotly.offline import get_plotlyjs

    page = Page("t")
    page.text("plain")
    assert "<script" not in page.render()
    figure = go.Figure(go.Scatter(x=[1, 2], y=[3, 4]))
    before = figure.to_json()
    page.plotly(figure, "first", still=b"\x89PNG")
    page.plotly(figure, "second", width="half")
    text = page.render()
    assert figure.to_json() == before, "the caller's figure is not touched"
    assert text.count(get_plotlyjs()) == 1
    small = text.replace(get_plotlyjs(), "")
    assert small.count("Plotly.newPlot") == 2
    assert 'src="data:image/png;base64,iVBORw=="' in small
    ids = re.findall(r'<div id="([^"]*)" class="plotly-graph-div"', small)
    assert len(set(ids)) == 2
    assert not re.findall(r'(?:src|href)="(?!#|data:)', small)


def test_write_replaces_whole_files_only(tmp_path: Path):
    path = tmp_path / "deep" / "report.html"
    page = Page("first")
    assert page.write(path) == path
    assert path.read_text(encoding="utf-8") == page.render()
    Page("κ ≥ 1°").write(path)
    assert "κ ≥ 1°" in path.read_text(encoding="utf-8")
    assert list(path.parent.iterdir()) == [path]


def test_write_into_a_file_names_the_path(tmp_path: Path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="taken"):
        Page("t").write(tmp_path / "taken" / "report.html")
