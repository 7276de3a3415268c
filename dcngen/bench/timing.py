"""Timing on a CUDA device: events, medians, inputs rotated past the L2 cache, and the measured copy bandwidth."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

_WARMUP, _REPEATS = 5, 25
# Long enough for the host to queue a whole series behind it, so that the events see the device alone.
_HEAD_START_CYCLES = 4_000_000


def l2_bytes(device: torch.device) -> int:
    """Size of the device's L2 cache in bytes."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def rotation_count(bytes_per_set: int, device: torch.device, most: int = 8) -> int:
    """How many input sets to rotate through so that no set is still in the L2 when its turn comes again."""
    return max(2, min(most, 3 * l2_bytes(device) // max(1, bytes_per_set) + 2))


def median_microseconds(run: Callable[[int], object], *, repeats: int = _REPEATS, warmup: int = _WARMUP) -> float:
    """Median device time of ``run(i)`` in microseconds; ``i`` counts the calls, for rotating inputs."""
    for i in range(warmup):
        run(i)
    torch.cuda.synchronize()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda._sleep(_HEAD_START_CYCLES)
    for i, (start, end) in enumerate(pairs):
        start.record()
        run(i)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) * 1e3


def captured(step: Callable[[int], object], *, warmup: int = 3) -> Callable[[int], object]:
    """``step`` as a replayed CUDA graph: what the device needs, whatever the host needs to launch it.

    A compiled layer is a dozen short kernels behind a millisecond of Python; outside a graph its time is the host's.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(warmup):
            step(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(0)
    return lambda _: graph.replay()


def copy_bandwidth(device: torch.device, gigabytes: float = 2.0) -> float:
    """Bytes per second, read plus written, of a large device-to-device copy: the ceiling behind every floor."""
    source = torch.empty(int(gigabytes * 2**30), dtype=torch.uint8, device=device)
    source.random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (median_microseconds(lambda _: target.copy_(source), repeats=11) * 1e-6)


def geometric_mean(values: Sequence[float]) -> float:
    """Geometric mean; NaN of an empty sequence."""
    return statistics.geometric_mean(values) if values else float("nan")
