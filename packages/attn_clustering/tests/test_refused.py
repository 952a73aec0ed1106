"""What cannot be is refused in one line that names it and the way out, before anything is written."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from attn_clustering import analyze, bench, figures, hf, matrix, report_data, runs, train
from attn_clustering.analysis import compare, probes
from attn_clustering.cli import main
from attn_clustering.config import DataConfig, ModelConfig, OptimConfig, Recalibration
from attn_clustering.data import levels
from attn_clustering.data.settings import SMOKE, CorpusConfig
from attn_clustering.data.sources import documents, files_of
from attn_clustering.data.topics import assign_topics
from attn_clustering.experiments import EXPERIMENTS, phase2_config, run_config
from attn_clustering.head_picker import HeadMaps, picker
from attn_clustering.measurements import over_heads
from lab_shared.config import to_json
from lab_shared.errors import UserError

TINY = replace(
    EXPERIMENTS["smoke"][1],
    model=ModelConfig(vocab=128, d_model=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp=24),
    data=DataConfig(replace(SMOKE, train_sequences=40, val_sequences=40)),
    optim=OptimConfig(steps=3, batch=4, warmup=1, eval_sequences=8),
)
RUN = run_config(TINY, "mha", "shuffled", 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three steps, alone in its folder."""
    folder = tmp_path_factory.mktemp("trained") / "own-name"
    train.train(RUN, folder, device="cpu")
    return folder


# --- configurations ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phase": "drope"}, "without a recalibration"),
        ({"phase": "extra"}, "without a recalibration"),
        ({"recal": Recalibration()}, "with a recalibration"),
        ({"attention": "gqa"}, "gqa fewer"),
        ({"model": replace(TINY.model, kv_heads=1)}, "gqa fewer"),
        ({"model": replace(TINY.model, rope=False)}, "phase nope"),
        ({"phase": "nope"}, "phase nope"),
    ],
)
def test_a_run_is_what_it_is_called(changes, message):
    """Otherwise its numbers would stand under another condition's name."""
    with pytest.raises(UserError, match=message):
        replace(RUN, **changes)


def test_every_run_of_every_experiment_is_possible():
    for _, experiment in EXPERIMENTS.values():
        assert matrix.jobs(experiment, seeds=1)  # each checked by reading its JSON back


def test_a_language_has_no_corpus(capsys):
    with pytest.raises(UserError, match="corpus=x: these data are a micro-language"):
        DataConfig(SMOKE, corpus="x")
    assert main(["train", "mha-shuffled", "--data", "x"]) == 1  # was trained on the language without a word
    assert "micro-language" in capsys.readouterr().err


def test_sequences_of_one_token_are_refused(tmp_path):
    language = replace(TINY.data.language, seq_len=1, min_segment=1, segments=(1, 1))
    with pytest.raises(UserError, match="longer seq_len"):
        train.train(replace(RUN, data=DataConfig(language)), tmp_path / "run", device="cpu")


@pytest.mark.parametrize(
    "field", [{"max_documents": 0}, {"max_documents": -1}, {"seed": -1}, {"seed": 2**32}, {"val_sequences": 0}]
)
def test_corpus_settings_out_of_range(field):
    with pytest.raises(UserError, match=next(iter(field))):
        CorpusConfig(**field)


# --- commands ---


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fraction", "nan"], "fraction"),
        (["--fraction", "inf"], "fraction"),
        (["--fraction", "-0.5"], "fraction"),
        (["--fraction", "0.01"], "is no step"),
        (["--lr-factor", "nan"], "lr_factor"),
        (["--lr-factor", "-1"], "lr_factor"),
    ],
)
def test_recalibrations_that_cannot_be(trained, flags, message, capsys):
    assert main(["drope", str(trained), *flags]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in trained.parent.iterdir()] == [trained.name]


