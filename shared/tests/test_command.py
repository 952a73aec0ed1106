"""lab_shared.command: exit codes and what people read."""

import argparse
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from lab_shared.command import engine_flags, engine_options, positive_int, print_result, run_command
from lab_shared.errors import UserError


@pytest.mark.parametrize("error", [UserError("slots = 0: give at least 1"), FileNotFoundError("no such file")])
def test_what_a_user_can_mend_is_one_line(error, capsys):
    def command(args):
        raise error

    assert run_command("tool", command, None) == 1
    assert capsys.readouterr().err == f"tool: error: {error}\n"


def test_ctrl_c_is_one_line_and_its_own_code(capsys):
    def command(args):
        raise KeyboardInterrupt

    assert run_command("tool", command, None) == 130
    assert capsys.readouterr().err == "\ntool: stopped\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command("tool", lambda args: args / 0, 1)


def test_a_reader_that_leaves_early_is_no_error():
    script = (
        "import sys; from lab_shared.command import run_command;"
        "sys.exit(run_command('tool', lambda n: [print(i) for i in range(n)], 1_000_000))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "many", "", "nan"])
def test_a_count_is_a_positive_whole_number(text, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=positive_int)
    assert parser.parse_args(["--count", "12"]).count == 12
    with pytest.raises(SystemExit):
        parser.parse_args(["--count", text])
    assert f"argument --count: {text} is not a positive whole number" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-0.5", "nan", "inf", "half"])
def test_a_share_is_a_positive_finite_number(text, capsys):
    parser = argparse.ArgumentParser()
    engine_flags(parser)
    assert parser.parse_args(["--gpus-per-job", "0.5"]).gpus_per_job == 0.5
    with pytest.raises(SystemExit):
        parser.parse_args(["--gpus-per-job", text])
    assert f"argument --gpus-per-job: {text} is not a positive number" in capsys.readouterr().err


def test_a_clusters_address_needs_the_engine():
    parser = argparse.ArgumentParser()
    engine_flags(parser)
    assert engine_options(parser.parse_args(["--engine", "ray", "--address", "h:1"]))["address"] == "h:1"
    with pytest.raises(UserError, match="--address h:1 is that of a Ray cluster: add --engine ray"):
        engine_options(parser.parse_args(["--address", "h:1"]))


@pytest.mark.parametrize("words", [["--engine", "ray"], ["--workers", "3"], ["--gpus-per-job", "7"]])
def test_what_jobs_want_needs_jobs(words):
    parser = argparse.ArgumentParser()
    engine_flags(parser)
    parser.add_argument("--shards", type=positive_int)
    engine_options(parser.parse_args(["--shards", "2", *words]))
    with pytest.raises(UserError, match="say how many with --shards N"):
        engine_options(parser.parse_args(words))


def test_what_is_printed_as_json_is_json(capsys):
    print_result(
        {"text": "for people", "values": np.array([1.5, np.nan]), "bound": float("inf"), "n": np.int64(3)}, True
    )
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "values": [1.5, None],
        "bound": None,
        "n": 3,
    }


def test_a_broken_pipe_that_is_not_stdouts_is_an_error(capfd):
    def command(args):
        raise BrokenPipeError("the worker is gone")

    assert run_command("tool", command, None) == 1
    assert capfd.readouterr().err == "tool: error: the worker is gone\n"


SAYS = (
    "import sys; from lab_shared.command import Program; from lab_shared.progress import Counter, say\n"
    "def run(args):\n"
    "    with Counter('counting', 1, 'things') as counter:\n"
    "        counter.show(1)\n"
    "    say('on the way')\n"
    "    open(sys.argv[2], 'w').write('done')\n"
    "    print('\\u2013')\n"
    "program = Program('tool', 'x', '1')\n"
    "program.add('go', run, 'x').add_argument('file')\n"
    "sys.exit(program.main())\n"
)


@pytest.mark.parametrize(
    ("streams", "code"),
    [("2>/dev/full", 0), ("2>&-", 0), (">&-", 0), ("2>&1 | true", 0), (">/dev/full", 1), ("2>&1 >/dev/null", 0)],
)
def test_work_goes_on_where_nobody_can_read_about_it(tmp_path, streams, code):
    file = tmp_path / "made"
    (tmp_path / "says.py").write_text(SAYS)
    line = f'"{sys.executable}" says.py go made {streams}; exit ${{PIPESTATUS[0]}}'
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}  # a stdout without the dash that is printed
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, file.read_text()) == (code, "done")
    assert "Traceback" not in done.stderr
