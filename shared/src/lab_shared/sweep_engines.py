"""Where the jobs of lab_shared.sweep run: in this process, in processes beside it, or on Ray.

An engine is a context that yields (submit, capacity): submit(name) -> Future of the summary, and how many jobs may be
submitted at a time.
"""

from __future__ import annotations

import math
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from lab_shared.errors import UserError, needs
from lab_shared.sweep import Engine, execute

Submit = Callable[[str], "Future[dict[str, Any]]"]
_SECONDS_TO_SAVE = 30.0


class JobFailed(RuntimeError):
    """A job's process ended badly; the message says how."""


def open_engine(
    engine: Engine,
    folder: Path,
    address: str | None,
    workers: int | None,
    gpus_per_job: float,
    retries: int,
    n_jobs: int,
) -> AbstractContextManager[tuple[Submit, int]]:
    """The engine of that name, ready to run jobs in `folder`. Raises UserError for arguments that do not fit."""
    if gpus_per_job < 0 or (gpus_per_job > 1 and gpus_per_job != int(gpus_per_job)):
        raise UserError(f"gpus_per_job={gpus_per_job} must be a fraction of one GPU or a whole number of GPUs")
    if workers is not None and workers < 1:
        raise UserError(f"workers={workers} must be at least 1")
    if engine == "ray":
        return _on_ray(folder, address, gpus_per_job, retries, n_jobs)
    if engine != "local":
        raise UserError(f"engine {engine!r} is unknown: use local or ray")
    shares = _gpu_shares(gpus_per_job) if gpus_per_job else []
    if not shares and gpus_per_job and (count := _gpu_count()):
        raise UserError(f"gpus_per_job={gpus_per_job:g}: this machine has {count} GPUs; lower it")
    workers = min(workers or max(1, len(shares)), n_jobs)
    if workers == 1:
        return _in_this_process(folder)
    if shares and workers > len(shares):
        raise UserError(
            f"workers={workers} jobs with gpus_per_job={gpus_per_job} do not fit on the GPUs here, which hold "
            f"{len(shares)}: lower one of the two"
        )
    return _in_processes(folder, workers, shares, retries)


@contextmanager
def _in_this_process(folder: Path) -> Iterator[tuple[Submit, int]]:
    def submit(name: str) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = Future()
        try:
            future.set_result(execute(folder / name))
        except Exception as error:
            future.set_exception(error)
        return future

    yield submit, 1


@contextmanager
def _in_processes(folder: Path, workers: int, shares: list[str], retries: int) -> Iterator[tuple[Submit, int]]:
    """One process a job. A stop signal is passed on and waited for, so that runs can save where they are."""
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for share in shares[:workers] if shares else [""] * workers:
        free.put(share)
    alive: set[subprocess.Popen[bytes]] = set()
    stopping = threading.Event()

    def attempt(name: str, share: str) -> int:
        environment = dict(os.environ)
        if share:
            environment["CUDA_VISIBLE_DEVICES"] = share
        else:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
        with open(folder / name / "log.txt", "ab") as log:
            command = [sys.executable, "-m", "lab_shared.sweep", str(folder / name)]
            # In a group of its own: a terminal sends Ctrl-C to the whole group of this process, and passed on below it
            # would be the second signal, which kills a run that is saving.
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, stdin=subprocess.DEVNULL, process_group=0
            )
            alive.add(process)
            if stopping.is_set():  # since the others were told
                process.terminate()
            code = process.wait()
            alive.discard(process)
        return code

    def work(name: str) -> dict[str, Any]:
        share = free.get()
        try:
            for _ in range(retries + 1):
                code = attempt(name, share)
                if code >= 0 or stopping.is_set():
                    break
        finally:
            free.put(share)
        if code != 0:
            last = _last_line(folder / name / "log.txt")
            how = f"killed by signal {signal.Signals(-code).name}; its last words: {last}" if code < 0 else last
            raise JobFailed(how)
        return execute(folder / name)  # done: this only reads the summary

    pool = ThreadPoolExecutor(workers)
    with _signals_as_exit():
        try:
            yield lambda name: pool.submit(work, name), workers
        finally:
            stopping.set()
            for process in list(alive):
                process.terminate()
            for process in list(alive):
                try:
                    process.wait(_SECONDS_TO_SAVE)
                except subprocess.TimeoutExpired:
                    process.kill()
            pool.shutdown(cancel_futures=True)


@contextmanager
def _on_ray(
    folder: Path, address: str | None, gpus_per_job: float, retries: int, n_jobs: int
) -> Iterator[tuple[Submit, int]]:
    # Its hook for `uv run` would copy the working folder and sync an environment for every worker.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if address is None:
        # Read when ray is imported. Without it a cluster of this machine alone listens on the network too.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    with needs("--engine ray"):
        import ray
    ours = not ray.is_initialized()
    if ours:
        dashboard = False if address is None else None
        # "local", as with None ray would join a cluster that runs here, or the one in RAY_ADDRESS.
        ray.init(address=address or "local", include_dashboard=dashboard, log_to_driver=False)
    most = max((node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if 0 < most < gpus_per_job:  # ray would wait for such a node for ever
        raise UserError(f"gpus_per_job={gpus_per_job:g}: no node of the cluster has more than {most:g} GPUs; lower it")
    gpus = gpus_per_job if most else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=retries)(_execute_named)
    try:
        yield lambda name: task.remote(str(folder), name).future(), n_jobs
    finally:
        if ours:
            ray.shutdown()


def _execute_named(folder: str, name: str) -> dict[str, Any]:
    return execute(Path(folder) / name)


def _gpu_shares(gpus_per_job: float) -> list[str]:
    """A value of CUDA_VISIBLE_DEVICES for each job that the GPUs of this machine hold at a time."""
    count = _gpu_count()
    visible = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d] or [str(i) for i in range(count)]
    visible = visible[:count]
    if gpus_per_job > 1:
        size = int(gpus_per_job)
        return [",".join(visible[i : i + size]) for i in range(0, len(visible) - size + 1, size)]
    # Round after round over the GPUs, so that two jobs share one only when each has one.
    return visible * math.floor(1 / gpus_per_job + 1e-9)


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "its process failed without a word"


@contextmanager
def _signals_as_exit() -> Iterator[None]:
    """SIGTERM and SIGHUP (unless ignored) end the program as an exception would, so that its jobs are stopped too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
