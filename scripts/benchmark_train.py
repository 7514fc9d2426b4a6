"""Training steps of this package against the frozen base's floor, the diffusers script, peft and LyCORIS, on a GPU.

    python scripts/benchmark_train.py --output benchmark                       # everything, which takes long
    python scripts/benchmark_train.py --output benchmark --quick --seconds 240 # what says the most in four minutes
    python scripts/benchmark_train.py --output benchmark --tiny --device cpu   # sees that the script works

First the gate: the gradients of one LoRA, ours and peft's, on the same weights in float32 and in bfloat16, and the losses of
50 steps. Then the cells, each in a process of its own. Its sides are built and warmed up one after the other and then take
turns, A B B A A B, in blocks of 10 steps between CUDA events. Whatever is known is printed and appended to
``results.jsonl`` at once; what fails is told with its traceback and stops nothing else.

Ours are ``ours`` (the package as it is), ``ours-eager`` (no recording), ``ours-plain`` (recorded, the base not fused) and
``ours-flash`` (recorded and fused, with the attention that torch chooses).
The frozen base alone, forward and the gradients through its activations, is ``floor`` (recorded as ours is), ``floor-eager``
and ``floor-plain``. Others: ``script`` (diffusers'), ``peft`` (best effort), ``peft-graph``, ``peft-compiled`` (with
``--compile``), ``lycoris``, and ``kohya`` (where its sd-scripts are on PYTHONPATH). Peak memory is that of a step that is no
recording, with the weights; ``reserved`` is what the side holds of the card, recordings too.
"""

import argparse
import gc
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are no part of the package

from peft_diffusion.core import site
from peft_diffusion.core.errors import UserError
from peft_diffusion.fast.unet import fused
from peft_diffusion.methods.lora import Lora
from peft_diffusion.training.loop.trainer import loss_at
from scripts import training_sides as sides
from scripts.measuring import run
from scripts.training_sides import NAME, SIDES, Cell, Side

BLOCK = 10
PEAK = 798.0  # TFLOP/s of dense bfloat16 that an H100 was measured to do
GIB = 2**30
ALL = [f"{kind}-b{batch}{end}" for kind in ("sd1", "sdxl") for batch in (1, 4, 8) for end in ("", "-ck")]
EVERY = tuple(name for name in SIDES if name not in ("peft-compiled", "kohya"))
QUICK_CELLS, QUICK_SIDES = ("sd1-b1", "sd1-b4", "sdxl-b1"), ("ours", "floor", "script", "peft", "ours-plain")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def main() -> None:
    """The gate, the tests if asked for, and the cells."""
    options = _options()
    if options.child is not None:
        _child(options)
        return
    began = time.monotonic()
    options.output.mkdir(parents=True, exist_ok=True)
    results = options.output / "results.jsonl"
    results.unlink(missing_ok=True)
    testing = _tests(options)
    passed = options.no_gate or _spawn("gate", options, began) == 0
    _finish_tests(testing, options, began)
    for cell in options.cells:
        if _left(options, began) < 10:
            print(f"no time is left for {cell}", flush=True)
            continue
        _spawn(cell, options, began)
        _table(results)
    if not passed:
        raise UserError("the gate was not passed: gradients or losses differ from peft's, so the times compare nothing")


def _left(options: argparse.Namespace, began: float) -> float:
    return float(options.seconds - (time.monotonic() - began))


def _spawn(what: str, options: argparse.Namespace, began: float) -> int:
    """The gate or a cell in a process of its own, ended when the time is over; its exit code."""
    left = _left(options, began)
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--child", what, "--seconds", str(int(left))]
    process = subprocess.Popen(command)
    try:
        return process.wait(left)
    except subprocess.TimeoutExpired:
        print(f"{what}: ended, the time is over", flush=True)
        process.send_signal(signal.SIGKILL)
        return process.wait()


def _tests(options: argparse.Namespace) -> "dict[Path, subprocess.Popen[bytes]]":
    """Tests that need a GPU, all at once, by their log; they run beside the gate, which is not timed either."""
    root = Path(__file__).resolve().parent.parent
    files = [str(root / "tests" / name) for name in ("test_cuda_graph.py", "test_fast_unet.py")]
    found = {}
    for number, chosen in enumerate(options.tests or ()):
        log = options.output / f"tests_{number}.txt"
        command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-k", chosen, *files]
        with log.open("w") as file:
            found[log] = subprocess.Popen(command, cwd=root, stdout=file, stderr=subprocess.STDOUT)
    return found


