"""lab_shared.command: exit codes and what people read."""

import argparse
import subprocess
import sys

import pytest
from lab_shared.command import engine_flags, positive_int, run_command
from lab_shared.errors import UserError


@pytest.mark.parametrize("error", [UserError("slots = 0: give at least 1"), FileNotFoundError("no such file")])
def test_what_a_user_can_mend_is_one_line(error, capsys):
    def command(args):
        raise error

    assert run_command("tool", command, None) == 1
    assert capsys.readouterr().err == f"tool: error: {error}\n"


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
