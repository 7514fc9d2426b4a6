"""Pictures of many people at once: batches of different adapters, here against one after the other, here and by diffusers.

    python scripts/benchmark_batch.py                                               # SD1.5 and SDXL on CUDA
    python scripts/benchmark_batch.py --kinds tiny --device cpu --steps 4           # sees that the script works
    python scripts/benchmark_batch.py --kinds icons --device cpu --precision float32 --side 64 --steps 6 --load 0.4 0.8

Weights are random; the LoRAs (rank 16, on attention) are files that both sides load. First the gate: each picture of a
batch is that of its own run, on a CPU in float64, elsewhere up to the rounding of the precision. In float32 numbers are
rounded otherwise in a batch, and the steps amplify that, with strong LoRAs more than a bar can foresee. Then eight pictures
with eight adapters, in one batch and in turn, in milliseconds (medians). Then 32 requests with 16 adapters that all wait
from the first: here eight at once, by diffusers with peft one after the other; pictures a second, and after how many seconds
half of them and 95 in 100 are there.

With ``--load`` the gate is followed by this alone: 32 requests come one by one, at random times (a Poisson process), so many
times as fast as eight at once are drawn, a third of them with half the steps. How long does each wait for its picture, where
all that wait are drawn in a batch, and where each joins those under way at their next step (`Adapters.queue`)? Both at the
same times, in the order batches, joining, joining, batches. Time in which nothing is drawn is skipped; on a CPU it is the
processor's, of one thread, so that others on the machine count less.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are no part of the package

from peft_diffusion import Request
from peft_diffusion.core.errors import UserError
from peft_diffusion.generation import Adapters
from peft_diffusion.generation.joining import Ticket
from peft_diffusion.generation.settings import Sampling
from scripts.benchmark_generate import DTYPES, lora_files, parser_of, pipeline, read
from scripts.measuring import markdown_table, run

# Of 255: the mean distance that two orders of rounding explain; in float64 none, but for a few bytes at a boundary.
NEAR = {torch.bfloat16: 12.0, torch.float16: 4.0, torch.float32: 0.05, torch.float64: 1e-3}
AT_ONCE, ADAPTERS, REQUESTS = 8, 16, 32


def main() -> None:
    """The gate and the figures of each architecture."""
    parser = parser_of(__doc__, repeats=3)
    parser.add_argument("--side", type=int, help="of pictures, in pixels; by default that of the base")
    parser.add_argument(
        "--load", nargs="+", type=float, default=[], help="requests that come, of what eight at once could do"
    )
    options = read(parser)
    if any(load <= 0 for load in options.load):
        raise UserError("--load must be above 0: 0.5 has requests come half as fast as eight at once are drawn")
    if options.load and options.device == "cpu":
        torch.set_num_threads(1)
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            compare(kind, options, Path(folder))
        gc.collect()


def compare(kind: str, options: argparse.Namespace, folder: Path) -> None:
    """One architecture: both sides on the same weights and files."""
    pipe = pipeline(kind, folder, options.device, DTYPES[options.precision])
    files = lora_files(pipe, ADAPTERS, folder)
    side = options.side or 8 * pipe.unet.config.sample_size
    how = Sampling(steps=options.steps, guidance=5.0, width=side, height=side)
    wanted = [
        Request(f"a red apple, number {number}", {f"a{number % ADAPTERS}": 0.8}, number, "blurred", how)
        for number in range(REQUESTS)
    ]
    turns = [] if options.load else theirs(pipe, files, wanted, options)
    adapters = Adapters(pipe)
    for number, file in enumerate(files):
        adapters.load(file, f"a{number}")
    adapters.fast()
    some = wanted[:AT_ONCE]
    check_same(kind, adapters, some, torch.float64 if options.device == "cpu" else DTYPES[options.precision])
    if options.load:
        for load in options.load:
            arriving(adapters, wanted, load, options)
        return
    before = adapters.recordings
    print(markdown_table([kind, "ours", "diffusers + peft"], []), end="")

    def row(what: str, *figures: float | None) -> None:
        """As soon as it is known: a run that is ended early has told what it found."""
        print("|", " | ".join([what, *("-" if one is None else f"{one:.4g}" for one in figures)]), "|", flush=True)

    row("eight pictures in one batch, ms", 1000 * timed(lambda: adapters.batch(some, at_most=AT_ONCE), options), None)
    in_turn = timed(lambda: [adapters.batch([request]) for request in some], options)
    row("the same in turn, ms", 1000 * in_turn, 1000 * turns[AT_ONCE - 1])
    parts = [wanted[start : start + AT_ONCE] for start in range(0, REQUESTS, AT_ONCE)]
    done = waited([partial(adapters.batch, part, at_most=AT_ONCE) for part in parts])
    row(f"{REQUESTS} requests: pictures a second", REQUESTS / done[-1], REQUESTS / turns[-1])
    row("half have theirs after, s", share(done, AT_ONCE, 0.5), share(turns, 1, 0.5))
    row("95 in 100 have theirs after, s", share(done, AT_ONCE, 0.95), share(turns, 1, 0.95))
    row("recordings meanwhile", float(adapters.recordings - before), None)


def check_same(kind: str, adapters: Adapters, some: Sequence[Request], dtype: torch.dtype) -> None:
    """The gate: pictures of a batch are those of their own runs, computed in a precision, which the base has meanwhile.

    Raises:
        UserError: They are others.
    """
    pipe = adapters.pipe
    before = pipe.unet.dtype
    pipe.to(dtype)
    pictures = adapters.batch(some, at_most=AT_ONCE)
    apart = max(distance(one, adapters.batch([request])[0]) for one, request in zip(pictures, some, strict=True))
    pipe.to(before)
    told = str(dtype).removeprefix("torch.")
    print(f"{kind}: in {told}, a picture of a batch and that of its own run differ by {apart:.2g} of 255", flush=True)
    if not apart <= NEAR[dtype]:
        raise UserError("the gate was not passed: pictures of a batch are others, so the times compare nothing")


class Clock:
    """Seconds from now on, in which one can go ahead."""

    def __init__(self, device: str) -> None:
        self._read = time.process_time if device == "cpu" else time.perf_counter
        self._began = self._read()

    @property
    def now(self) -> float:
        """How many there are."""
        return self._read() - self._began

    def until(self, moment: float) -> None:
        """Go ahead to a moment that has not come."""
        self._began -= max(0.0, moment - self.now)


def arriving(adapters: Adapters, wanted: Sequence[Request], load: float, options: argparse.Namespace) -> None:
    """Requests that come one by one: how long they wait where they are drawn in batches, and where they join."""
    clock = Clock(options.device)
    adapters.batch(wanted[:AT_ONCE], at_most=AT_ONCE)
    rate = load * AT_ONCE / clock.now
    short = replace(wanted[0].sampling, steps=max(1, options.steps // 2))
    mixed = [replace(one, sampling=short) if number % 3 == 2 else one for number, one in enumerate(wanted)]
    comes = np.cumsum(np.random.default_rng(0).exponential(1 / rate, len(mixed))).tolist()
    waits: dict[str, list[float]] = {"in batches": [], "joining": []}
    for how in ("in batches", "joining", "joining", "in batches"):
        work = batched if how == "in batches" else joined
        waits[how] += work(adapters, mixed, comes, Clock(options.device))
    print(f"\nat {load:g} of what eight at once could do, {rate:.3g} requests a second:\n")
    rows = [[how, *(f"{np.percentile(found, part):.3g}" for part in (50, 95))] for how, found in waits.items()]
    print(markdown_table(["", "half have theirs within, s", "95 in 100, s"], rows), flush=True)


def batched(adapters: Adapters, wanted: Sequence[Request], comes: Sequence[float], clock: Clock) -> list[float]:
    """How long each waits where all that have come are drawn at once, and the next ones after these."""
    first, waits = 0, list[float]()
    while first < len(wanted):
        clock.until(comes[first])
        now = clock.now
        last = min(first + AT_ONCE, max(first + 1, sum(one <= now for one in comes)))
        adapters.batch(wanted[first:last], at_most=AT_ONCE)
        waits += [clock.now - one for one in comes[first:last]]
        first = last
    return waits


def joined(adapters: Adapters, wanted: Sequence[Request], comes: Sequence[float], clock: Clock) -> list[float]:
    """How long each waits where it joins those under way."""
    first, of, waits = 0, dict[Ticket, float](), list[float]()
    with adapters.queue(at_most=AT_ONCE) as queue:
        while first < len(wanted) or queue.busy:
            if not queue.busy:
                clock.until(comes[first])
            while first < len(wanted) and queue.room and comes[first] <= clock.now:
                of[queue.submit(wanted[first])] = comes[first]
                first += 1
            waits += [clock.now - of[ticket] for ticket in queue.step()]
    return waits


def theirs(pipe: Any, files: Sequence[Path], wanted: Sequence[Request], options: argparse.Namespace) -> list[float]:
    """When each request is done by diffusers, one after the other."""
    for number, file in enumerate(files):
        pipe.load_lora_weights(file, adapter_name=f"a{number}")

    def draw(request: Request) -> None:
        pipe.set_adapters(list(request.adapters), list(request.adapters.values()))
        pipe(
            request.prompt, negative_prompt=request.negative, num_inference_steps=options.steps, guidance_scale=5.0,
            width=request.sampling.width, height=request.sampling.height,
            generator=torch.Generator().manual_seed(request.seed),
        )  # fmt: skip

    draw(wanted[0])
    done = waited([partial(draw, request) for request in wanted])
    pipe.unload_lora_weights()
    return done


def waited(works: Sequence[Callable[[], object]]) -> list[float]:
    """When each of several works that are done in turn is done, in seconds from the beginning."""
    began, done = time.perf_counter(), []
    for work in works:
        work()  # pictures are on the host when it ends
        done.append(time.perf_counter() - began)
    return done


def share(done: Sequence[float], each: int, part: float) -> float:
    """When a share of the people has its picture, where so many are done at each time."""
    return float(np.sort(np.repeat(done, each))[int(np.ceil(part * REQUESTS)) - 1])


def timed(work: Callable[[], object], options: argparse.Namespace) -> float:
    """The median of a work's time, in seconds."""
    work()
    found = []
    for _ in range(options.repeats):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def distance(one: Any, other: Any) -> float:
    """The mean distance of two pictures' bytes."""
    return float(np.abs(np.asarray(one, int) - np.asarray(other, int)).mean())


if __name__ == "__main__":
    run(main)
