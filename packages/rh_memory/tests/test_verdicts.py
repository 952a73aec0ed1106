"""Verdicts from made-up records: what decides a claim, what leaves it open, and which runs are one experiment."""

import json
import re
from dataclasses import replace

import pytest
from lab_shared.config import to_json
from lab_shared.errors import UserError
from rh_memory import diagnostics as rh_diagnostics
from rh_memory import records, verdicts
from rh_memory import sweep as rh_sweep
from rh_memory.cli import main
from rh_memory.config import PRESETS


def interval(value, half=0.01):
    return {"value": value, "low": value - half, "high": value + half}


def evaluation(nll_last, nll_all, references=("iid marginal", "AR(64), height", "prime phases")):
    return {
        "label": "made-up zeros",
        "part": "val_tail",
        "nll_last": interval(nll_last),
        "nll_all": interval(nll_all),
        "nll_last_minus": {name: interval(nll_last - 0.5) for name in references},
        "baselines": {"rows": [{"name": name, "nll_last": interval(0.5)} for name in references]},
    }


def diagnostics(run, removal=0.03, whole=0.005, between=0.1):
    return {
        "run": run,
        "base": interval(-0.5),
        "removed": [{"slot": i, **interval(removal * i, 0.001)} for i in range(2)],
        "content": {
            "identity_only": interval(0.05),
            "content_only": interval(0.01),
            "content_only_share_of_gain": 0.1,
        },
        "permutation": {"whole identity": interval(whole)},
        "gradient": {"cosine_within_groups": interval(0.9), "effective_rank_share": 0.2},
        "attention": [{"layer": 0, "spread over slots": interval(3.0)}],
        "blocks": {"std_between": between, "std_expected_from_noise": 0.05},
        "rollout": {"phase_errors": [{"model": interval(3.0), "AR": interval(0.3)}]},
    }


@pytest.fixture
def write(tmp_path):
    """write(preset, seed, nll_last, nll_all, diagnosed=..., name=..., **changes of the configuration)"""

    def make(preset, seed, nll_last=-0.5, nll_all=-0.4, *, diagnosed=None, name=None, model=None, **changes):
        config = replace(PRESETS[preset][1], seed=seed, wandb="disabled", **changes)
        config = replace(config, model=replace(config.model, **(model or {})))
        run = tmp_path / (name or f"{preset}-seed{seed}")
        run.mkdir()
        (run / "config.json").write_text(to_json(config))
        if nll_last is not None:
            (run / "evaluation.json").write_text(json.dumps(evaluation(nll_last, nll_all)))
        if diagnosed is not None:
            (run / "diagnostics.json").write_text(json.dumps(diagnostics(run.name, **diagnosed)))
        rows = [{"step": 20 * i, "split": "train", "loss": 1.0} for i in range(1, 1001)]
        rows.insert(500, {"step": 10_000, "split": "val", "nll": 0.3, "nll_last": 0.2})
        rows[-1]["time"] = 100.4
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return run

    return make


def row(result, start):
    (found,) = [r for r in result["claims"] if r["claim"].startswith(start)]
    return found


