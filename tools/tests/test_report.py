"""The READMEs say what the records say: nothing stale, no number without a record, and the machinery that holds it."""

from __future__ import annotations

import json
import re
import struct
import zlib

import pytest
import report
from evidence import iceaggr_ablations, iceaggr_caveats, iceaggr_choices, iceaggr_v3
from evidence.documents import DocumentError, fill, numbers, unrecorded
from evidence.drawing import Drawing, digest_in, with_digest
from evidence.iceaggr_caveats import spearman
from evidence.record import ROOT, Claim, bare, commits, markdown
from hypothesis import given
from hypothesis import strategies as st

TABLES = {"a.b": lambda: "| x |\n| --- |\n| 1 |"}
SENTENCES = {"a/c": "The error is 46.6 degrees after 3 min."}


def test_the_documents_are_what_the_records_give():
    assert report.stale() == [], "run `make report`"


def test_every_number_in_the_prose_has_a_record():
    assert report.numbers_without_record() == [], "take it from a claim, or allow it in tools/evidence/allowed.py"


def test_every_figure_of_the_documents_is_drawn_from_records():
    drawn = {(ROOT / drawing.path).resolve() for drawing in report.DRAWINGS}
    for name in report.DOCUMENTS:
        path = ROOT / name
        if path.is_file():
            shown = re.findall(r"!\[[^\]]*\]\(([^)]+\.png)\)", path.read_text(encoding="utf-8"))
            assert {(path.parent / image).resolve() for image in shown} <= drawn, name


def test_claims_rest_on_records_that_are_there():
    words = {"holds", "fails", "undecided", "met", "NOT met", "measured"}
    for name, claim in report.claims().items():
        assert all((ROOT / path).is_file() for path in claim.raw), name
        assert claim.raw or claim.verdict == "undecided", f"{name} has nothing to rest on"
        assert claim.sentence.endswith("."), name
        if claim.required is not None:
            assert claim.verdict in words, name
        if claim.interval is not None and len(claim.values) == 1:
            assert claim.interval[0] <= claim.values[0] <= claim.interval[1], name
        assert json.loads(claim.text())["git_sha"] == list(claim.git_sha)


def test_baselines_are_those_of_the_zeros():
    """Two predictors are also scored on simulated spacings, under the same names."""
    assert "given 8 gaps |  | .373 " in report.TABLES["rh_memory.headline"]()


def test_generated_parts_are_replaced_and_nothing_else():
    text = "one\n<!-- table: a.b -->\nold\n<!-- end -->\ntwo <!-- claim: a/c -->old<!-- end --> three\n"
    made = fill(text, TABLES, SENTENCES)
    assert made == (
        f"one\n<!-- table: a.b -->\n{TABLES['a.b']()}\n<!-- end -->\ntwo <!-- claim: a/c -->{SENTENCES['a/c']}"
        "<!-- end --> three\n"
    )
    assert fill(made, TABLES, SENTENCES) == made


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: a.z -->\n<!-- end -->", "no table is named a.z; there are: a.b"),
        ("<!-- claim: a/z --><!-- end -->", "no claim is named a/z"),
        ("<!-- table: a.b -->\n", "not one half of a pair"),
        ("text <!-- end -->", "not one half of a pair"),
        ("<!-- table: a.b -->\n<!-- table: a.b -->\n<!-- end -->", "no <!-- end --> of its own"),
    ],
)
def test_a_wrong_marker_is_an_error(text, message):
    with pytest.raises(DocumentError, match=re.escape(message)):
        fill(text, TABLES, SENTENCES)


@pytest.mark.parametrize(
    ("prose", "missing"),
    [
        ("The error is **46.6 degrees**.", []),
        ("The error is 46.7 degrees.", ["46.7 degree"]),
        ("It took 3 minutes.", []),
        ("It took 3 hours.", ["3 hour"]),
        ("It is 46.6 in all.", []),
        ("It is .5 in all, and 5 of 7.", ["0.5"]),
        ("It is\n47 %.", ["47 %"]),
        ("`0.5 s`, [it](figures/9.9.png), <!-- 9.9 -->\n```\n9.9 s\n```\nhttps://x.org/9.9", []),
        ("<!-- table: a.b -->\n| 9.9 s |\n<!-- end -->", []),
        ("version 3.11 or newer", []),
        ("2 x 2 x 2 conditions, 1,176 tokens/s", ["1176 tokens/s"]),
        ("a loss of -2.52 [-2.60, 1e-11]", ["2.52", "2.60"]),
        ("38.5-40.1 ms, 1.5/2.5, [0.7,0.8]", ["38.5", "40.1 ms", "1.5", "2.5", "0.7", "0.8"]),
    ],
)
def test_numbers_in_prose_need_a_record(prose, missing):
    assert unrecorded(prose, SENTENCES.values(), ["3.11 or newer"]) == missing


@given(st.floats(0.001, 1e6), st.integers(1, 4), st.sampled_from(["", " ms", " %", "x", " events/s"]))
def test_a_number_is_found_however_it_is_written(x, digits, unit):
    expected = [(f"{x:.{digits}f}", unit.strip())]
    assert numbers(f"about {x:,.{digits}f}{unit}, it is") == expected
    assert numbers(f"({bare(x, digits)}{unit})") == expected


def test_a_png_keeps_the_digest_of_its_records():
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + bytes(13)
    png = head + struct.pack(">I", zlib.crc32(head[12:])) + b"rest"
    stamped = with_digest(png, b"abc")
    assert digest_in(stamped) == b"abc"
    assert digest_in(png) is None
    length = struct.unpack(">I", stamped[33:37])[0]
    chunk, crc = stamped[37 : 41 + length], stamped[41 + length : 45 + length]
    assert zlib.crc32(chunk) == struct.unpack(">I", crc)[0]
    assert stamped[45 + length :] == b"rest"


