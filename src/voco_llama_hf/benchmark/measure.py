"""Times and memory of calls. Calls that are compared take turns: whatever else a machine does meets them all."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """
    Seconds of one call, in order.

    Args:
        seconds (`list[float]`): By the clock on the wall.
        processor_seconds (`list[float]`): That the process was given, which a busy machine changes less.
    """

    seconds: list[float]
    processor_seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median

    @property
    def processor_median(self) -> float:
        return statistics.median(self.processor_seconds)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def alternate(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, Timing]:
    """Times calls that take turns; the first round warms up, and every other one starts with another call."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    processor_seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds + 1):
        report(f"round {turn} of {rounds}" if turn else "warming up")
        for name in names if turn % 2 else reversed(names):
            synchronize(device)
            start, processor_start = time.perf_counter(), time.process_time()
            calls[name]()
            synchronize(device)
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
                processor_seconds[name].append(time.process_time() - processor_start)
    return {name: Timing(seconds[name], processor_seconds[name]) for name in calls}


def kernel_seconds(call: Callable[[], object], device: torch.device) -> float | None:
    """
    Time that the kernels of a call take on a GPU, from torch's profiler; `None` without a GPU, and where the driver
    shows the profiler no kernels.
    """
    if device.type != "cuda":
        return None
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize(device)
    # Events of the host carry the time of the kernels that they launch once more
    kernels = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.self_device_time_total for event in kernels) / 1e6 or None


def event_seconds(call: Callable[[], object], device: torch.device, rounds: int = 5) -> float | None:
    """
    Time between two events on a GPU around a call, its waits for the host with it: the median; `None` without a GPU.
    """
    if device.type != "cuda":
        return None
    call()
    milliseconds = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        milliseconds.append(start.elapsed_time(end))
    return statistics.median(milliseconds) / 1e3


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes allocated on a GPU at the worst moment of a call, weights included; `None` without a GPU."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated; on a CPU the system's estimate."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    (line,) = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")]
    return 1024 * int(line.split()[1])


def find_largest(fits: Callable[[int], bool], start: int) -> int:
    """
    The largest number that fits, to an eighth: doubled while it fits, then halved between.

    Args:
        fits (`Callable`): Whether a number fits.
        start (`int`): A number that fits.
    """
    low, high = start, 2 * start
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def runs_on_gpu(call: Callable[[], object]) -> bool:
    """Whether a call ends before the GPU's memory does."""
    try:
        call()
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return True


def memory_bandwidth(device: torch.device, rounds: int = 11) -> float:
    """Bytes a second that a large copy reads and writes."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = alternate({"copy": lambda: target.copy_(source)}, rounds, device)["copy"]
    return 2 * size / timing.median
