"""lab_shared's commands: subcommands, completion, the train words, dry runs, packages that are not installed."""

import json
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
from lab_shared.command import Program, dry_run_flag, job_list, print_result, write_record
from lab_shared.completion import completion
from lab_shared.config import field_names, from_json, with_field
from lab_shared.errors import MissingPackage, needs
from lab_shared.train_command import add_train, chosen_config, dry_run_text, recorded_time


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    warm_up: int = 5


@dataclass(frozen=True)
class Config:
    optim: Optim = field(default_factory=Optim)
    data: str | None = None
    steps: int = 10


PRESETS = {"quick": ("Seconds.", Config()), "long": ("Hours.", Config(steps=1000))}


def program(done):
    made = Program("tool", "A tool.", "1.2")
    sub = made.add("sweep", lambda args: done.append(args), "Run all.")
    sub.add_argument("--engine", choices=("local", "ray"))
    dry_run_flag(sub, "--list")
    add_train(
        made,
        lambda parser, words: done.append(words),
        "Train.",
        PRESETS,
        about="Trains.",
        example="quick --steps 3",
        data="DIR a folder",
        out="runs/X",
    )
    return made


@pytest.mark.parametrize(
    ("argv", "name", "fields", "given"),
    [
        ([], None, [], []),
        (["long"], "long", [], []),
        (["--steps", "3", "--out", "x"], None, ["--steps", "3"], ["out"]),
        (["quick", "--optim.lr", "1e-2", "--data", "d", "--dry-run"], "quick", ["--optim.lr", "1e-2"], ["data"]),
        (["quick", "--help"], "quick", ["--help"], ["help"]),
        (["--resume", "run"], None, [], ["resume"]),
    ],
)
def test_train_words_are_told_apart(argv, name, fields, given):
    done = []
    assert program(done).main(["train", *argv]) == 0
    (words,) = done
    assert (words.name, words.fields, words.given) == (name, fields, given)
    assert words.args.dry_run == ("--dry-run" in argv)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["train", "quik"], "no preset 'quik' (did you mean 'quick'?); there are quick, long"),
        (["train", "--resume", "run", "--steps", "3"], "--resume takes no other option"),
        (["train", "quick", "--resume", "run"], "--resume takes no other option"),
        (["train", "--resume", "run", "--dry-run"], "--resume takes no other option"),
        (["nonsense"], "nonsense"),
        (["sweep", "--engine", "cloud"], "cloud"),
    ],
)
def test_wrong_usage_is_exit_2_and_named(argv, says, capsys):
    done = []
    with pytest.raises(SystemExit) as stop:
        program(done).main(argv)
    assert (stop.value.code, done) == (2, [])
    assert says in capsys.readouterr().err


def test_help_names_presets_and_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        program([]).main(["train", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(text in said for text in ("quick  Seconds.", "--data DIR", "default: runs/X", "tool train quick --help"))
    assert program([]).main([]) == 2


def test_a_chosen_config_has_its_fields_then_what_replaces_them():
    config = chosen_config(
        PRESETS, "long", ["--optim.lr", "0.5", "--steps", "7"], "tool train", data="here", steps=None
    )
    assert config == Config(Optim(lr=0.5), data="here", steps=7)
    assert chosen_config(PRESETS, "quick", [], "tool train", optim__warm_up=9) == Config(Optim(warm_up=9))


def test_fields_by_their_dotted_names():
    assert field_names(Config()) == ["optim.lr", "optim.warm_up", "data", "steps"]
    assert with_field(Config(), "optim.lr", 2.0) == Config(Optim(lr=2.0))
    with pytest.raises(TypeError, match="rate"):
        with_field(Config(), "optim.rate", 2.0)


def test_a_dry_run_text_holds_the_configuration():
    text = dry_run_text("quick", Config(), {"work": "10 steps"})
    assert text.startswith("would train quick\n  work  10 steps\n")
    assert from_json(Config, text[text.index("\n{") :]) == Config()


def test_recorded_times(tmp_path):
    record = tmp_path / "tool-cpu.json"
    assert "no record tool-cpu.json" in recorded_time(record, 1, "lines_per_s")
    rows = [{"stage": "train a", "lines_per_s": 10.0}, {"name": "train b", "lines_per_s": 1000.0}]
    record.write_text(json.dumps({"environment": {"device": "a CPU"}, "rows": rows}))
    assert recorded_time(record, 6000, "lines_per_s", "train a") == (
        "about 10.0 min at 10 lines/s (tool-cpu.json, a CPU)"
    )
    assert recorded_time(record, 6000, "lines_per_s").startswith("about 6.0 s")
    assert "has no 'train c'" in recorded_time(record, 1, "lines_per_s", "train c")


def test_the_jobs_of_a_dry_run_are_those_without_a_result(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/result.json").write_text("{}")
    assert job_list(["a", "b", "c"], tmp_path).splitlines() == ["a", "c", f"2 to run, 1 done, in {tmp_path}"]


def test_results_and_records(tmp_path, capsys):
    result = {"text": "all is well", "n": 3}
    print_result(result, as_json=False)
    print_result(result, as_json=True)
    assert capsys.readouterr().out == 'all is well\n{"n": 3}\n'
    write_record(tmp_path / "new/record.json", result)
    assert json.loads((tmp_path / "new/record.json").read_text()) == result
    write_record(None, result)


BASH = """
source /dev/stdin
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _tool; echo "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["tool", "s"], "sweep"),
        (["tool", "--v"], "--version"),
        (["tool", "train", "q"], "quick"),
        (["tool", "train", "quick", "--opt"], "--optim.lr --optim.warm-up"),
        (["tool", "train", "--res"], "--resume"),
        (["tool", "sweep", "--engine", ""], "local ray"),
        (["tool", "sweep", "--eng"], "--engine"),
        (["tool", "sweep", "x"], ""),
    ],
)
def test_bash_completes(words, completed, capsys):
    assert program([]).main(["--print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    done = subprocess.run(["bash", "-c", BASH, *words[:1], *words], input=script, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (completed, "")


def test_zsh_and_fish_scripts_name_everything():
    made = program([]).parser
    zsh, fish = completion(made, "zsh"), completion(made, "fish", {"train": ["--optim.lr"]})
    assert zsh.startswith("autoload -U +X bashcompinit")
    assert "complete -o default -F _tool tool" in zsh
    for line in (
        "-n __fish_use_subcommand -a sweep -d 'Run all.'",
        "-n '__fish_seen_subcommand_from sweep' -l engine -x -a 'local ray'",
        "-n '__fish_seen_subcommand_from train' -l optim.lr",
    ):
        assert line in fish


def test_a_missing_package_is_one_line_with_the_way_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)

    def command(args):
        import sklearn  # noqa: F401

    made = Program("tool", "A tool.", "1")
    made.add("topics", command, "Topics.")
    assert made.main(["topics"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("tool: error: this command needs the package scikit-learn, which is not installed")
    assert "uv pip install scikit-learn" in said
    assert said.count("\n") == 1


def test_needs_names_the_other_way_and_lets_bugs_pass(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    said = r"--engine ray needs .* `uv pip install ray`, or use --engine local"
    with pytest.raises(MissingPackage, match=said), needs("--engine ray", "use --engine local"):
        import ray.cluster_utils  # noqa: F401
    with pytest.raises(ModuleNotFoundError), needs("anything"):
        import lab_shared.nonsense  # noqa: F401