def test_a_figure_is_stale_when_its_record_changes(tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    record, png = tmp_path / "record.csv", tmp_path / "figure.png"
    record.write_text("x\n1\n")
    drawing = Drawing(str(png), [str(record)], lambda: figure.Figure(figsize=(1, 1)))
    assert drawing.stale()
    png.write_bytes(drawing.png())
    assert not drawing.stale()
    record.write_text("x\n2\n")
    assert drawing.stale()


def test_a_claim_knows_the_commits_of_its_records():
    run = "packages/iceaggr/results/quick-cpu-seed0"
    manifest = json.loads((ROOT / run / "manifest.json").read_text())
    assert commits([f"{run}/evaluation.json"]) == [manifest["git_sha"]]
    claim = Claim("a/b", "x.", "m", [1 / 3], "measured", [f"{run}/evaluation.json"])
    assert json.loads(claim.text())["values"] == [0.333333]


def test_tables_and_numbers_are_written_as_they_are_read():
    assert markdown(["a", "b"], [["x|y", "1"]], "lr") == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"
    assert [bare(x, 2) for x in (0.5, -0.5, 1.5, 10.0)] == [".50", "-.50", "1.50", "10.00"]


def test_rank_correlation_takes_ties_and_what_never_came():
    never = float("inf")
    assert spearman([1, 2, never], [10, 20, 90]) == pytest.approx(1)
    assert spearman([1, 2, 3], [9, 8, 1]) == pytest.approx(-1)
    assert spearman([1, 1, never, never], [5, 6, 7, 8]) == pytest.approx(4 / 20**0.5)


def test_the_correlation_is_said_without_those_that_never_left_the_plateau(monkeypatch):
    """Four runs: three that left it in the order opposite to their errors, and one that never did and is the worst."""
    angles, means = ([80, 80], [90, 80], [90, 90, 80], [90, 90, 90]), [30.0, 20.0, 10.0, 90.0]
    curves = [
        {"variant": "v", "seed": seed, "events": [10 * i for i in range(1, len(a) + 1)], "angle_deg": a}
        for seed, a in enumerate(angles)
    ]
    record = {"label": "x", "budget": {"seeds": [0, 1, 2, 3]}, "rows": [{"name": "v", "seed_means": means}]}
    for module in (iceaggr_caveats, iceaggr_ablations):
        monkeypatch.setattr(module, "read", lambda path: curves if path.endswith("curves.json") else record)
    claim = iceaggr_caveats._plateau("ablate-seed-table")
    assert claim.values[2:] == [pytest.approx(0.2), pytest.approx(-1)]
    assert "is .20, -1.00 over the 3 that did" in claim.sentence


def test_a_study_says_which_verdicts_correction_over_seeds_would_not_leave(monkeypatch):
    rows = {"base": [60.0, 61, 62], "clear": [50.0, 51.001, 52], "narrow": [58.0, 60.6, 59.7], "even": [60.1, 60.9, 62]}
    findings = {"clear": "lower", "narrow": "lower", "even": "not shown"}
    record = {
        "label": "x",
        "budget": {"seeds": [0, 1, 2]},
        "rows": [{"name": name, "seed_means": means} for name, means in rows.items()],
        "contrasts": [
            {"treated": name, "control": "base", "question": f"is it {name}?", "finding": said}
            for name, said in findings.items()
        ],
    }
    for module in (iceaggr_caveats, iceaggr_ablations):
        monkeypatch.setattr(module, "read", lambda path: record)
    assert iceaggr_ablations.corrected("s").keys() == {(name, "base") for name in findings}
    sentence = iceaggr_caveats._corrected("ablate-seed-table").sentence
    assert "(Holm over 3 comparisons)" in sentence
    assert re.search(r"with p: is it clear\? \(< \.001\); these would not: is it narrow\? \(\.\d+\) \(x\)", sentence)


def test_only_the_parts_of_v3_are_judged_as_parts(monkeypatch):
    """A study also compares all parts together, the winners together, and Muon."""
    row = {"difference": -1.0, "seeds_low": -2.0, "seeds_high": -0.5, "p_holm": 0.01, "finding": "lower"}
    treated = ("fourier", "ema", "all", "kept", "adamw")
    monkeypatch.setattr(iceaggr_v3, "read", lambda path: {"contrasts": [{**row, "treated": name} for name in treated]})
    judged = {name: won for name, _, won in iceaggr_v3._judged()}
    assert judged == {"fourier": True, "ema": True, "Muon instead of AdamW": False}


def test_choices_are_judged_from_the_side_of_the_package():
    """The default is the control of one comparison and the treated of the other; lower is better only for a treated."""
    found = {"difference": -1.0, "seeds_low": -2.0, "seeds_high": -0.5, "p_holm": 0.01, "finding": "lower"}
    pairs = (("zero-padding", "base"), ("cap-128-hlc", "cap-128-earliest"))
    rows = [{"name": name, "seed_means": [60.0 + i]} for i, name in enumerate(name for pair in pairs for name in pair)]
    record = {"rows": rows, "contrasts": [{"treated": t, "control": c, **found} for t, c in pairs]}
    marker, hlc = iceaggr_choices.judged(record)
    assert (marker["default"], marker["flags"], marker["verdict"]) == ("base", "--model.empty zero", "worse")
    assert (marker["difference"], marker["seeds"], marker["by_seed"]) == (1.0, (0.5, 2.0), [1.0])
    assert (hlc["default"], hlc["flags"], hlc["verdict"]) == ("cap-128-hlc", "--model.dom-select earliest", "better")
    assert (hlc["difference"], hlc["seeds"], hlc["by_seed"]) == (-1.0, (-2.0, -0.5), [-1.0])
