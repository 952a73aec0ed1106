"""lab_shared.sweep: every job's result stands exactly once, whatever happens to the workers."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from lab_shared.errors import UserError
from lab_shared.sweep import Job, run_jobs

CALLS = """
    import os, signal, time
    from pathlib import Path

    def square(out, x):
        with open(out / "calls", "a") as f:
            f.write("x")
        return {"square": x * x}

    def add(out, names):
        import json
        done = [json.loads((out.parent / n / "result.json").read_text()) for n in names]
        return {"sum": sum(d["summary"]["square"] for d in done)}

    def fail(out, message):
        raise ValueError(message)

    def die_once(out, x):
        if not (out / "died").exists():
            (out / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"square": x * x}

    def die_always(out):
        os.kill(os.getpid(), signal.SIGKILL)

    def linger(out, seconds):
        (out / "started").touch()
        time.sleep(seconds)
        with open(out / "calls", "a") as f:
            f.write("x")
        return {"seconds": seconds}
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """A module of job calls that this process and others can import."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "sweep_calls.py").write_text(textwrap.dedent(CALLS))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    sys.modules.pop("sweep_calls", None)
    return importlib.import_module("sweep_calls")


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_run_in_order_of_need_and_only_once(calls, tmp_path, workers):
    jobs = [Job(f"s{x}", calls.square, {"x": x}) for x in range(3)]
    jobs.append(Job("sum", calls.add, {"names": ["s0", "s1", "s2"]}, needs=("s0", "s1", "s2")))
    for _ in range(2):
        results = run_jobs(jobs, tmp_path / "sweep", workers=workers)
        assert list(results) == ["s0", "s1", "s2", "sum"]
        assert results["sum"] == {"sum": 5}
    assert (tmp_path / "sweep/s2/calls").read_text() == "x"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_job_stops_only_those_that_need_it(calls, tmp_path, workers):
    jobs = [
        Job("bad", calls.fail, {"message": "no such topic"}),
        Job("after", calls.square, {"x": 1}, needs=("bad",)),
        Job("good", calls.square, {"x": 2}),
    ]
    with pytest.raises(UserError, match=r"2 of 3 jobs failed(.|\n)*no such topic(.|\n)*not run, since bad failed"):
        run_jobs(jobs, tmp_path / "sweep", workers=workers)
    assert json.loads((tmp_path / "sweep/good/result.json").read_text())["summary"] == {"square": 4}
    assert "Traceback" in (tmp_path / "sweep/bad/log.txt").read_text()
    assert not (tmp_path / "sweep/after").exists()


def test_a_killed_worker_is_started_again_as_often_as_asked(calls, tmp_path):
    jobs = [Job("once", calls.die_once, {"x": 3}), Job("other", calls.square, {"x": 2})]
    assert run_jobs(jobs, tmp_path / "a", workers=2)["once"] == {"square": 9}
    with pytest.raises(UserError, match="SIGKILL"):
        run_jobs([Job("always", calls.die_always), jobs[1]], tmp_path / "b", workers=2, retries=1)


def test_results_of_other_arguments_are_not_taken_for_these(calls, tmp_path):
    run_jobs([Job("s", calls.square, {"x": 1})], tmp_path)
    with pytest.raises(UserError, match=r"holds the result of other arguments \(x is 1 there, not 2\)"):
        run_jobs([Job("s", calls.square, {"x": 2})], tmp_path)
    with pytest.raises(UserError, match=r"\(it is of .*:square, not .*:fail\)"):
        run_jobs([Job("s", calls.fail, {"x": 1})], tmp_path)


def test_only_the_arguments_that_differ_are_named(calls, tmp_path):
    old = {"x": 1, "config": {"optim": {"lr": 0.1, "ema": 0.9}, "steps": 2, "seed": 0, "gone": None}}
    new = {"x": 1, "config": {"optim": {"lr": 0.2, "ema": 0.9}, "steps": 3, "seed": 1, "more": [1]}}
    (tmp_path / "s").mkdir()
    done = {"call": Job("s", calls.square).target, "kwargs": old, "summary": {}}
    (tmp_path / "s/result.json").write_text(json.dumps(done))
    with pytest.raises(UserError) as caught:
        run_jobs([Job("s", calls.square, new)], tmp_path)
    first = "config.optim.lr is 0.1 there, not 0.2, config.steps is 2 there, not 3, config.seed is 0 there, not 1"
    assert f"({first} and 2 more)" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"call": "a:b", "kwargs": [], "summary": {}}', "\0"])
def test_a_damaged_result_is_named(calls, tmp_path, text):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/result.json").write_text(text)
    with pytest.raises(UserError, match=f"result.json is no result of a job: delete {tmp_path / 's'} to run it again"):
        run_jobs([Job("s", calls.square, {"x": 2})], tmp_path)


@pytest.mark.parametrize(
    ("names", "needs", "match"),
    [(("../up",), (), "folder name"), (("a", "a"), (), "two jobs"), (("a",), ("b",), "does not come before")],
)
def test_bad_lists_are_refused(calls, tmp_path, names, needs, match):
    with pytest.raises(UserError, match=match):
        run_jobs([Job(n, calls.square, {"x": 1}, needs) for n in names], tmp_path)


@pytest.mark.parametrize("options", [{"gpus_per_job": -1}, {"gpus_per_job": 1.5}, {"workers": 0}, {"engine": "slurm"}])
def test_bad_options_are_refused(calls, tmp_path, options):
    with pytest.raises(UserError):
        run_jobs([Job("a", calls.square, {"x": 1})], tmp_path, **options)


def test_a_local_function_cannot_be_a_job(tmp_path):
    with pytest.raises(UserError, match="top-level"):
        run_jobs([Job("a", lambda out: {})], tmp_path)


@pytest.mark.slow
def test_after_kill_9_of_the_sweep_its_orphans_results_are_waited_for_and_kept(calls, tmp_path):
    folder = str(tmp_path / "s")
    script = (
        "from pathlib import Path; import sweep_calls; from lab_shared.sweep import Job, run_jobs;"
        "jobs = [Job(f'j{i}', sweep_calls.linger, {'seconds': 4}) for i in range(2)];"
        f"run_jobs(jobs, Path({folder!r}), workers=2)"
    )
    sweep = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"s/j{i}/started").exists() for i in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0
    assert (tmp_path / "s/j0/calls").read_text() == "x"


@pytest.mark.slow
def test_ray_runs_the_same_list(calls, tmp_path):
    pytest.importorskip("ray")
    script = textwrap.dedent(f"""
        from pathlib import Path
        import sweep_calls as calls
        from lab_shared.sweep import Job, run_jobs
        jobs = [Job("a", calls.die_once, {{"x": 3}}), Job("b", calls.square, {{"x": 2}})]
        jobs.append(Job("sum", calls.add, {{"names": ["a", "b"]}}, needs=("a", "b")))
        for _ in range(2):
            print(run_jobs(jobs, Path({str(tmp_path / "s")!r}), engine="ray")["sum"])
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=180)
    assert [line for line in done.stdout.splitlines() if "raylet" not in line] == ["{'sum': 13}"] * 2, done.stderr
    addresses = re.findall(r"Worker IP address: ([0-9.]+)", done.stdout + done.stderr)
    assert set(addresses) == {"127.0.0.1"}  # of the worker that died
    assert (tmp_path / "s/b/calls").read_text() == "x"


