"""The only training loop: one step for any objective, and what a long run needs around it.

It knows no model, data, loss or evaluation, only callables; `Trainer.step` is the heart and everything else serves it.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minillm import checkpoint
from minillm.distributed.context import Context, peak_memory
from minillm.distributed.parallelize import parameter_names
from minillm.log import LOGGER, Clock, RunLog
from minillm.objectives import Objective
from minillm.optim import clip_grad_norm_, optimizer_tensors
from minillm.run import RunDirectory
from minillm.signals import stop_requests
from minillm.trainer.config import DTYPES, Loader, TrainConfig, completed


class Stopped(Exception):
    """A signal came during an evaluation, whose part is thrown away."""


class NonFiniteError(ValueError):
    """The loss or the gradient was not a finite number for too many steps in a row."""


@dataclass
class Progress:
    """What a run has done so far: with the tensors, all that a checkpoint has to hold."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    bad_steps_in_a_row: int = 0
    best_val_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    unevaluated: dict[str, Any] | None = None  # the row of a step whose evaluation a signal cut short


def dropout_seed(seed: int, step: int, micro_batch: int, dp_rank: int) -> int:
    """A 63-bit seed that differs wherever one of the four does: each is folded in by a multiply-xor round."""
    mixed = 0
    for value in (seed, step, micro_batch, dp_rank):
        mixed = (mixed ^ value + 1) * 0x9E3779B97F4A7C15 % 2**64  # 2**64 / golden ratio (Knuth, TAOCP 3, 6.4)
        mixed ^= mixed >> 29
    return mixed >> 1