def test_only_a_run_with_positions_is_recalibrated_and_beside_itself(trained, tmp_path, capsys):
    nope = run_config(TINY, "mha", "shuffled", 0, nope=True)
    (tmp_path / "nope").mkdir()
    (tmp_path / "nope" / "config.json").write_text(to_json(nope))
    assert main(["drope", str(tmp_path / "nope")]) == 1
    assert "only one of phase rope" in capsys.readouterr().err
    other = phase2_config(RUN, Recalibration(1.0, 1.0), folder="another")
    (trained.parent / other.name).mkdir()
    (trained.parent / other.name / "config.json").write_text(to_json(other))
    assert main(["drope", str(trained), "--fraction", "1"]) == 1
    assert "a folder of its own" in capsys.readouterr().err
    (trained.parent / other.name / "config.json").unlink()
    (trained.parent / other.name).rmdir()


def test_an_export_does_not_write_into_a_run(trained, tmp_path, capsys):
    before = (trained / "config.json").read_bytes()
    assert main(["export-hf", str(trained), "--out", str(trained)]) == 1
    assert "not empty" in capsys.readouterr().err
    assert (trained / "config.json").read_bytes() == before
    (tmp_path / "file").touch()
    for argv in (["export-hf", str(trained)], ["import-hf", str(trained)]):
        assert main([*argv, "--out", str(tmp_path / "file")]) == 1
        assert "is a file: choose a new folder" in capsys.readouterr().err


def test_an_imported_run_can_be_analysed_and_not_recalibrated(tmp_path, capsys):
    grouped = run_config(TINY, "gqa", "shuffled", 0)
    train.train(grouped, tmp_path / "run", device="cpu")
    hf.export_hf(tmp_path / "run", tmp_path / "hf")
    hf.import_run(tmp_path / "hf", tmp_path / "back", RUN)
    assert runs.load_run(tmp_path / "back")[1].attention == "gqa"
    assert "imported" in analyze.main(tmp_path / "back", device="cpu")["text"]
    assert main(["drope", str(tmp_path / "back"), "--fraction", "1"]) == 1
    assert "no validation loss" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "back" / "analysis")
    more = replace(RUN, data=DataConfig(replace(SMOKE, vocab=200, val_sequences=40)))
    (tmp_path / "back" / "config.json").write_text(to_json(replace(more, attention="gqa", model=grouped.model)))
    with pytest.raises(UserError, match="knows 128 tokens, its data have 200"):
        analyze.main(tmp_path / "back", device="cpu")


def test_a_matrix_without_its_corpus_complains_once(tmp_path, capsys):
    out = tmp_path / "matrix"
    assert main(["matrix", "text", "--data", str(tmp_path / "nowhere"), "--out", str(out)]) == 1
    assert "attn-clustering prepare" in capsys.readouterr().err
    assert not out.exists()


def test_levels_of_a_name_that_is_none(capsys):
    assert main(["levels", "smok"]) == 1
    assert "did you mean 'smoke'" in capsys.readouterr().err


def test_a_bench_refuses_before_it_measures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "bench", None)
    (tmp_path / "file").touch()
    for argv in (
        ["--out", str(tmp_path)],
        ["--out", str(tmp_path / "file" / "x")],
        ["--options", "v2", "--only", "train"],
    ):
        assert main(["bench", *argv]) == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_a_table_of_variants_tells_them_apart():
    row = {"stage": "train x", "tokens_per_s": 1500.0, "compile": "off", "step_graph": False}
    lines = bench.table([row | {"residual": kind} for kind in ("float32", "bfloat16")]).splitlines()
    assert len({line[:64] for line in lines}) == 3
    assert "1,500 tokens/s" in lines[1]


# --- damaged files ---


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe"])
def test_a_damaged_file_is_named(trained, content, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "DONE.json").write_bytes(content)
    with pytest.raises(UserError, match=r"DONE\.json"):
        runs.read_summary(run)
    (run / "analysis").mkdir()
    (run / "analysis" / "analysis.json").write_bytes(content)
    with pytest.raises(UserError, match=r"analysis\.json"):
        compare.read_results(tmp_path)
    (tmp_path / "levels.json").write_bytes(content)
    with pytest.raises(UserError, match=r"levels\.json"):
        levels.kept_levels(tmp_path / "levels.json", SMOKE, [0])
    (tmp_path / "experiment.json").write_bytes(content)
    with pytest.raises(UserError, match=r"experiment\.json"):
        report_data.read_matrix(tmp_path)


