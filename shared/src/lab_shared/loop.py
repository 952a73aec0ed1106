"""The chores around a visible training loop.

    for tick in ticks(run, steps, model=model, optimizer=optimizer, lr=schedule, state={"data": batches}):
        batch = next(batches)
        loss, angle = ...
        tick.update(loss, ids=batch.index_E, n=batch.n_events, angle=angle)
        if tick.every(500):
            tick.log(angle=evaluate(model))
    run.finish(summary)

`update` is the optimiser step. What is due after the loop's body (checkpoint, stop) happens when the loop
comes round, so that a resumed run repeats neither the body nor the random numbers it drew, and is
bit-identical on the CPU.

On CUDA nothing waits for the device between two log points: losses, metrics and the finite check stay there.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lab_shared.checkpoint import checkpoint_files, save_weights
from lab_shared.dist import Dist
from lab_shared.errors import UserError
from lab_shared.meters import FiniteGuard, Meter
from lab_shared.optim import clip_grads, set_lr
from lab_shared.progress import format_metrics
from lab_shared.resume import LoopState, Stateful
from lab_shared.run import Run
from lab_shared.signals import Stopped, StopSignals


class NonFiniteLoss(UserError):
    """The loss, the gradient norm or a weight became NaN or infinite.

    step: the first such step. ids: what its batch was made of. checkpoint: the newest file, from before it.
    """

    def __init__(self, what: str, step: int, ids: list[Any], checkpoint: str | None) -> None:
        self.step, self.ids, self.checkpoint = step, ids, checkpoint
        shown = ", ".join(map(str, ids[:20])) + (f", ... ({len(ids)} in all)" if len(ids) > 20 else "")
        before = f"Go back to {checkpoint}" if checkpoint else "There is no checkpoint yet"
        super().__init__(
            f"{what} is not finite at step {step}, batch ids [{shown}]. {before}. "
            "Look at that batch, or start a new run with a lower learning rate."
        )


def ticks(
    run: Run,
    steps: int,
    *,
    model: nn.Module,
    optimizer: Optimizer,
    lr: Callable[[int], float] | None = None,
    clip: float | None = None,
    state: Mapping[str, Stateful] | None = None,
    unit: str = "items",
    log_every: int = 20,
    checkpoint_every: int = 500,
    keep: int = 2,
    dist: Dist | None = None,
) -> Iterator[Tick]:
    """One Tick for every optimiser step still to do, from the run's newest checkpoint (or the start).

    steps: optimiser steps of the whole run.
    model: on one device; may be wrapped by DDP or torch.compile.
    lr: number of finished steps -> factor on each group's base_lr; None leaves the rates alone.
    clip: limit of the gradient norm.
    state: name -> object whose position belongs to the run, such as the stream of batches.
    unit: what `n` of `Tick.update` counts, for the log.
    keep: how many checkpoints to keep.

    A checkpoint holds model, optimizer, `state` and the random generators (both per rank), metric sums and
    the step; at the end weights.safetensors holds the model. Leaving by break or an exception saves nothing.
    SIGINT or SIGTERM finishes the step, saves, prints the resume command and raises Stopped; a second one
    kills. With several ranks a signal to any counts, at the next log point (on the CPU at the next step).
    A run that is already complete yields no tick.

    Raises NonFiniteLoss (checked at every step on the CPU, at log points on CUDA, always before a checkpoint
    is written), StorageError when the disk refuses, CheckpointError when a checkpoint does not fit.
    """
    everies = {"steps": steps, "log_every": log_every, "checkpoint_every": checkpoint_every, "keep": keep}
    for name, value in everies.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    with StopSignals(announce=run.is_main) as signals:
        tick = Tick(run, steps, model, optimizer, lr, clip, state or {}, unit, log_every, dist or Dist(), signals)
        run.progress.start(tick.step, steps)
        try:
            while tick.step < steps:
                tick._begin()
                yield tick
                stop = tick._finish(save=tick.every(checkpoint_every), keep=keep)
                if stop:
                    run.progress.line(f"Stopped and saved at step {tick.step}. Go on with: {run.resume_command}")
                    raise Stopped(128 + stop)
        finally:
            run.progress.stop()
    if run.is_main:
        save_weights(run.path / "weights.safetensors", model)


class Tick:
    """The loop's current step and what its body can ask for. Made by `ticks`; one object for all steps.

    step: 1 for the first optimiser step. last: whether it is the last one.
    """

    def __init__(
        self,
        run: Run,
        steps: int,
        model: nn.Module,
        optimizer: Optimizer,
        lr: Callable[[int], float] | None,
        clip: float | None,
        state: Mapping[str, Stateful],
        unit: str,
        log_every: int,
        dist: Dist,
        signals: StopSignals,
    ) -> None:
        self._run, self._steps, self._model, self._optimizer = run, steps, model, optimizer
        self._lr, self._clip = lr, math.inf if clip is None else clip
        self._unit, self._log_every, self._dist, self._signals = unit, log_every, dist, signals
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._device = self._params[0].device
        self._meter, self._guard = Meter(self._device, dist), FiniteGuard(self._device, dist)
        self._state = LoopState(run, model, optimizer, {**state, "meter": self._meter}, self._device, dist)
        loop = self._state.restore() or {"step": 0, "best": math.inf}
        self.step: int = loop["step"]
        self._best: float = loop["best"]
        self._updated = self._stop_agreed = False
        self._rate_from = (self.step, time.monotonic())
        if self.step:
            run.progress.line(f"Resumed at step {self.step} of {steps}")

    @property
    def last(self) -> bool:
        return self.step == self._steps

    def every(self, k: int) -> bool:
        """True at every k-th step and at the last one."""
        return self.step % k == 0 or self.last

    def update(self, loss: Tensor, *, ids: Any = None, n: int | Tensor = 1, **metrics: Tensor | float) -> None:
        """The optimiser step: backward, clipping, step, zero_grad; and the books about it.

        loss: 0-d; with several ranks, its mean over them is the objective (dist.weighted_mean_loss).
        ids: what the batch was made of, array or list; kept until the next finite check: do not overwrite it.
        n: number of examples. metrics: 0-d means over those n.

        At log points: the loss as the mean over steps and ranks, metrics as means over examples, the gradient
        norm before clipping, the learning rate of the last parameter group, and the speed.

        Raises NonFiniteLoss, on the CPU before the weights are touched.
        """
        if self._updated:
            raise RuntimeError(f"tick.update was called twice in step {self.step}: it is one optimiser step")
        if loss.ndim:
            raise ValueError(f"tick.update takes one number, got shape {tuple(loss.shape)}: take the mean")
        self._updated = True
        loss.backward()
        norm = clip_grads(self._params, self._clip)
        self._book(loss.detach(), norm, ids, n, metrics)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self.every(self._log_every):
            self._log_training()

    def stepped(
        self, loss: Tensor, norm: Tensor, *, ids: Any = None, n: int | Tensor = 1, **metrics: Tensor | float
    ) -> None:
        """The books alone, about an optimiser step that the loop's body made itself (`lab_shared.graphs.StepGraph`).

        loss and norm (of the gradient, before clipping): 0-d. The rest as for `update`. Raises NonFiniteLoss, on the
        CPU too after the weights were touched.
        """
        if self._updated:
            raise RuntimeError(f"step {self.step} was reported twice: it is one optimiser step")
        self._updated = True
        self._book(loss, norm, ids, n, metrics)
        if self.every(self._log_every):
            self._log_training()

    def _book(self, loss: Tensor, norm: Tensor, ids: Any, n: int | Tensor, metrics: dict[str, Tensor | float]) -> None:
        self._meter.add(loss, norm, n, metrics)
        self._guard.watch(self.step, loss, norm, ids)
        if self._device.type == "cpu" or self.every(self._log_every):
            self._stop_agreed = self._check()

    def log(self, split: str = "val", **metrics: Any) -> None:
        """Record metrics of this step under `split` and print them; of several ranks, rank 0's count."""
        numbers = {name: float(value) for name, value in metrics.items()}
        self._run.log(self.step, split, numbers)
        self._run.progress.line(f"step {self.step}  {split}  {format_metrics(numbers)}")

    def keep_best(self, value: float) -> bool:
        """Save the model as best.safetensors if `value` is the lowest so far; whether it was.

        To be called on every rank, with the same value.
        """
        if not value < self._best or not self._weights_are_finite():
            return False
        self._best = value
        if self._run.is_main:
            save_weights(
                self._run.path / "best.safetensors",
                self._model,
                {"step": str(self.step), "value": repr(value)},
            )
        return True

    def _begin(self) -> None:
        self.step += 1
        self._updated = False
        if self._lr is not None:
            set_lr(self._optimizer, self._lr(self.step - 1))
        self._run.progress.advance(self.step)

    def _check(self) -> bool:
        """Raise if a step since the last check was not finite; whether a rank was told to stop.

        Waits for the device.
        """
        bad, stop = self._guard.agree(stop=self._signals.received is not None)
        if bad is not None:
            self._raise_non_finite(bad.what, bad.step, bad.ids)
        return stop

    def _raise_non_finite(self, what: str, step: int, ids: list[Any]) -> None:
        written = checkpoint_files(self._run.checkpoints)
        raise NonFiniteLoss(what, step, ids, str(written[-1]) if written else None)

    def _weights_are_finite(self) -> bool:
        largest = torch.nn.utils.get_total_norm([p.detach() for p in self._params], norm_type=math.inf)
        return bool(largest.isfinite())

    def _log_training(self) -> None:
        means, items_per_step = self._meter.means()  # waits for the device
        (before, since), self._rate_from = self._rate_from, (self.step, time.monotonic())
        rate = (self.step - before) / max(self._rate_from[1] - since, 1e-9)
        rates = {"it_per_s": rate, f"{self._unit}_per_s": rate * items_per_step}
        metrics = {**means, "lr": self._optimizer.param_groups[-1]["lr"], **rates}
        self._run.log(self.step, "train", metrics)
        self._run.progress.show(self.step, metrics)

    def _finish(self, *, save: bool, keep: int) -> int:
        """Checkpoint if due; the number of the stop signal if the run is to stop, otherwise 0."""
        if not self._updated:
            raise RuntimeError(f"the loop's body did not call tick.update in step {self.step}")
        # Alone, a signal needs no check that waits; ranks go by what they agreed on, or they would part ways.
        stop = self._stop_agreed if self._dist.world > 1 else self._signals.received is not None
        if stop or save:
            stop = self._check() or stop
            if not self._weights_are_finite():
                self._raise_non_finite("a weight", self.step, [])
            self._state.save({"step": self.step, "best": self._best}, keep)
        if not stop:
            return 0
        self._dist.barrier()  # a rank that left early would make torchrun kill rank 0 while it writes
        return self._signals.received or signal.SIGTERM
