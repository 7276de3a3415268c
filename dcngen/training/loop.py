"""The training loop: noise, U-Net, loss, AdamW, EMA. Between two logging steps nothing waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from dcngen.config import TrainConfig
from dcngen.models.compiled import compile_model
from dcngen.training.batches import LatentBatches
from dcngen.training.checkpoint import (
    Progress,
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from dcngen.training.ema import EMA
from dcngen.training.interrupt import StopRequest
from dcngen.training.logs import LoopClock, RunLog
from dcngen.training.schedule import learning_rate_factor, set_learning_rate


@dataclass
class TrainState:
    """What training changes, and a checkpoint holds.

    Attributes:
        unet: the bare model, fp32, on the device.
        ema: its average.
        optimizer: over the parameters of `unet`.
        progress: steps, images and seconds so far.
    """

    unet: torch.nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    progress: Progress


def resume(state: TrainState, checkpoint: Path) -> None:
    """Put `state` where a checkpoint left it.

    Raises:
        ValueError: another model, or another total batch (the order of the data is counted in batches).
    """
    restored = load_checkpoint(checkpoint, state.unet, state.ema, state.optimizer)
    if restored.total_batch_size != state.progress.total_batch_size:
        raise ValueError(
            f"{checkpoint} was trained with {restored.total_batch_size} pictures an optimizer step, now it would be "
            f"{state.progress.total_batch_size}; adjust train.train_batch_size or train.gradient_accumulation_steps to "
            f"the number of processes"
        )
    restored.num_processes = state.progress.num_processes
    state.progress = restored


class Interrupted(Exception):
    """The run was stopped by a signal; the message names the checkpoint it left."""


class Trainer:
    """Trains `state` from its step to config.train.max_train_steps.

    Args:
        accelerator: of this process.
        config: the run.
        state: from which step to continue.
        batches: the batch of any step.
        checkpoints: the folder of checkpoints.
        log: what is written down.
        sample: called with the step, on the main process, for the pictures on the way (not for the last ones).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainConfig,
        state: TrainState,
        batches: LatentBatches,
        checkpoints: Path,
        log: RunLog,
        sample: Callable[[int], None] | None = None,
    ):
        self.accelerator, self.config, self.state = accelerator, config, state
        self.batches, self.objective, self.checkpoints = batches, config.objective, checkpoints
        self.log, self.sample = log, sample
        self.model, self.optimizer = self._prepare()
        # One column a step since the last entry: loss and gradient norm, read together and rarely.
        self._window = torch.zeros(2, config.logging.logging_steps, device=accelerator.device)
        self._window_start = state.progress.step
        self._clock = LoopClock()
        self._logged_seconds = 0.0

    def _prepare(self):
        """Compiled, wrapped for several processes, and without accelerate's own autocast around the forward.

        That wrapper would be traced into the compiled graph and break it; the loop opens the autocast itself.
        """
        options, unet = self.config.train, self.state.unet
        if options.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        if options.compile:
            compile_model(unet, options.compile_mode)
        model, optimizer = self.accelerator.prepare(unet.train(), self.state.optimizer)
        self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        vars(unet).pop("forward", None)  # what unwrapping leaves: the class's own method, bound to the instance
        return model, optimizer

    def fit(self) -> None:
        """Run to the end.

        Raises:
            FloatingPointError: loss or gradient were not finite; nothing was saved since.
            Interrupted: after a signal; a checkpoint was saved.
        """
        config, progress = self.config, self.state.progress
        total, done = config.train.max_train_steps, self.state.progress.step
        with ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            shown = self.accelerator.is_main_process
            bar = stack.enter_context(
                tqdm(initial=done, total=total, unit="step", desc=config.name, disable=not shown, dynamic_ncols=True)
            )
            self._clock, base_seconds = LoopClock(), progress.train_seconds
            self._logged_seconds = 0.0
            while progress.step < total:
                self._step(progress.step)
                progress.step += 1
                progress.num_images_seen += progress.total_batch_size
                bar.update()
                last, step = progress.step == total, progress.step
                logging = last or step % config.logging.logging_steps == 0
                stopping = self._agree_to_stop(stop, logging)
                progress.train_seconds = base_seconds + self._clock.seconds()
                if logging:
                    self._log(bar, progress, base_seconds)
                if last or stopping or _due(step, config.checkpoint.checkpointing_steps):
                    self._save()
                if not (stopping or last) and _due(step, config.sampling.sample_steps):
                    self._sample(step)
                if stopping and not last:
                    raise Interrupted(
                        f"stopped at step {step} of {total}; the checkpoint {checkpoint_path(self.checkpoints, step)} "
                        f"is complete, and the same command with --resume continues"
                    )

    def _step(self, step: int) -> None:
        """One optimizer step: forward and backward over the accumulated batches, clip, AdamW, EMA."""
        options, schedule = self.config.train, self.config.schedule
        factor = learning_rate_factor(step, schedule.lr_scheduler, schedule.lr_warmup_steps, options.max_train_steps)
        set_learning_rate(self.optimizer, self.config.optimizer.learning_rate * factor)
        if self.config.model.dropout:
            self.batches.seed_dropout(step)
        column = self._window[:, step % self._window.shape[1]]
        column.zero_()
        for micro_step in range(options.gradient_accumulation_steps):
            with self.accelerator.accumulate(self.model):
                loss = self._loss(step, micro_step)
                self.accelerator.backward(loss)
                column[0] += loss.detach() / options.gradient_accumulation_steps
                if self.accelerator.sync_gradients:
                    column[1] = self._clip_gradients(options.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        self.state.ema.update(self.state.unet, step)

    def _loss(self, step: int, micro_step: int) -> torch.Tensor:
        """Mean weighted squared error of one batch (Ho et al. 2020, algorithm 1), a scalar."""
        batch = self.batches(step, micro_step)
        noisy = self.objective.add_noise(batch.latents, batch.noise, batch.timesteps)
        if self.config.train.compile:
            torch.compiler.cudagraph_mark_step_begin()
        with self.accelerator.autocast():
            prediction = self.model(noisy, batch.timesteps, class_labels=batch.labels, return_dict=False)[0]
        return self.objective.loss(prediction, batch.latents, batch.noise, batch.timesteps).mean()

    def _clip_gradients(self, max_norm: float) -> torch.Tensor:
        """Clip to `max_norm` (0: do not) and return the norm before, without waiting for it."""
        return self.accelerator.clip_grad_norm_(self.state.unet.parameters(), max_norm or float("inf"))

    def _read_window(self, step: int) -> torch.Tensor:
        """Losses and gradient norms (2, n) of the steps since the last entry, averaged over processes.

        Raises:
            FloatingPointError: one of them is not finite.
        """
        size = self._window.shape[1]
        columns = [i % size for i in range(max(self._window_start, step - size), step)]
        values = self.accelerator.reduce(self._window, reduction="mean").cpu()[:, columns]
        bad = (~torch.isfinite(values)).any(dim=0).nonzero()
        if len(bad):
            first = int(bad[0])
            good = latest_checkpoint(self.checkpoints)
            where = f"the last good checkpoint is {good}" if good else "no checkpoint was saved before"
            raise FloatingPointError(
                f"loss {values[0, first]:g}, gradient norm {values[1, first]:g} at step "
                f"{step - len(columns) + first + 1}: training diverged and was stopped; {where}. Lower "
                f"optimizer.learning_rate (now {self.config.optimizer.learning_rate:g}) or lengthen "
                f"schedule.lr_warmup_steps, then start again"
            )
        return values

    def _log(self, bar: tqdm, progress: Progress, base_seconds: float) -> None:
        values = self._read_window(progress.step)
        # The read waited for the device: only now the clock holds all the work of these steps.
        progress.train_seconds = base_seconds + self._clock.seconds()
        seconds, steps = self._clock.seconds() - self._logged_seconds, values.shape[1]
        self._logged_seconds, self._window_start = self._clock.seconds(), progress.step
        entry = {
            "step": progress.step,
            "num_images_seen": progress.num_images_seen,
            "loss": round(values[0].mean().item(), 6),
            "gradient_norm": round(values[1].mean().item(), 6),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "ema_decay": self.state.ema.decay_at(progress.step - 1),
            "images_per_second": round(steps * progress.total_batch_size / seconds, 2),
            "train_seconds": round(progress.train_seconds, 3),
        }
        bar.set_postfix(loss=f"{entry['loss']:.4f}", images=f"{entry['images_per_second']:,.0f}/s")
        self.log.write(entry)

    def _save(self) -> None:
        self._read_window(self.state.progress.step)  # never save what diverged
        with self._clock.pause():
            if self.accelerator.is_main_process:
                keep = self.config.checkpoint.checkpoints_total_limit
                state = self.state
                save_checkpoint(self.checkpoints, state.unet, state.ema, state.optimizer, state.progress, keep)
            self.accelerator.wait_for_everyone()

    def _sample(self, step: int) -> None:
        self._read_window(step)
        with self._clock.pause():
            if self.accelerator.is_main_process and self.sample is not None:
                self.sample(step)
            self.accelerator.wait_for_everyone()

    def _agree_to_stop(self, stop: StopRequest, logging: bool) -> bool:
        """Whether a signal came; several processes must stop at one step, so they ask each other at logging steps."""
        if self.accelerator.num_processes == 1:
            return stop.requested
        if not logging:
            return False
        asked = torch.tensor(float(stop.requested), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, reduction="sum").item())


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
