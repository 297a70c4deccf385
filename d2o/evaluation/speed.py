"""What generating costs: images per second on the way, and (asked for) latency of one image, its parts, and peak
memory."""

from __future__ import annotations

import contextlib
import statistics as stats
from collections.abc import Sequence
from pathlib import Path

import torch

from d2o.evaluation.collect import clock
from d2o.evaluation.protocol import noise_for
from d2o.evaluation.subjects import Generator
from d2o.inputs import JsonObject

WARM_UP, TIMED = 10, 50
DEVICE = str | torch.device


def throughput(seconds: Sequence[float], batch: int, device: DEVICE) -> JsonObject:
    """Images/s of generating alone: the median over full batches, without the first (warm-up) where there are
    several."""
    timed = seconds[1:] or seconds
    return {
        "samples_per_s": batch / max(stats.median(timed), 1e-9),
        "batch": batch,
        "batches": len(timed),
        "warm_up_excluded": len(seconds) > 1,
        "device": torch.device(device).type,
    }


def latency(
    x: Generator, seed: int, labels: str | None, device: DEVICE, warm_up: int = WARM_UP, timed: int = TIMED
) -> JsonObject:
    """Milliseconds of one image at batch 1, median and 90th percentile of `timed` after `warm_up`; where it has them,
    of encoding the text, of the network calls and of decoding alone; and the highest memory meanwhile, in bytes (of the
    GPU; else the process, where the system tells)."""
    noise, condition = noise_for(x.spec, range(seed, seed + 1), labels, prompts=x.prompts)
    noise = noise.to(device)
    _reset_peak(device)
    spans: dict[str, list[float]] = {"whole": [], "network": [], "decode": [], "text": []}
    for i in range(warm_up + timed):
        start = clock(device)
        made = x.sample(noise, condition)
        middle = clock(device)
        x.decode(made)
        end = clock(device)
        if x.embed is not None:
            x.embed(condition)
            spans["text"].append(clock(device) - end)
        if i >= warm_up:
            for name, span in (("whole", end - start), ("network", middle - start), ("decode", end - middle)):
                spans[name].append(span)
    milli = {name: [1000 * s for s in values] for name, values in spans.items()}
    record = {
        "latency_ms": stats.median(milli["whole"]),
        "latency_p90_ms": sorted(milli["whole"])[round(0.9 * (timed - 1))],
        "network_ms": stats.median(milli["network"]),
        "decode_ms": stats.median(milli["decode"]),
        "timed": timed,
        "warm_up": warm_up,
        "dtype": "float32",
        "peak_memory_bytes": _peak(device),
    }
    if milli["text"]:
        record["text_ms"] = stats.median(milli["text"][warm_up:])
    return record


def _reset_peak(device: DEVICE) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again from here


def _peak(device: DEVICE) -> int | None:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), None)
