"""Sampling a plan to a folder: shared between processes, resumable, and the same pictures however it is shared."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Lock
from typing import Any

import diffusers
import torch
from tqdm.auto import tqdm

import dcngen
from dcngen.data.files import exclusive
from dcngen.diffusion.digests import pipeline_digest
from dcngen.diffusion.folder import SampleFolder
from dcngen.diffusion.pipeline import LatentDiffusionPipeline
from dcngen.diffusion.plan import SamplePlan
from dcngen.diffusion.schedulers import make_scheduler, model_evaluations

_AUTOCAST_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def default_batch_size(device: torch.device) -> int:
    """Pictures a batch when nobody says: few on a CPU, where each core works on a batch of its own."""
    return 8 if device.type == "cpu" else 64


def sample_images(
    pipeline: LatentDiffusionPipeline,
    plan: SamplePlan,
    out_dir: str | Path,
    *,
    batch_size: int | None = None,
    accelerator: Any | None = None,
    save_png: bool = True,
    save_npz: bool = False,
    progress: bool = True,
) -> Path:
    """Sample `plan` into `out_dir`: 000000.png, 000001.png, ..., grid.png, plan.json and, if asked, samples.npz.

    The plan is cut into batches of fixed content (pictures 0 to B - 1, B to 2B - 1, ...) and each process takes whole
    batches. So a picture is computed among the same neighbours whatever the number of processes,
    and comes out the same to the last bit (on a CPU thanks to `_generate`). Another batch size, device or library
    version changes last bits of the arithmetic, and with them a few grey levels by one.
    Called again after an interruption, it draws only what is missing; called by two commands at once, the second waits.

    Args:
        pipeline: on its device. Its scheduler says what the model predicts; the plan chooses the sampler.
        out_dir: a new or empty folder, or that of an earlier call with this plan and model.
        batch_size: pictures a batch (guidance doubles it inside the U-Net); default `default_batch_size`.
        accelerator: an `accelerate.Accelerator` or `PartialState` when several processes share the work, all of them
            calling this; None: this process does all of it.
        save_png, save_npz: what to keep; at least one.
        progress: show a bar.

    Returns:
        The folder, complete when the call returns.

    Raises:
        ValueError: the folder holds pictures of another plan or model, or the plan does not fit the model.
    """
    if not (save_png or save_npz):
        raise ValueError("expected save_png or save_npz, got neither; nothing would be kept")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size expected at least 1, got {batch_size}")
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    wait = accelerator.wait_for_everyone if accelerator is not None else lambda: None
    pipeline = LatentDiffusionPipeline(pipeline.unet, pipeline.vae, make_scheduler(plan.sampler, pipeline.scheduler))
    labels = plan.labels(pipeline.num_classes)
    batch_size = min(batch_size or default_batch_size(pipeline.device), plan.num_images)
    batches = [range(i, min(i + batch_size, plan.num_images)) for i in range(0, plan.num_images, batch_size)]
    folder = SampleFolder(Path(out_dir), batches, save_png, labels)
    record = _record(pipeline, plan, batch_size, world)

    folder.refuse_mix(record)
    notice = f"another command samples into {folder.path}; waiting for it" if progress else None
    # Two commands may want the same pictures, as comparisons that share a run do: the second finds them done.
    with exclusive(folder.path, notice) if rank == 0 else nullcontext():
        wait()
        folder.refuse_mix(record)
        missing = [batch for batch in batches if not folder.holds(batch)]
        wait()  # every process has looked before the first one writes
        started = time.perf_counter()
        if rank == 0 and missing:
            folder.write_record(record)
        _draw_and_write(pipeline, plan, folder, missing[rank::world], batch_size, progress and rank == 0)
        wait()
        if rank == 0:
            folder.assemble(save_npz)
            if missing or not folder.read_record()["complete"]:
                drawn = {"num_drawn": sum(map(len, missing)), "seconds": round(time.perf_counter() - started, 3)}
                folder.write_record(record | {"complete": True} | drawn)
    wait()
    return folder.path


def _record(pipeline: LatentDiffusionPipeline, plan: SamplePlan, batch_size: int, num_processes: int) -> dict[str, Any]:
    """What plan.json says: the plan, whose pictures they are, and how they were computed."""
    return {
        "complete": False,
        "plan": plan.to_dict(),
        "plan_digest": plan.digest(),
        "model_digest": pipeline_digest(pipeline),
        "model_evaluations_per_image": model_evaluations(plan.sampler, plan.steps) * (1 + (plan.guidance_scale != 1.0)),
        "batch_size": batch_size,
        "num_processes": num_processes,
        "device": pipeline.device.type,
        "versions": {"dcngen": dcngen.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    }


def _draw_and_write(
    pipeline: LatentDiffusionPipeline,
    plan: SamplePlan,
    folder: SampleFolder,
    batches: list[range],
    batch_size: int,
    progress: bool,
) -> None:
    pending: list[Future] = []
    evaluations = model_evaluations(plan.sampler, plan.steps)
    with (
        _progress_bar(sum(map(len, batches)), evaluations, progress) as bar,
        ThreadPoolExecutor(max_workers=4) as writers,
        _ready_to_sample(pipeline),
    ):
        for batch, images in _generate(pipeline, plan, folder.labels, batches, batch_size, bar):
            for write in pending:  # one batch is being written while the next is drawn, never more
                write.result()
            pending = folder.write(writers, batch, images)
        for write in pending:
            write.result()


def _progress_bar(num_images: int, evaluations: int, progress: bool) -> tqdm:
    """Pictures done. It counts their evaluations, since sums of fractions of a picture would end beyond the total."""
    layout = "{desc}: {percentage:3.0f}% |{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_fmt}]"
    return tqdm(
        total=num_images * evaluations,
        unit="image",
        unit_scale=1 / evaluations,
        desc="sampling",
        bar_format=layout,
        disable=not progress or not num_images,
        dynamic_ncols=True,
    )


def _generate(
    pipeline: LatentDiffusionPipeline,
    plan: SamplePlan,
    labels: list[int] | None,
    batches: list[range],
    batch_size: int,
    bar: tqdm,
) -> Iterator[tuple[range, torch.Tensor]]:
    """Yield (indices, (n, 3, H, W) uint8 images on the CPU) of each batch, in order.

    On a CPU the last bits of a convolution depend on the number of threads that share it, and a launcher gives each
    process another number of threads. So there each batch is computed by a single thread, and the cores work on several
    batches at once (which is also the faster way at these sizes).
    """
    compiled = _is_compiled(pipeline.unet)
    lock = Lock()

    def draw(batch: range) -> torch.Tensor:
        # A compiled model is compiled for one shape: the last batch is filled up with repeats.
        padded = [*batch] + [batch[-1]] * (batch_size - len(batch) if compiled else 0)
        dtype = _AUTOCAST_DTYPES.get(plan.mixed_precision)

        def advance(_pipeline, _step, _timestep, state):
            with lock:
                bar.update(len(batch))  # a picture's share of one evaluation
            return state

        with torch.autocast(pipeline.device.type, dtype, enabled=dtype is not None):
            images = pipeline(
                class_labels=[labels[i] for i in padded] if labels is not None else None,
                seeds=[plan.seed + i for i in padded],
                num_inference_steps=plan.steps,
                guidance_scale=plan.guidance_scale,
                output_type="uint8",
                callback_on_step_end=advance,
            ).images
        return images[: len(batch)].cpu()

    if pipeline.device.type != "cpu":
        yield from ((batch, draw(batch)) for batch in batches)
        return
    # Compiled code is traced, and guarded, in one thread.
    streams = 1 if compiled else torch.get_num_threads()
    pool = ThreadPoolExecutor(streams, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from zip(batches, pool.map(draw, batches), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C: do not draw the rest first


@contextmanager
def _ready_to_sample(pipeline: LatentDiffusionPipeline) -> Iterator[None]:
    """No dropout, no bar a batch; and the process's number of threads as it was (a worker's MKL setting is global)."""
    training = [module for module in (pipeline.unet, pipeline.vae) if module.training]
    threads = torch.get_num_threads()
    pipeline.set_progress_bar_config(disable=True)
    for module in training:
        module.eval()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for module in training:
            module.train()


def _is_compiled(module: torch.nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