def _finish_tests(tests: "dict[Path, subprocess.Popen[bytes]]", options: argparse.Namespace, began: float) -> None:
    """Wait a while for the tests, and print what they found; timing starts when they are gone."""
    until = time.monotonic() + min(options.test_seconds, max(1.0, _left(options, began) / 4))
    for log, process in tests.items():
        ended = ""
        try:
            process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended = "ended before they were through"
        lines = log.read_text(errors="replace").splitlines()
        kept = lines[-40:] if process.returncode else lines[-1:]
        for line in [*kept, *([ended] if ended else [])]:
            print(f"{log.stem}: {line}", flush=True)


def _child(options: argparse.Namespace) -> None:
    device, dtype = torch.device(options.device), DTYPES[options.precision]
    torch.backends.cudnn.benchmark = True  # for all sides
    if options.child == "gate":
        sys.exit(0 if _gate(options, device) else 1)
    _Measurement(Cell.parse(options.child), options, device, dtype).take()


def _tell(options: argparse.Namespace, **figures: Any) -> None:
    """Print a line of figures, and keep it."""
    words = " ".join(
        f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}" for key, value in figures.items()
    )
    print(words, flush=True)
    with (options.output / "results.jsonl").open("a") as file:
        file.write(json.dumps(figures) + "\n")


@contextmanager
def _told(options: argparse.Namespace, **where: Any) -> Iterator[None]:
    """What fails inside is told with its traceback, and stops nothing else."""
    try:
        yield
    except Exception:
        print(traceback.format_exc(), flush=True)
        _tell(options, **where, error=traceback.format_exc().strip().splitlines()[-1][:300])
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# The gate.


def _gate(options: argparse.Namespace, device: torch.device) -> bool:
    """Whether ours and peft learn the same."""
    torch.backends.cudnn.allow_tf32 = False  # float32 shall be that
    good = True
    for kind in dict.fromkeys(Cell.parse(name).kind for name in options.cells):
        if kind == "sdxl" and options.quick:
            continue  # its float32 weights take a while, and the layers are those of the other
        cell, passed = Cell(kind, 1), False
        with _told(options, gate=kind):
            exact = {side: _gradients(cell, device, torch.float32, side) for side in ("ours", "peft")}
            half = {side: _gradients(cell, device, torch.bfloat16, side) for side in ("ours", "peft")}
            figures = {
                "cosine_float32": _cosine(exact["ours"], exact["peft"]),
                "cosine_bfloat16": _cosine(half["ours"], half["peft"]),
                "ours_bfloat16_to_float32": _cosine(half["ours"], exact["peft"]),
                "peft_bfloat16_to_float32": _cosine(half["peft"], exact["peft"]),
            }
            _tell(options, gate=kind, **figures)
            # Two that round differently differ from each other by more than each from the truth.
            near = min(0.999, figures["peft_bfloat16_to_float32"])
            passed = figures["cosine_float32"] >= 0.9999 and (
                figures["cosine_bfloat16"] >= 0.999 or figures["ours_bfloat16_to_float32"] >= near
            )
        near_losses = False
        with _told(options, gate=f"{kind} losses"):
            dtype = DTYPES[options.precision]
            mean = {side: _mean_loss(cell, device, dtype, side, options.gate_steps) for side in ("ours", "peft")}
            ratio = mean["ours"] / mean["peft"]
            _tell(options, gate=kind, steps=options.gate_steps, **mean, ratio=ratio)
            near_losses = abs(ratio - 1) < 0.01
        passed = passed and near_losses
        _tell(options, gate=kind, passed=passed)
        good = good and passed
    return good


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.double(), b.double(), dim=0))


def _pairs(unet: nn.Module, side: str) -> list[tuple[Tensor, Tensor]]:
    """Down and up of each layer, in the order of the modules."""
    if side == "ours":
        adapters = site.adapters(unet, NAME).values()
        return [(adapter.get_parameter("down"), adapter.get_parameter("up")) for adapter in adapters]
    layers: list[Any] = [module for module in unet.modules() if hasattr(module, "lora_A")]
    return [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in layers]


def _start(unet: nn.Module, side: str) -> list[tuple[Tensor, Tensor]]:
    """The pairs, with the same numbers for both sides, up not 0."""
    pairs, chance = _pairs(unet, side), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for pair in pairs:
            for tensor in pair:
                tensor.copy_(0.02 * torch.randn(tensor.shape, generator=chance))
    return pairs


def _both(cell: Cell, device: torch.device, dtype: torch.dtype, side: str) -> tuple[Any, Callable[[Any], Tensor]]:
    """The UNet with a LoRA, float32 as ours is, and the loss for what the task gives to learn."""
    unet = sides.build(cell, device, dtype)
    task = sides.task_of(cell, unet)
    if side == "ours":
        site.attach(unet, NAME, Lora(sides.RANK), "attention")
    else:
        sides.add_lora(unet)
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return task, lambda number: loss_at(task, number, 0, device)