INTERRUPTED = """
    import signal, sys, time
    from pathlib import Path
    from lab_shared.signals import StopSignals
    from lab_shared.sweep import Job, run_jobs

    def save(out):
        with StopSignals(announce=False) as signals:
            (out / "started").touch()
            while signals.received is None:
                time.sleep(0.02)
            time.sleep(0.5)
            (out / "saved").touch()
        raise SystemExit(128 + signals.received)

    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what began the tests may ignore them
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        import interrupted
        run_jobs([Job(f"j{i}", interrupted.save) for i in range(2)], Path(sys.argv[1]), workers=2)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_jobs_can_save_after_the_terminals_signal(tmp_path, number):
    """A terminal sends it to the whole group of the process; the jobs must get one signal and not two."""
    (tmp_path / "interrupted.py").write_text(textwrap.dedent(INTERRUPTED))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    program = [sys.executable, str(tmp_path / "interrupted.py"), str(tmp_path / "sweep")]
    with subprocess.Popen(program, env=environment, start_new_session=True, stderr=subprocess.DEVNULL) as process:
        started = [tmp_path / f"sweep/j{i}/started" for i in range(2)]
        deadline = time.monotonic() + 60
        while not all(path.exists() for path in started) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, number)
        try:
            assert process.wait(60)
        finally:
            process.kill()
    assert [(tmp_path / f"sweep/j{i}/saved").exists() for i in range(2)] == [True, True]


def test_more_gpus_for_a_job_than_there_are_is_an_error(calls, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="this machine has 2 GPUs"):
        run_jobs([Job("a", calls.square, {"x": 1})], tmp_path / "sweep", gpus_per_job=4)
