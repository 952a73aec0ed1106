"""lab_shared.command: exit codes and what people read."""

import subprocess
import sys

import pytest
from lab_shared.command import run_command
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