def _gradients(cell: Cell, device: torch.device, dtype: torch.dtype, side: str) -> Tensor:
    """Gradients of one LoRA, flat."""
    task, loss = _both(cell, device, dtype, side)
    unet = task.pipe.unet
    with fused(unet) if side == "ours" else nullcontext():
        pairs = _start(unet, side)
        with sides.working(unet) if side == "ours" else nullcontext():
            loss(0).backward()
    return torch.cat([tensor.grad.float().flatten().cpu() for pair in pairs for tensor in pair if tensor.grad is not None])


def _mean_loss(cell: Cell, device: torch.device, dtype: torch.dtype, side: str, steps: int) -> float:
    """The mean of the losses of so many steps: ours from the trainer, theirs in a loop on the same batches."""
    if side == "ours":
        made = sides.ours(cell, device, dtype)
        with made.close:
            _start(made.unet, side)
            losses = []
            for _ in range(steps):
                made.run(1)
                losses.append(made.loss())
        return statistics.fmean(losses)
    task, loss = _both(cell, device, dtype, side)
    _start(task.pipe.unet, side)
    own = [parameter for parameter in task.pipe.unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=sides.RATE, weight_decay=0.01)
    total = torch.zeros((), device=device)
    for number in range(steps):
        value = loss(number)
        value.backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += value.detach()
    return float(total) / steps


# The cells.


class _Measurement:
    """One cell: its sides, their times (ms a step) and memory (bytes)."""

    def __init__(self, cell: Cell, options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
        self.cell, self.options, self.device, self.dtype = cell, options, device, dtype
        self.until = time.monotonic() + options.seconds
        self.sides: dict[str, Side] = {}
        self.times: dict[str, list[float]] = {}
        self.static: dict[str, int] = {}

    def take(self) -> None:
        """Build and warm up each side, then let them take turns while there is time, then look at memory and operations."""
        for name in self.options.sides:
            with _told(self.options, cell=self.cell.name, side=name):
                self._build(name)
        for turn in range(self.options.turns):
            order = list(self.sides) if turn % 2 == 0 else list(self.sides)[::-1]
            for name in order:
                if time.monotonic() + self._reserve() > self.until and turn:
                    break
                with _told(self.options, cell=self.cell.name, side=name):
                    self._time(name)
            self._report(turn)
        for name in self.sides:
            with _told(self.options, cell=self.cell.name, side=name):
                self._memory(name)
        with _told(self.options, cell=self.cell.name):
            self._operations()

    def _reserve(self) -> float:
        """Seconds to keep for what comes after the turns."""
        return 4.0

    def _build(self, name: str) -> None:
        cuda = self.device.type == "cuda"
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        before, held = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) if cuda else (0, 0)
        began = time.monotonic()
        side = SIDES[name](self.cell, self.device, self.dtype)
        side.run(self.options.warm_ups)
        self._wait()
        loss, note = side.loss(), side.note()
        self.sides[name] = side
        self.static[name] = (torch.cuda.memory_allocated() if cuda else 0) - before
        reserved = (torch.cuda.memory_reserved() if cuda else 0) - held
        seconds = time.monotonic() - began
        _tell(self.options, cell=self.cell.name, side=name, built=seconds, loss=loss, reserved_gib=reserved / GIB, note=note)

    def _time(self, name: str) -> None:
        side, times = self.sides[name], self.times.setdefault(name, [])
        for _ in range(self.options.blocks):
            times.append(_milliseconds(side, self.device) / BLOCK)

    def _report(self, turn: int) -> None:
        """What is known of the times after a turn."""
        for name, times in self.times.items():
            middle = statistics.median(times)
            images = 1000 * self.cell.batch / middle
            range_ = {"median_ms": middle, "min_ms": min(times), "max_ms": max(times)}
            _tell(self.options, cell=self.cell.name, side=name, turn=turn, **range_, images_per_second=images)

    def _memory(self, name: str) -> None:
        """The peak of a step that is no recording, over what the other sides hold."""
        if self.device.type != "cuda":
            return
        side, before = self.sides[name], torch.cuda.memory_allocated()
        side.alone()
        self._wait()
        torch.cuda.reset_peak_memory_stats()
        side.alone()
        self._wait()
        peak = torch.cuda.max_memory_allocated() - before + self.static[name]
        _tell(self.options, cell=self.cell.name, side=name, peak_gib=peak / GIB)

    def _operations(self) -> None:
        """Floating-point operations of a step, counted, and what share of the card's rate that is."""
        from torch.utils.flop_counter import FlopCounterMode

        for name in [name for name in ("ours", "floor") if name in self.times]:
            # torch's own counts of these cannot take a product whose result has another dtype.
            products = {torch.ops.aten.addmm: _operations_of_sum, torch.ops.aten.baddbmm: _operations_of_sum}
            with FlopCounterMode(display=False, custom_mapping=products) as counted:
                self.sides[name].alone()
            done = counted.get_total_flops()
            rate = done / statistics.median(self.times[name]) / 1e9
            share = {"gflop": done / 1e9, "tflops": rate, "share_of_peak": rate / self.options.peak}
            _tell(self.options, cell=self.cell.name, side=name, **share)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _operations_of_sum(_: Any, a: Sequence[int], b: Sequence[int], *__: Any, **___: Any) -> int:
    """Operations of ``_ + a @ b``, of matrices or stacks of them, from their shapes."""
    return 2 * math.prod(a) * b[-1]


