"""A run's folder: what was asked, what it stood on, what came out, and one lock.

config.json       the configuration, strict (lab_shared.config)
manifest.json     commit, lock file, versions, device, seed, command; one more entry for every resume
dirty.diff        uncommitted changes, unless too large (later dirty.resume1.diff, ...)
metrics.jsonl     one JSON object a line: step, time (seconds of training), split, metrics; the record
checkpoints/      exact resume states (lab_shared.checkpoint)
weights.safetensors, best.safetensors     the model alone, for sharing
figures/          for reports
wandb/            the mirror of metrics.jsonl, if there is one
DONE.json         the summary; written last, so its presence means the run is complete
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import time
import uuid
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

from lab_shared.config import read_config, to_json
from lab_shared.dist import Dist, elastic_job
from lab_shared.errors import UserError
from lab_shared.files import atomic_write, json_text, make_folder, storage_error
from lab_shared.progress import Progress
from lab_shared.run_folder import RunError, closed_on_error, lock_folder, on_rank_0, read_manifest, record_session
from lab_shared.wandb_mirror import WandbMode, start_mirror

T = TypeVar("T")


def refuse_taken(path: Path, resume_command: str) -> None:
    """Raise RunError for a folder that holds a run, or the beginnings of one. resume_command: as for `Run.create`."""
    if taken := [name for name in ("config.json", "metrics.jsonl", "checkpoints") if (path / name).exists()]:
        command = resume_command.format(path=shlex.quote(str(path)))
        raise RunError(f"{path} already holds a run ({taken[0]}): go on with `{command}` or choose another")


class Run:
    """One training run and its folder, locked against a second run; a context manager.

    Only rank 0 touches the disk and the console; on other ranks the methods are there and do nothing visible.

    path: the folder. seed: as given to `create`. is_main: whether this is rank 0. progress: the console.
    """

    def __init__(self, path: Path, lock: int | None) -> None:
        """Use `create` or `open`. lock: the folder's, None on ranks above 0."""
        self.path = path
        facts = read_manifest(path)
        self.seed: int = facts["seed"]
        self.is_main = lock is not None
        self.progress = Progress(enabled=self.is_main)
        self._resume_command: str = facts["resume_command"]
        self._lock = lock
        self._elapsed_before = 0.0
        self._started = time.monotonic()
        self._metrics: FileIO | None = None
        self._wandb: Any = None
        if self.is_main:
            for leftover in [*path.glob(".*.tmp"), *path.glob("checkpoints/.*.tmp")]:
                leftover.unlink()  # a crash while writing; the lock says nobody is writing now
            make_folder(path / "figures")
            self._metrics = _open_for_appending(path / "metrics.jsonl")
            self._wandb = start_mirror(path, facts, self.progress)

    @classmethod
    def create(
        cls,
        out: str | Path,
        config: Any,
        *,
        seed: int,
        project: str,
        resume_command: str,
        wandb: WandbMode = "offline",
        dist: Dist | None = None,
        go_on: bool | None = None,
    ) -> Run:
        """Start a run in the folder `out` (made if absent; with several ranks, rank 0's `out` counts).

        config: a frozen dataclass, see lab_shared.config.to_json. resume_command: with "{path}" for the
        folder, for example "uv run iceaggr train --resume {path}". wandb: the mirror; the record is
        metrics.jsonl. go_on: open a run of the same configuration that is there already; by default in a torchrun job
        that starts dead processes again.

        Raises RunError when the folder already holds a run or another process is in it, StorageError when it
        cannot be written, ConfigError for a config that does not fit its own types.
        """
        facts = {
            "project": project,
            "seed": seed,
            "wandb": wandb,
            "wandb_id": uuid.uuid4().hex[:8],
            "resume_command": resume_command,
        }

        def start(path: Path) -> int:
            text = to_json(config)
            begun = path / "config.json"
            if (elastic_job() is not None if go_on is None else go_on) and begun.is_file():
                if begun.read_text(encoding="utf-8") != text:
                    raise RunError(f"{path} holds a run of another configuration: choose another folder")
                return _open_folder(path, dist)
            make_folder(path)
            with closed_on_error(lock_folder(path)) as lock:
                refuse_taken(path, resume_command)
                session = record_session(path, seed, dist, "dirty.diff")
                atomic_write(path / "manifest.json", json_text({**facts, **session, "resumes": []}, indent=2) + "\n")
                atomic_write(path / "config.json", text)  # last: with it the folder is a run
                return lock

        return cls(*on_rank_0(start, Path(out), dist))

    @classmethod
    def open(cls, path: str | Path, *, dist: Dist | None = None) -> Run:
        """Go on with the run in the folder `path`; `ticks` then starts from its newest checkpoint.

        Raises RunError when there is no run or another process is in it, StorageError when it cannot be
        written.
        """

        return cls(*on_rank_0(lambda folder: _open_folder(folder, dist), Path(path), dist))

    def config(self, cls: type[T]) -> T:
        """The configuration the run was created with, as the dataclass `cls`. Raises ConfigError."""
        return read_config(cls, self.path / "config.json")

    @property
    def checkpoints(self) -> Path:
        """The folder of the resume states."""
        return self.path / "checkpoints"

    @property
    def resume_command(self) -> str:
        """The shell command that goes on with this run."""
        return self._resume_command.replace("{path}", shlex.quote(str(self.path)))

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, those before the checkpoint it resumed from included."""
        return self._elapsed_before + time.monotonic() - self._started

    def log(self, step: int, split: str, metrics: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, and mirror it. Values that are not finite become null.

        Raises StorageError naming the resume command when the disk refuses.
        """
        if self._metrics is None:
            return
        record = {"step": step, "time": round(self.elapsed, 3), "split": split, **metrics}
        line = (json_text(record) + "\n").encode()
        try:
            if self._metrics.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self.add_way_back(storage_error(self.path / "metrics.jsonl", error)) from error
        if self._wandb is not None:
            try:
                self._wandb.log({f"{split}/{name}": value for name, value in metrics.items()}, step=step)
            except Exception as error:  # a mirror must not stop the run, whatever breaks in it
                self.progress.line(f"wandb failed ({error}): from step {step} on metrics.jsonl is the only record")
                self._wandb = None

    def add_way_back(self, error: UserError) -> UserError:
        """The same error with the command that goes on once the cause is gone."""
        return type(error)(f"{error} Then go on with: {self.resume_command}")

    def rewind(self, step: int, elapsed: float = 0.0) -> None:
        """Forget what metrics.jsonl says about steps after `step`: they are about to happen again."""
        self._elapsed_before, self._started = elapsed, time.monotonic()
        if self._metrics is None:
            return
        self._metrics.close()
        file = self.path / "metrics.jsonl"
        lines = file.read_text(errors="replace").splitlines()
        kept = [line for line in lines if (record := _parse(line)) is not None and record["step"] <= step]
        atomic_write(file, "".join(line + "\n" for line in kept))
        self._metrics = _open_for_appending(file)

    def sync(self) -> None:
        """Make the metrics written so far survive a power cut; for a checkpoint that stands on them."""
        if self._metrics is None:
            return
        try:
            os.fsync(self._metrics.fileno())
        except OSError as error:
            raise self.add_way_back(storage_error(self.path / "metrics.jsonl", error)) from error

    def finish(self, summary: dict[str, Any]) -> None:
        """Write DONE.json and close the run."""
        if self.is_main:
            done = {
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                "elapsed_s": round(self.elapsed, 3),
            }
            atomic_write(self.path / "DONE.json", json_text({**done, "summary": summary}, indent=2) + "\n")
        self.close()

    def close(self) -> None:
        """Give up the lock, the console and the mirror. Safe to call twice."""
        self.progress.stop()
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:  # as in `log`
                self.progress.line(f"wandb did not finish ({error}): metrics.jsonl is the record")
            self._wandb = None
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def default_folder(root: str | Path, name: str, seed: int) -> Path:
    """ROOT/NAME-seedSEED-TIME; in a torchrun job that starts dead processes again, with the job's name for the time."""
    job = elastic_job()
    return Path(root) / f"{name}-seed{seed}-{time.strftime('%Y%m%d-%H%M%S') if job is None else job[:15]}"


def read_metrics(path: str | Path, split: str | None = None) -> list[dict[str, Any]]:
    """The records in a run's metrics.jsonl, of one split if named, without a line cut short by a crash."""
    lines = (Path(path) / "metrics.jsonl").read_text(errors="replace").splitlines()
    records = [record for line in lines if (record := _parse(line)) is not None]
    return [record for record in records if split in (None, record["split"])]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int and "split" in record else None


def _open_folder(path: Path, dist: Dist | None) -> int:
    """Lock the run in `path` and note in its manifest that it goes on; the lock."""
    if not (path / "config.json").is_file() or not (path / "manifest.json").is_file():
        raise RunError(f"{path} holds no run (no config.json with a manifest.json): check the path")
    with closed_on_error(lock_folder(path)) as lock:
        facts = read_manifest(path)
        diff_name = f"dirty.resume{len(facts['resumes']) + 1}.diff"
        facts["resumes"].append(record_session(path, facts["seed"], dist, diff_name))
        atomic_write(path / "manifest.json", json_text(facts, indent=2) + "\n")
        return lock


def _open_for_appending(path: Path) -> FileIO:
    try:
        return FileIO(path, "a")
    except OSError as error:
        raise storage_error(path, error) from error
