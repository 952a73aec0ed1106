"""lab_shared.sweep on a Ray cluster of two nodes: one is killed in the middle, and every result stands exactly once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CALLS = """
    import os, time

    def linger(out, x):
        '''Half a job's time before its mark and half after it, so that there is a middle to be killed in.'''
        import ray
        with open(out / "nodes", "a") as nodes:
            nodes.write(ray.get_runtime_context().get_node_id() + "\\n")
        time.sleep(0.7)
        began = time.time()
        time.sleep(0.7)
        return {"square": x * x, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "time": [began, time.time()]}

    def square(out, x):
        return {"square": x * x}
"""
PROGRAM = """
    import json, os, sys, threading, time
    from pathlib import Path

    import ray
    from ray.cluster_utils import Cluster

    import ray_calls
    from lab_shared.sweep import Job, run_jobs

    OUT = Path(sys.argv[1])
    HERE = {"node_ip_address": "127.0.0.1", "object_store_memory": 80_000_000, "num_cpus": 4, "num_gpus": 1}
    cluster = Cluster(initialize_head=True, head_node_args={**HERE, "include_dashboard": False})
    second = cluster.add_node(**HERE)

    def kill_the_second_node():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if any(second.node_id in nodes.read_text() for nodes in OUT.glob("*/nodes")):
                cluster.remove_node(second, allow_graceful=False)
                return
            time.sleep(0.05)

    try:
        jobs = [Job(f"here{x}", ray_calls.square, {"x": x}) for x in range(2)]
        run_jobs(jobs, OUT, workers=1)
        stamps = {job.name: (OUT / job.name / "result.json").stat().st_mtime_ns for job in jobs}
        jobs += [Job(f"there{x}", ray_calls.linger, {"x": x}) for x in range(8)]
        killer = threading.Thread(target=kill_the_second_node)
        killer.start()
        run_jobs(jobs, OUT, engine="ray", address=cluster.address, gpus_per_job=0.5, retries=3)
        killer.join()
        again = run_jobs(jobs, OUT, workers=1)  # all done: no engine is needed
        kept = all((OUT / name / "result.json").stat().st_mtime_ns == stamp for name, stamp in stamps.items())
        print(json.dumps({"results": again, "kept": kept, "killed": second.node_id}))
    finally:
        cluster.shutdown()
"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Callable[[str], dict[str, Any]], Path]:
    """What the sweep said, read(job name) -> its record, and its folder."""
    pytest.importorskip("ray")
    folder = tmp_path_factory.mktemp("ray")
    (folder / "ray_calls.py").write_text(textwrap.dedent(CALLS))
    (folder / "program.py").write_text(textwrap.dedent(PROGRAM))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # or it would listen on the network too
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_health_check_period_ms": "1000",  # a dead node is noticed in seconds rather than half a minute
        "RAY_health_check_failure_threshold": "5",
    }
    environment.pop("CUDA_VISIBLE_DEVICES", None)  # where it is empty Ray refuses nodes with a GPU, pretended or not
    program = [sys.executable, str(folder / "program.py"), str(folder / "sweep")]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    said = json.loads(done.stdout.strip().splitlines()[-1])

    def read(name: str) -> dict[str, Any]:
        return json.loads((folder / "sweep" / name / "result.json").read_text())

    return said, read, folder / "sweep"


@pytest.mark.slow
def test_every_result_stands_exactly_once(sweep) -> None:
    said, read, folder = sweep
    names = [f"here{x}" for x in range(2)] + [f"there{x}" for x in range(8)]
    assert list(said["results"]) == names
    assert sorted(path.parent.name for path in folder.glob("*/result.json")) == names
    for name in names:
        assert read(name)["summary"] == said["results"][name]
        assert said["results"][name]["square"] == int(name[-1]) ** 2


@pytest.mark.slow
def test_jobs_of_the_killed_node_were_started_again_and_counted(sweep) -> None:
    said, read, folder = sweep
    starts = {f"there{x}": (folder / f"there{x}" / "nodes").read_text().splitlines() for x in range(8)}
    killed = [name for name, nodes in starts.items() if said["killed"] in nodes]
    assert killed
    retried = [name for name, nodes in starts.items() if len(nodes) > 1]
    assert retried
    assert set(retried) <= set(killed)
    for name, nodes in starts.items():
        assert read(name)["attempts"] == len(nodes)


@pytest.mark.slow
def test_what_was_done_here_is_not_done_there(sweep) -> None:
    said, read, _ = sweep
    assert said["kept"]
    assert [read(f"here{x}")["attempts"] for x in range(2)] == [1, 1]


@pytest.mark.slow
def test_half_a_gpu_each_puts_no_more_than_two_jobs_on_one(sweep) -> None:
    said, _, _ = sweep
    ran = [said["results"][f"there{x}"] for x in range(8)]
    assert {result["gpus"] for result in ran} == {"0"}
    spans = [result["time"] for result in ran]
    at_once = [sum(a <= t < b for a, b in spans) for t, _ in spans]
    assert max(at_once) <= 4  # two nodes of one GPU each; four CPUs would hold twice as many