def test_a_claim_holds_fails_or_stays_open(write, tmp_path):
    for seed, e3, e4, e0 in ((7, -0.50, -0.80, -0.60), (42, -0.51, -0.82, -0.50), (1337, -0.52, -0.81, -0.61)):
        write("e3", seed, e3)
        write("e4", seed, e4, diagnosed={"removal": 0.03, "whole": 0.005})
        write("e0", seed, -0.5, e0)
        write("e2-rope", seed, e3 - 0.3 - seed / 1e5)
    write("e5", 7, -0.5, diagnosed={})
    result = verdicts.verdicts(records.read([tmp_path]))
    better = row(result, "permuted identities and")
    assert better["verdict"] == "holds"
    assert better["value"] == pytest.approx(-0.30)
    assert better["by_seed"] == {"7": pytest.approx(-0.3), "42": pytest.approx(-0.31), "1337": pytest.approx(-0.29)}
    assert better["low"] < -0.3 < better["high"] < 0
    assert row(result, "postfix memory beats")["verdict"] == "fails"
    assert row(result, "E0 without memory")["verdict"] == "undecided"  # its interval holds the bound
    assert row(result, "E4's slots are redundant")["verdict"] == "fails"
    assert row(result, "E4 does without identities")["verdict"] == "holds"
    assert row(result, "E4's slots learn apart")["verdict"] == "fails"
    assert row(result, "the slots' gradients have high rank")["verdict"] == "fails"
    assert row(result, "rollouts drift little")["verdict"] == "fails"
    assert row(result, "the difficulty shifts")["verdict"] == "holds"
    assert row(result, "orthogonal and dropped")["why"] == "1 of 3 seeds"
    assert row(result, "prefix memory is decorative (E2)")["why"].startswith("not diagnosed")
    assert row(result, "prefix memory is decorative (E1)")["why"].startswith("no records")
    assert row(result, "E4 is a success")["verdict"] == "holds"
    spread = row(result, "seeds differ much")
    assert spread["value"] == pytest.approx(0.01, rel=1e-6)
    # the chi-squared interval with 2 degrees of freedom: sd sqrt(2 / -2 log(.025)), sd sqrt(2 / -2 log(.975))
    assert spread["low"] == pytest.approx(0.01 / 3.688879**0.5, rel=1e-5)
    assert spread["high"] == pytest.approx(0.01 / 0.025317808**0.5, rel=1e-5)
    assert spread["verdict"] == "undecided"


def test_two_seeds_decide_nothing(write, tmp_path):
    for seed in (7, 42):
        write("e4", seed, diagnosed={})
        write("e3", seed, -0.1)
    result = verdicts.verdicts(records.read([tmp_path / "e*"]))
    assert {r["verdict"] for r in result["claims"]} == {"undecided"}
    assert row(result, "E4 is a success")["why"] == "2 of 3 seeds"


