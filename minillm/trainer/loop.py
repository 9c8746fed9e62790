"""The only training loop: one step for any objective, and what a long run needs around it.

It knows no model, data, loss or evaluation, only callables; `Trainer.step` is the heart and everything else serves it.
"""

import math
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minillm import checkpoint
from minillm.distributed.context import Context
from minillm.distributed.device import peak_memory
from minillm.log import LOGGER, Clock, RunLog, Tracker, memory_explained
from minillm.objectives import Objective
from minillm.optim import clip_grad_norm_, gradient_norms, optimizer_tensors, unscale_
from minillm.run import RunDirectory
from minillm.signals import stop_requests
from minillm.tensors import parameter_names
from minillm.trainer.config import DTYPES, Loader, TrainConfig, completed
from minillm.trainer.norms import norms_noted
from minillm.trainer.progress import NonFiniteError, Progress, Stopped
from minillm.trainer.spikes import SpikeWatch
from minillm.trainer.step import accumulate_gradients, mean_figures, of_this_step, report_non_finite
from minillm.trainer.waiting import LoaderWatch

SUMMED_UP = ("step", "tokens", "best_val_loss", "best_step", "skipped_steps", "spikes")


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
        trackers: who is told the rows too. norms_every: steps between rows of norms.jsonl. documents: names the text of
            the step whose first sample is given, for reports. memory_advice: what to say where memory is wanting.
        base_path: where all that is not trained is from; checkpoints then name it, and hold what is trained alone.
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
        trackers: Sequence[Tracker] = (),
        norms_every: int | None = None,
        documents: Callable[[int], list[str]] | None = None,
        memory_advice: Callable[[], str] | None = None,
        base_path: str | None = None,
    ):
        self.model, self.optimizer, self.objective, self.loader = model, optimizer, objective, loader
        self.config, self.steps, self.lr_at, self.dist = completed(config, steps, dist.device), steps, lr_at, dist
        self.grad_clip, self.seed, self.evaluate, self.run, self.log_every = grad_clip, seed, evaluate, run, log_every
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.identity, self.config_dict = identity or {}, config_dict or {}
        self.trackers, self.norms_every = trackers, norms_every
        self.memory_advice = memory_advice
        self.parameters = {name: p for name, p in parameter_names(model).items() if p.requires_grad}
        self.base_path = base_path
        self.progress, self.clock = Progress(), Clock()
        self.spike_watch = SpikeWatch(config.spike, config.spike_threshold, list(self.parameters), documents)
        self.notes: list[tuple[str, dict[str, Any]]] = []  # what the last step adds to other files than metrics.jsonl
        self.asked_to_stop: str | None = None  # the signal that came to this rank
        self.stop_signal: str | None = None  # that which came to some rank, as all have agreed
        self.saver = checkpoint.Saver(dist, background=self.config.async_save)
        self.unsaved = False  # whether the weights have changed since they were last saved or loaded
        self.dtype = DTYPES[self.config.precision]
        self.scaler = torch.amp.GradScaler(dist.device.type, enabled=self.config.precision == "fp16")

    # --- one step -----------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, float]:
        """One optimizer step over the next samples; returns loss, lr and grad_norm.

        The gradient is that of the mean over all units of the global batch, however they fall into micro-batches and
        ranks. A step without units, or with a non-finite loss or gradient, or a spike that is to be skipped, leaves
        weights and moments untouched.
        """
        at, dist, self.notes = self.progress, self.dist, []
        place = f"step {at.step + 1}"
        dist.at(f"{place}: reading batches")
        with self.clock.waiting():
            micro_batches = self.loader.batches(at.samples)
        n = dist.sum(sum(self.objective.count(batch) for batch in micro_batches))  # no device is waited for
        figures = {"loss": None, "lr": self.lr_at(at.step), "grad_norm": None}
        if not n:
            LOGGER.warning("step %d has no targets to train on; skipped", at.step + 1)
            self.advance(skipped=True)
            return figures

        objective = of_this_step(self.objective, self.model, micro_batches, self.autocast, dist, at.step)
        losses, metrics = accumulate_gradients(
            self.model, objective, micro_batches, n, self.autocast, self.scaler, dist, self.seed, at.step
        )
        dist.at(f"{place}: update")
        unscale_(self.scaler, self.optimizer)
        each_norm = gradient_norms(self.parameters.values())
        figures["grad_norm"] = float(clip_grad_norm_(self.parameters.values(), self.grad_clip, each_norm))
        figures |= mean_figures(losses, metrics, n, dist)

        finite = not dist.any(not (math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"])))
        if finite:
            at.bad_steps_in_a_row = 0
        elif report_non_finite(at.step + 1, figures, dict(zip(self.parameters, each_norm.tolist())), self.scaler):
            at.bad_steps_in_a_row += 1
        spike = self.spike_watch.look(at.step + 1, at.samples, figures, each_norm) if finite else None
        if spike:
            at.spikes += 1
            self.notes.append(("spikes", spike))
        applied = finite and (spike is None or spike["applied"])
        if applied:
            for group in self.optimizer.param_groups:
                group["lr"] = figures["lr"] * group.get("lr_scale", 1.0)
            asked = self.norms_every is not None and (at.step + 1) % self.norms_every == 0
            with norms_noted(self.notes, at.step + 1, self.parameters, each_norm) if asked else nullcontext():
                self.scaler.step(self.optimizer)
            self.unsaved = True
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

    def autocast(self) -> AbstractContextManager:
        """Matrix products in the run's precision; everything is fp32 where that is fp32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.dist.device.type, self.dtype)

    # --- a whole run --------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train to the end, to a signal, or to max_hours; evaluate, log and save on the way. Returns the summary.

        SIGTERM or Ctrl-C ends the step under way, saves, and returns; a second Ctrl-C interrupts at once. Each step
        that is saved has a row of metrics, so that between two rows all steps took equally many samples.
        """
        at, config = self.progress, self.config
        clock = self.clock = Clock(at.tokens, self.flops_per_token, self.peak_flops)
        loader_watch = LoaderWatch(self.loader)
        metrics = self.run.metrics if self.run and self.dist.is_main else None
        saved_at = at.step
        logged = at.unevaluated["step"] - 1 if at.unevaluated else at.step  # the row that is made up for comes again
        trackers, show = (self.trackers, True) if self.dist.is_main else ((), False)
        with (
            stop_requests(self.request_stop),
            memory_explained(self.memory_advice),
            RunLog(metrics, logged, self.steps, show, trackers) as log,
            self.saver,
        ):
            self.agree()
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
                    self.saver.wait()
                    raise
                at.seconds += clock.last
                self.agree()
                self.saver.poll()
                log.advance()
                for name, note in self.notes:
                    log.note(name, note)
                loader_watch.look(clock, at.step)
                evaluate = self.evaluate is not None and (at.step % config.eval_every == 0 or self.over())
                save = self.unsaved and at.step % config.save_every == 0  # what is saved already evicts nothing
                if evaluate or save or at.step % self.log_every == 0 or self.over():
                    self.report(log, self.row(figures, clock), evaluate)
                if save or (self.unsaved and at.step == self.best_step):
                    self.save_if_kept()
                    saved_at = at.step
            if at.step != saved_at or at.unevaluated:
                if log.last.get("step") != at.step and not at.unevaluated:  # a signal came between two rows
                    self.report(log, self.row(figures, clock), evaluate=False)
                self.save_if_kept()
            self.saver.wait()
            return self.finish(at.unevaluated or log.last, clock)

    def row(self, figures: dict[str, float], clock: Clock) -> dict[str, Any]:
        """A row of metrics of the step that was made last."""
        at = self.progress
        row = {"step": at.step, "tokens": at.tokens, **figures, **clock.speed(at.tokens)}
        return row | {"time": round(at.seconds, 3)}

    def over(self) -> bool:
        """True at the last step, when the hours are over, and when patience is."""
        return self.limit() is not None

    @property
    def best_step(self) -> int | None:
        """The step that patience waits for a better one than, and whose checkpoint is therefore kept."""
        return None if self.config.patience is None else self.progress.best_step

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

    def agree(self) -> None:
        """Let all ranks know what is known to one: that a signal came, and how long the slowest took and its loader.

        Each calls it at the same place.
        """
        number = float(signal.Signals[self.asked_to_stop]) if self.asked_to_stop else 0.0
        known = torch.tensor([number, self.progress.seconds, self.clock.waited], dtype=torch.float64)
        number, self.progress.seconds, self.clock.waited = self.dist.max(known).tolist()
        self.stop_signal = signal.Signals(int(number)).name if number else None

    def raise_if_stopped(self) -> None:
        """Raises Stopped once a signal came: for an evaluation to call now and then, on each rank equally often."""
        self.dist.at(f"step {self.progress.step}: evaluation")
        self.agree()
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
            **{key: getattr(at, key) for key in SUMMED_UP},
            "hours": round(at.seconds / 3600, 4),
            "mean_tokens_per_second": round(clock.mean_rate(at.tokens), 1),
            "peak_memory_bytes": self.dist.max(peak_memory(self.dist.device)),
            "parameters": sum(parameter.numel() for parameter in parameter_names(self.model).values()),
            "trained_parameters": sum(parameter.numel() for parameter in self.parameters.values()),
        }
        if self.run and self.dist.is_main:
            self.run.write_json(self.run.summary, summary)
        return summary

    def request_stop(self, name: str) -> None:
        """Stop after the step under way, because of the signal of that name."""
        self.asked_to_stop = name
        LOGGER.info("%s: saving after this step", name)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds, by name: the parameters that no base has, and the optimizer's state."""
        parameters = self.parameters if self.base_path else parameter_names(self.model)
        return dict(parameters) | optimizer_tensors(self.optimizer, self.parameters)

    def save_if_kept(self, keep_last: int | None = None) -> None:
        """Commit a checkpoint where the run has a directory."""
        if self.run:
            self.save(keep_last)

    def save(self, keep_last: int | None = None) -> Path:
        """Commit a checkpoint of this step, or begin to (`train.async_save`; `saver.wait()` ends it).

        Returns: its directory. `keep_last`: None as configured, 0 for all.
        """
        state = {
            "progress": vars(self.progress),
            "scaler": self.scaler.state_dict(),
            "spike_watch": self.spike_watch.state(),
            "config": self.config_dict,
            "base_path": self.base_path,
            **self.identity,
        }
        keep_last = self.config.keep_last if keep_last is None else keep_last
        at, tensors = self.progress.step, self.tensors()
        self.dist.at(f"step {at}: saving", checkpoint.PATIENCE)
        path = self.saver.save(self.run.checkpoints, at, tensors, state, keep_last, self.best_step)
        self.unsaved = False
        return path

    def resume(self, path: str | Path, hashed: bool = False) -> None:
        """Continue from a checkpoint. Raises ValueError when it is damaged or of another model, tokenizer or data.

        `hashed`: these ranks have verified it before, so that its files need not be read twice.
        """
        self.dist.at("resuming", checkpoint.PATIENCE)
        state, _ = checkpoint.read(path)
        changed = [
            f"{name} was {state.get(name)}, is {value}"
            for name, value in self.identity.items()
            if state.get(name) != value
        ]
        if changed:
            raise ValueError(f"{path}: another run than the one to be continued: {'; '.join(changed)}")
        checkpoint.load_tensors(path, self.tensors(), dist=self.saver.dist, hashed=hashed)
        self.progress = Progress(**state["progress"] | {"bad_steps_in_a_row": 0})  # or one more would stop it again
        if "spike_watch" in state:
            self.spike_watch.load(state["spike_watch"])
        self.unsaved = False
        if self.scaler.is_enabled() and state["scaler"]:  # empty where the run was in another precision
            self.scaler.load_state_dict(state["scaler"])