class Trainer:
    """Trains a model on an objective: `fit` runs to the end, `step` does one optimizer step.

    Args:
        loader: gives this rank's micro-batches of a step. objective: see Objective.
        steps: where the run ends. lr_at: learning rate of the step of that index, from 0.
        evaluate: returns {"val_loss": ..., ...}, of which each val_ goes into the metrics; it is handed a function to
            call between batches, which raises where the run is to stop. run: where metrics and checkpoints go; None:
            nowhere.
        flops_per_token, peak_flops: what MFU is made of. identity: what a checkpoint must agree on to be resumed
            (tokenizer, data, seed, shape). config_dict: the resolved configuration, kept in each checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        loader: Loader,
        config: TrainConfig,
        *,
        steps: int,
        lr_at: Callable[[int], float],
        dist: Context,
        grad_clip: float | None = 1.0,
        seed: int = 0,
        evaluate: Callable[[Callable[[], None]], dict[str, float]] | None = None,
        run: RunDirectory | None = None,
        log_every: int = 1,
        flops_per_token: float = 0.0,
        peak_flops: float = 0.0,
        identity: dict[str, Any] | None = None,
        config_dict: dict[str, Any] | None = None,
    ):
        self.model, self.optimizer, self.objective, self.loader = model, optimizer, objective, loader
        self.config, self.steps, self.lr_at, self.dist = completed(config, steps, dist.device), steps, lr_at, dist
        self.grad_clip, self.seed, self.evaluate, self.run, self.log_every = grad_clip, seed, evaluate, run, log_every
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.identity, self.config_dict = identity or {}, config_dict or {}
        self.parameters = parameter_names(model)
        self.progress = Progress()
        self.stop_signal: str | None = None
        self.unsaved = False  # whether the weights have changed since they were last saved or loaded
        self.dtype = DTYPES[self.config.precision]
        self.scaler = torch.amp.GradScaler(dist.device.type, enabled=self.config.precision == "fp16")

    # --- one step -----------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, float]:
        """One optimizer step over the next samples; returns loss, lr and grad_norm.

        The gradient is that of the mean over all units of the global batch, however they fall into micro-batches and
        ranks. A step without units, or with a non-finite loss or gradient, leaves weights and moments untouched.
        """
        at, dist = self.progress, self.dist
        micro_batches = self.loader.batches(at.samples)
        n = dist.sum(sum(self.objective.count(batch) for batch in micro_batches))
        figures = {"loss": None, "lr": self.lr_at(at.step), "grad_norm": None}
        if not n:
            LOGGER.warning("step %d has no targets to train on; skipped", at.step + 1)
            self.advance(skipped=True)
            return figures

        losses, totals = [], {}
        for i, batch in enumerate(micro_batches):
            torch.manual_seed(dropout_seed(self.seed, at.step, i, dist.dp_rank))
            with self.autocast():
                loss_sum, metrics = self.objective(self.model, batch)
            self.scaler.scale(loss_sum * (dist.dp_size / n)).backward()
            losses.append(loss_sum.detach())
            for name, pair in metrics.items():
                totals.setdefault(name, []).append(torch.as_tensor(pair, dtype=torch.float64, device="cpu"))
        self.scaler.unscale_(self.optimizer)
        grad_norm = clip_grad_norm_(self.parameters.values(), self.grad_clip)
        figures["loss"] = float(dist.sum(torch.stack(losses).cpu().double().sum())) / n
        figures["grad_norm"] = float(grad_norm)
        for name, pairs in totals.items():
            total, count = dist.sum(torch.stack(pairs).sum(0)).tolist()
            figures[name] = total / count if count else None

        applied = math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"])
        if applied:
            for group in self.optimizer.param_groups:
                group["lr"] = figures["lr"] * group.get("lr_scale", 1.0)
            self.scaler.step(self.optimizer)
            self.unsaved = True
            at.bad_steps_in_a_row = 0
        else:
            self.report_skip(figures)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.advance(skipped=not applied)
        if at.bad_steps_in_a_row >= self.config.max_bad_steps:
            raise NonFiniteError(
                f"step {at.step}: loss {figures['loss']}, gradient norm {figures['grad_norm']}: not finite for "
                f"{at.bad_steps_in_a_row} steps in a row (train.max_bad_steps), at learning rate {figures['lr']:g}; "
                "the weights are those before them. Lower optim.lr or lengthen optim.warmup_steps"
            )
        return figures

    def advance(self, skipped: bool) -> None:
        """Count a step that is over."""
        at = self.progress
        at.step += 1
        at.samples += self.loader.samples_per_step
        at.tokens += self.loader.tokens_per_step
        at.skipped_steps += skipped

    def autocast(self) -> contextlib.AbstractContextManager:
        """Matrix products in the run's precision; everything is fp32 where that is fp32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.dist.device.type, self.dtype)

    def report_skip(self, figures: dict[str, float]) -> None:
        """Name what was not finite in a step that is not applied, and count the ones in a row."""
        step = self.progress.step + 1
        loss_is_finite = math.isfinite(figures["loss"])
        if self.scaler.is_enabled() and loss_is_finite and self.scaler.get_scale() > 1:
            LOGGER.info("step %d: fp16 overflow at loss scale %g; skipped", step, self.scaler.get_scale())
            return
        self.progress.bad_steps_in_a_row += 1
        bad = [name for name, p in self.parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
        where = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        what = f"the gradient is not finite in {where}" if loss_is_finite else f"the loss is {figures['loss']}"
        LOGGER.warning("step %d: %s; skipped", step, what)

    # --- a whole run --------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train to the end, to a signal, or to max_hours; evaluate, log and save on the way. Returns the summary.

        SIGTERM or Ctrl-C ends the step under way, saves, and returns; a second Ctrl-C interrupts at once. Each step
        that is saved has a row of metrics, so that between two rows all steps took equally many samples.
        """
        at, config = self.progress, self.config
        clock = Clock(at.tokens, self.flops_per_token, self.peak_flops)
        metrics = self.run.metrics if self.run and self.dist.is_main else None
        saved_at = at.step
        logged = at.unevaluated["step"] - 1 if at.unevaluated else at.step  # the row that is made up for comes again
        with stop_requests(self.request_stop), RunLog(metrics, logged, self.steps, show=self.dist.is_main) as log:
            if at.unevaluated:
                self.report(log, at.unevaluated, evaluate=True)
                log.advance()
                self.save_if_kept()
            while not self.over() and not self.stop_signal:
                try:
                    with clock.running():
                        figures = self.step()
                except NonFiniteError:
                    if self.unsaved:
                        figures = dict.fromkeys(("loss", "lr", "grad_norm"))
                        self.report(log, self.row(figures, clock), evaluate=False)
                        self.save_if_kept(keep_last=0)  # a run that diverges evicts nothing
                    raise
                at.seconds += clock.last
                log.advance()
                evaluate = self.evaluate is not None and (at.step % config.eval_every == 0 or self.over())
                save = self.unsaved and at.step % config.save_every == 0  # what is saved already evicts nothing
                if evaluate or save or at.step % self.log_every == 0 or self.over():
                    self.report(log, self.row(figures, clock), evaluate)
                if save:
                    self.save_if_kept()
                    saved_at = at.step
            if at.step != saved_at or at.unevaluated:
                if log.last.get("step") != at.step and not at.unevaluated:  # a signal came between two rows
                    self.report(log, self.row(figures, clock), evaluate=False)
                self.save_if_kept()
            return self.finish(at.unevaluated or log.last, clock)

    def row(self, figures: dict[str, float], clock: Clock) -> dict[str, Any]:
        """A row of metrics of the step that was made last."""
        at = self.progress
        row = {"step": at.step, "tokens": at.tokens, **figures, **clock.speed(at.tokens)}
        return row | {"time": round(at.seconds, 3)}

    def over(self) -> bool:
        """True at the last step, when the hours are over, and when patience is."""
        return self.limit() is not None

    def limit(self) -> str | None:
        """What has ended the run; None while nothing has."""
        at, hours, patience = self.progress, self.config.max_hours, self.config.patience
        if at.step >= self.steps:
            return "the end"
        if hours is not None and at.seconds >= hours * 3600:
            return "train.max_hours"
        return "train.patience" if patience is not None and at.evaluations_since_best >= patience else None

    def report(self, log: RunLog, row: dict[str, Any], evaluate: bool) -> None:
        """Write a row of metrics, evaluated where asked; one whose evaluation a signal cut short waits."""
        at = self.progress
        at.unevaluated = None
        if evaluate:
            try:
                with self.autocast():
                    figures = self.evaluate(self.raise_if_stopped)
            except Stopped:
                at.unevaluated = row
                return
            row = row | {key: value for key, value in figures.items() if key.startswith("val_")}
            best = math.inf if at.best_val_loss is None else at.best_val_loss
            at.evaluations_since_best += 1
            if math.isfinite(row["val_loss"]) and row["val_loss"] < best:
                at.best_val_loss, at.best_step, at.evaluations_since_best = row["val_loss"], at.step, 0
        log.write(row)

    def raise_if_stopped(self) -> None:
        """Raises Stopped once a signal came: for an evaluation to call now and then."""
        if self.stop_signal:
            raise Stopped

    def finish(self, row: dict[str, Any], clock: Clock) -> dict[str, Any]:
        """Write and return the summary of the run."""
        at = self.progress
        finished = self.over() and not at.unevaluated
        summary = {
            "finished": finished,
            "stopped_by": self.limit() if finished else self.stop_signal,
            **row,
            **{key: getattr(at, key) for key in ("step", "tokens", "best_val_loss", "best_step", "skipped_steps")},
            "hours": round(at.seconds / 3600, 4),
            "mean_tokens_per_second": round(clock.mean_rate(at.tokens), 1),
            "peak_memory_bytes": peak_memory(self.dist.device),
            "parameters": sum(parameter.numel() for parameter in self.parameters.values()),
        }
        if self.run and self.dist.is_main:
            self.run.write_json(self.run.summary, summary)
        return summary

    def request_stop(self, name: str) -> None:
        """Stop after the step under way, because of the signal of that name."""
        self.stop_signal = name
        LOGGER.info("%s: saving after this step", name)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the run by name: the parameters, and the optimizer's state of each."""
        return dict(self.parameters) | optimizer_tensors(self.optimizer, self.parameters)

    def save_if_kept(self, keep_last: int | None = None) -> None:
        """Commit a checkpoint where the run has a directory."""
        if self.run:
            self.save(keep_last)

    def save(self, keep_last: int | None = None) -> Path:
        """Commit a checkpoint of this step; returns its directory. `keep_last`: None as configured, 0 for all."""
        state = {
            "progress": vars(self.progress),
            "scaler": self.scaler.state_dict(),
            "config": self.config_dict,
            **self.identity,
        }
        keep_last = self.config.keep_last if keep_last is None else keep_last
        path = checkpoint.save(self.run.checkpoints, self.progress.step, self.tensors(), state, keep_last)
        self.unsaved = False
        return path

    def resume(self, path: str | Path) -> None:
        """Continue from a checkpoint. Raises ValueError when it is damaged or of another model, tokenizer or data."""
        state, _ = checkpoint.read(path)
        changed = [
            f"{name} was {state.get(name)}, is {value}"
            for name, value in self.identity.items()
            if state.get(name) != value
        ]
        if changed:
            raise ValueError(f"{path}: another run than the one to be continued: {'; '.join(changed)}")
        checkpoint.load_tensors(path, self.tensors())
        self.progress = Progress(**state["progress"] | {"bad_steps_in_a_row": 0})  # or one more would stop it again
        self.unsaved = False
        if self.scaler.is_enabled() and state["scaler"]:  # empty where the run was in another precision
            self.scaler.load_state_dict(state["scaler"])