def test_targets_controls_and_stopped_runs(write, tmp_path, capsys):
    for seed in (7, 42, 1337):
        write("explicit", seed, -2.5 - seed / 1e5)
        write("explicit-random", seed, -2.0)
        write("explicit-small", seed, -2.0, model={"frequencies": "random"}, name=f"small-random-{seed}")
        write("explicit-small", seed, -2.0 - seed / 1e5)
    write("explicit", 7, -2.9, steps=16_000, name="long")
    write("e0", 7, nll_last=None)
    write("e3", 7, -0.4, steps=3000, name="short")
    assert main(["verdicts", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    experiments = {r["experiment"]: r for r in result["experiments"]}
    assert experiments["explicit"]["met"] is True
    assert experiments["explicit, steps=16000"]["target"] == "nll_last <= -2.8"
    assert experiments["e3, steps=3000"]["nll_all"] is None  # readouts are not all
    assert experiments["e3, steps=3000"]["met"] is False
    assert experiments["explicit-small, frequencies=random"]["seeds"] == [7, 42, 1337]
    controls = {r["experiments"][0]: r for r in result["controls"]}
    assert controls["explicit-random"]["verdict"] == "holds"
    assert controls["explicit-small, frequencies=random"]["experiments"][1] == "explicit-small"
    assert controls["explicit-small, frequencies=random"]["verdict"] == "undecided"
    assert result["stopped"][0]["last_validation"]["nll_last"] == 0.2
    page = tmp_path / "verdicts.md"
    assert main(["verdicts", str(tmp_path), "--markdown", str(page)]) == 0
    printed = {line.partition("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert re.search(
        r"nll_last <= -2.8 +met \(1 of 3 seeds\) +100 s +600 s of one H200 +met", printed["explicit, steps=16000"]
    )
    assert re.search(r"nll_last <= -0.5 +NOT met \(1 of 3 seeds\) +100 s", printed["e3, steps=3000"])
    assert re.search(r"nll_last <= -2.35 +met +100 s +150 s of one H200 +met", printed["explicit"])
    for table in page.read_text().split("### ")[1:]:
        assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1
    assert "| e0-seed7 | 20,000 of 20,000 | step 10,000: nll_last +0.2000 |" in page.read_text()


def test_records_are_refused_when_they_clash_or_are_not_there(write, tmp_path):
    write("e3", 7)
    with pytest.raises(UserError, match="no run there"):
        records.read([tmp_path / "nothing"])
    write("e3", 7, name="again")
    with pytest.raises(UserError, match="both e3 with seed 7"):
        records.read([tmp_path])
    printed = tmp_path / "printed.json"
    printed.write_text(json.dumps(diagnostics("unknown")))
    with pytest.raises(UserError, match="diagnostics of unknown"):
        records.read([tmp_path / "again", printed])


def test_printed_diagnostics_and_collected_files_are_read_back(write, tmp_path):
    run = write("e4", 7)
    (run / "manifest.json").write_text(json.dumps({"argv": ["train", "--out", "/somewhere/deep/RUN"], "seed": 7}))
    (run / "weights.safetensors").write_bytes(b"large")
    (run / "diagnostics_legacy.json").write_text("{}")
    printed = tmp_path / "printed.json"
    printed.write_text(json.dumps({"runs": [diagnostics(run.name)]}))
    (record,) = records.read([run, printed])
    assert record.diagnostics["run"] == run.name
    (folder,) = records.collect([run], tmp_path / "kept")
    kept = {"config.json", "manifest.json", "evaluation.json", "diagnostics_legacy.json", "metrics.jsonl"}
    assert {p.name for p in folder.iterdir()} == kept
    assert json.loads((folder / "manifest.json").read_text())["argv"][-1] == "RUN"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert 190 < len(lines) < 220
    assert [line["step"] for line in lines if line["split"] == "val"] == [10_000]
    assert [line["step"] for line in lines[-5:]] == [19_920, 19_940, 19_960, 19_980, 20_000]
    (again,) = records.read([tmp_path / "kept"])
    assert (again.evaluation, again.last_validation) == (record.evaluation, record.last_validation)
    with pytest.raises(UserError, match="no run"):
        records.collect([tmp_path], tmp_path)


def test_a_sweep_trains_diagnoses_collects_and_does_nothing_twice(tmp_path, monkeypatch):
    done = []

    def train(config, out):
        done.append(out.name)
        assert config.steps == 30
        (out / "config.json").write_text(to_json(config))
        (out / "evaluation.json").write_text(json.dumps(evaluation(-0.5 - config.seed / 1e4, -0.4)))
        (out / "DONE.json").write_text(json.dumps({"summary": {"label": "made-up", "nll_last": -0.5}}))

    def diagnose(run):
        done.append(f"{run.name} diagnosed")
        result = diagnostics(run.name)
        (run / "diagnostics.json").write_text(json.dumps(result))
        return result

    monkeypatch.setattr(rh_sweep, "train", train)
    monkeypatch.setattr(rh_diagnostics, "diagnose", diagnose)
    for _ in range(2):
        table = rh_sweep.sweep(
            ["e4"], [7, 42, 1337], tmp_path / "runs", steps=30, diagnose=True, collect_in=tmp_path / "kept", workers=1
        )
    names = [f"e4-30steps-seed{seed}" for seed in (7, 42, 1337)]
    assert sorted(done) == sorted([*names, *(f"{name} diagnosed" for name in names)])
    assert "-0.5000" in table
    result = verdicts.verdicts(records.read([tmp_path / "kept"]))
    assert row(result, "E4 does without identities")["experiments"] == ["e4, steps=30"]
    assert row(result, "E4 does without identities")["verdict"] == "holds"


def test_a_sweep_puts_other_fields_in_and_into_the_names_of_runs(tmp_path, monkeypatch):
    seen = {}

    def train(config, out):
        seen[out.name] = config
        (out / "DONE.json").write_text(json.dumps({"summary": {"label": "made-up", "nll_last": -0.5}}))

    monkeypatch.setattr(rh_sweep, "train", train)
    fields = ["data.mirror=true", "optim.ema=0.999", "optim.optimizer=muon", "early_stop=false"]
    rh_sweep.sweep(["e0-rope"], [7], tmp_path, fields=fields, workers=1)
    (config,) = seen.values()
    assert list(seen) == ["e0-rope-mirror-ema-0.999-optimizer-muon-no-early_stop-seed7"]
    assert (config.data.mirror, config.optim.ema, config.optim.optimizer) == (True, 0.999, "muon")
    plain = PRESETS["e0-rope"][1]
    optim = replace(config.optim, ema=plain.optim.ema, optimizer=plain.optim.optimizer)
    assert replace(config, data=plain.data, optim=optim, seed=plain.seed, wandb=plain.wandb) == plain
    for pair, message in (
        ("data.miror=true", r"--set data.miror=true: give FIELD=VALUE, such as data.mirror="),
        ("data.mirror", "--set data.mirror: give FIELD=VALUE"),
        ("optim.ema=much", "optim.ema: expected a number"),
        ("data.source=gue", "--set data.source=gue: a sweep has --source for that"),
    ):
        with pytest.raises(UserError, match=message):
            rh_sweep.sweep(["e0-rope"], [7], tmp_path / "none", fields=[pair], workers=1)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("presets", "seeds", "says"),
    [
        (["e0", "e3", "e0"], [7], "preset e0 is named twice"),
        (["e0"], [7, 42, 7], "--seeds 7 is named twice"),
        (["e0"], [7, -1], "seed: .*-1"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_it_runs(tmp_path, presets, seeds, says):
    with pytest.raises(UserError, match=says):
        rh_sweep.sweep(presets, seeds, tmp_path / "runs", workers=1)
    assert not (tmp_path / "runs").exists()


def test_a_line_cut_short_by_a_crash_is_left_out(write, tmp_path):
    run = write("e0", 7)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 20001, "spl')
    records.collect([run], tmp_path / "kept")
    (record,) = records.read([tmp_path / "kept"])
    assert record.steps_done == 20_000


@pytest.mark.parametrize("name", ["evaluation.json", "diagnostics.json"])
def test_damaged_records_are_named(write, name):
    run = write("e4", 7, diagnosed={})
    for content, says in (("{", "is not valid JSON"), ("{}", "lacks"), ("[]", "no JSON object")):
        (run / name).write_text(content)
        with pytest.raises(UserError, match=rf"{name} .*{says}"):
            records.read([run])


def test_a_configuration_that_cannot_be_read_is_named(write, tmp_path):
    (write("e4", 7) / "config.json").write_text('{"steps": "many"}')
    with pytest.raises(UserError, match=r"config\.json: steps: expected"):
        records.read([tmp_path])


def test_another_commands_json_is_no_diagnosis(write, tmp_path):
    run = write("e4", 7)
    with pytest.raises(UserError, match=r"evaluation\.json is not what `rh-memory diagnose --json` printed"):
        records.read([run, run / "evaluation.json"])


def test_a_sweep_that_fails_collects_what_has_begun(tmp_path, monkeypatch):
    def train(config, out):
        (out / "config.json").write_text(to_json(config))
        raise UserError("the disk is full")

    monkeypatch.setattr(rh_sweep, "train", train)
    with pytest.raises(UserError, match="the disk is full"):
        rh_sweep.sweep(["e0"], [7, 42], tmp_path / "runs", steps=30, collect_in=tmp_path / "kept", workers=1)
    assert [r.evaluation for r in records.read([tmp_path / "kept"])] == [None, None]
