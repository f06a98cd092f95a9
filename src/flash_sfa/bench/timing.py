"""Timing on a CUDA device: cold L2, CUDA events, medians with the 20th and 80th percentile.

The device sleeps for about a millisecond before each call, so that launches are queued and their time on the CPU is not
measured, for no implementation.
"""

import statistics
from collections.abc import Callable

import torch


def time_ms(fn: Callable[[], object], *, repeats: int = 20, warmup: int = 3) -> dict[str, float]:
    """Milliseconds of one call of fn: {"ms_median", "ms_p20", "ms_p80"}; the L2 cache is flushed before each."""
    flush = torch.empty(256 * 2**20 // 4, dtype=torch.int32, device="cuda")
    for _ in range(warmup):
        fn()
    times = []
    for _ in range(repeats):
        flush.random_()
        torch.cuda._sleep(2_000_000)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    times.sort()
    return {
        "ms_median": statistics.median(times),
        "ms_p20": times[int(0.2 * (len(times) - 1))],
        "ms_p80": times[int(0.8 * (len(times) - 1))],
    }
