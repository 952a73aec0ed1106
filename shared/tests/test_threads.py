"""Threads that wait: soon asleep by default, as the user says otherwise, and in time for torch to hear of it."""

import os
import subprocess
import sys

import pytest
from lab_shared.threads import sleep_soon


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
    ],
)
def test_threads_sleep_soon_unless_the_environment_says_otherwise(before, after, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    sleep_soon()
    found = {name: os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ}
    assert found == after


def test_a_command_says_so_before_torch_is_imported():
    code = (
        "import os, sys\n"
        "from lab_shared.command import run_command\n"
        "show = lambda args: print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])\n"
        "run_command('program', show, None)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["False", "1000"]