def test_damaged_arrays_are_named(tmp_path):
    result = {
        "run": {"name": "run", "seed": 0, "recal": None, "phase": "rope", "attention": "mha"},
        "training": {}, "probe": {}, "attention": {}, "inputs": {},
    }  # fmt: skip
    (tmp_path / "experiment.json").write_text(to_json(TINY))
    known = {name: {"value": 1.0} for name in levels.WANTED} | {levels.FLOORS: {"0": 1.0}}
    (tmp_path / "levels.json").write_text(json.dumps(known))
    (tmp_path / "run" / "analysis").mkdir(parents=True)
    (tmp_path / "run" / "analysis" / "analysis.json").write_text(json.dumps(result))
    (tmp_path / "run" / "analysis" / "arrays.npz").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"arrays\.npz is not a readable"):
        report_data.read_matrix(tmp_path)


# --- text ---


def test_a_folder_with_the_name_of_a_text_is_none(tmp_path):
    (tmp_path / "old.txt").mkdir()
    (tmp_path / "a.txt").write_text("word " * 60)
    assert files_of(str(tmp_path)) == [tmp_path / "a.txt"]
    assert len(list(documents(CorpusConfig(sources=(str(tmp_path),))))) == 1


def test_a_bad_line_is_counted_and_an_unknown_suffix_refused_before_reading(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"te\n')
    with pytest.raises(UserError, match="near line 2"):
        list(documents(CorpusConfig(sources=(str(tmp_path / "a.jsonl"),))))
    (tmp_path / "a.csv").touch()
    with pytest.raises(UserError, match="unknown format"):
        files_of(str(tmp_path / "a.csv"))


def test_a_blank_label_is_no_topic():
    given = ["", "a", "b", ""]
    config = CorpusConfig(embedder="given", topic_field="topic", clusters=2)
    found = assign_topics(config, ["long text of no topic"] * 4, given, np.ones(4, bool))
    assert found.names == ["a", "b"]
    assert found.topic_N.tolist() == [255, 0, 1, 255]


@pytest.mark.parametrize("texts", [["the of and to"] * 6, ["cell"] * 6])
def test_text_without_words_to_cluster_by(texts):
    with pytest.raises(UserError, match="cluster"):
        assign_topics(CorpusConfig(clusters=2), texts, [None] * 6, np.ones(6, bool))


# --- numbers ---


def test_nine_sequences_are_too_few_for_probes():
    with pytest.raises(UserError, match="val_sequences"):
        probes.split_sequences(9)


def test_a_head_without_far_attention_has_no_share_and_no_colour():
    """It looks at nothing but itself and the token before: NaN, which no mean, rank or picture may show."""
    share = torch.tensor([[0.5, torch.nan], [0.1, torch.nan]])
    assert over_heads(share) == pytest.approx(0.3)
    assert over_heads(share * torch.nan) is None
    page = picker([HeadMaps("run", np.zeros((2, 2, 4, 4), np.uint8), share.numpy(), np.array([0, 0, 1, 1]))], "share")
    assert "nan" not in page
    rows = [{"run": "r", "layer": i, "head": j, "share": float(share[i, j])} for i in (0, 1) for j in (0, 1)]
    image = figures.head_maps(rows[::-1], "share", "share").axes[0].images[0]  # a NaN first
    assert image.get_clim() == (-0.5, 0.5)


def test_spectra_do_not_mix_attention_variants():
    names = {"ordering": "shuffled", "phase": "rope", "seed": 0, "layer": 0}
    rows = [
        {"circuit": circuit, "attention": attention, "index": i, "value": 1 / i / scale, **names}
        for circuit in ("QK", "OV")
        for attention, scale in (("mha", 1), ("gqa", 3))
        for i in (1, 2)
    ]
    panels = {ax.get_title(loc="left") or ax.get_title(): ax for ax in figures.spectra(rows).axes}
    assert list(panels) == ["QK, mha", "QK, gqa", "OV, mha", "OV, gqa"]
    assert panels["QK, gqa"].lines[-1].get_ydata() == pytest.approx([1 / 3, 1 / 6])