def _milliseconds(side: Side, device: torch.device) -> float:
    """Of a block of steps."""
    if device.type != "cuda":
        began = time.perf_counter()
        side.run(BLOCK)
        return 1000 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    side.run(BLOCK)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _table(results: Path) -> None:
    """What is known so far: one line for each cell and side, with how much faster ours is."""
    known: dict[tuple[str, str], dict[str, Any]] = {}
    for line in results.read_text().splitlines() if results.exists() else ():
        figures = json.loads(line)
        if "cell" in figures and "side" in figures:
            known.setdefault((figures["cell"], figures["side"]), {}).update(figures)
    for (cell, side), figures in known.items():
        if "median_ms" not in figures:
            print(f"{cell:10} {side:13} {figures.get('error', 'not timed')}", flush=True)
            continue
        own = known.get((cell, "ours"), {}).get("median_ms")
        words = [f"{figures['median_ms']:9.2f} ms ({figures['min_ms']:.2f} to {figures['max_ms']:.2f})"]
        words.append(f"{figures['images_per_second']:8.2f} images/s")
        words += [f"peak {figures['peak_gib']:.2f} GiB"] if "peak_gib" in figures else []
        words += (
            [f"{figures['tflops']:.0f} TFLOP/s, {figures['share_of_peak']:.0%} of the peak"] if "tflops" in figures else []
        )
        words += [f"{figures['median_ms'] / own:.2f} times ours"] if own else []
        print(f"{cell:10} {side:13} {', '.join(words)}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmark"), help="folder for results")
    parser.add_argument("--cells", nargs="+", help=f"of {' '.join(ALL)} and tiny-b1 (default: all, --quick: some)")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), help="default: all but peft-compiled and kohya")
    parser.add_argument("--seconds", type=int, default=36000, help="end after this time, with what is known")
    parser.add_argument("--quick", action="store_true", help="few cells, sides and warm-ups: what says the most in minutes")
    parser.add_argument("--tiny", action="store_true", help="a tiny UNet, to see that the script works")
    parser.add_argument("--compile", action="store_true", help="peft compiled too, which takes minutes to compile")
    parser.add_argument("--no-gate", action="store_true", help="skip the comparison of gradients and losses")
    parser.add_argument(
        "--tests", nargs="+", help="tests that need a GPU, by pytest's -k; one process for each, beside the gate"
    )
    parser.add_argument("--test-seconds", type=float, default=600.0, help="for the tests, after the gate")
    parser.add_argument("--gate-steps", type=int, default=50, help="steps whose losses are compared")
    parser.add_argument("--warm-ups", type=int, help="steps before timing (20; --quick: 10)")
    parser.add_argument("--blocks", type=int, help="blocks of 10 steps in a turn (2; --quick: 1)")
    parser.add_argument("--turns", type=int, default=3, help="turns of all sides, every other one backwards")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--peak", type=float, default=PEAK, help="TFLOP/s of the card")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    quick = options.quick or options.tiny
    options.cells = options.cells or (["tiny-b1"] if options.tiny else list(QUICK_CELLS) if quick else ALL)
    options.sides = options.sides or list(QUICK_SIDES if quick else EVERY)
    options.sides += ["peft-compiled"] if options.compile and "peft-compiled" not in options.sides else []
    options.warm_ups = options.warm_ups if options.warm_ups is not None else 10 if quick else 20
    options.blocks = options.blocks or (1 if quick else 2)
    _check(options.cells)
    return options


def _check(cells: Iterable[str]) -> None:
    for cell in cells:
        Cell.parse(cell)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run(main)
