"""What both trainings share: flat parameters, a captured step, a schedule in time, and checkpoints."""

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

STEPS_BETWEEN_CLOCKS = 10
SECONDS_BETWEEN_SAVES = 60.0
ALIGNMENT = 64  # elements


@dataclass(frozen=True)
class Plan:
    """How long to train and how fast: the learning rate holds its peak, then falls as a cosine with the time spent."""

    peak: float
    seconds: float
    total_seconds: float
    steps: int | None = None
    warm_up: int = 300
    decay_from: float = 0.4
    floor: float = 0.01
    averaging: float = 0.9995

    def rate(self, step: int, spent: float) -> float:
        """The learning rate at a step, when so many seconds of the whole have been spent."""
        progress = min(1.0, spent / self.total_seconds)
        fall = max(0.0, (progress - self.decay_from) / (1 - self.decay_from))
        cosine = self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * fall))
        return self.peak * cosine * min(1.0, (step + 1) / self.warm_up)

    def averaging_weight(self, step: int) -> float:
        """How much of the newest weights enters their running average."""
        return 1 - min(self.averaging, (1 + step) / (10 + step))


@dataclass(frozen=True)
class Team:
    """The processes that train together, one a GPU, started by ``torchrun``; one alone is a team too."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> "Team":
        """The team that this process was started in."""
        if "WORLD_SIZE" not in os.environ:
            return cls()
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
        return cls(dist.get_rank(), dist.get_world_size())

    def mean(self, tensor: Tensor) -> None:
        """Put the mean over the team in the place of each one's own."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.AVG)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give everyone what the first has."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, 0)

    def agree(self, value: float) -> float:
        """The first one's number; everyone waits for it."""
        if self.size == 1:
            return value
        told = torch.tensor(value, dtype=torch.float64, device="cuda")
        dist.broadcast(told, 0)
        return float(told)


def _aligned(count: int) -> int:
    """The room for so many elements: kernels that read several at once want every tensor to begin at 128 bytes or more."""
    return -(-count // ALIGNMENT) * ALIGNMENT


class Arena:
    """All parameters of some modules as one flat buffer, with its average, gradient and optimizer.

    The masters and their running average are fp32; the modules compute with a copy in `dtype` whose memory they view.
    """

    def __init__(
        self, modules: Iterable[nn.Module], dtype: torch.dtype, channels_last: bool = False, weight_decay: float = 0.0
    ) -> None:
        self.parameters = [parameter for module in modules for parameter in module.parameters()]
        device = self.parameters[0].device
        size = sum(_aligned(parameter.numel()) for parameter in self.parameters)
        self.work = torch.zeros(size, dtype=dtype, device=device)
        self.gradient = torch.zeros(size, device=device)
        master = torch.zeros(size, device=device)
        self.gradients = self._views(self.gradient, channels_last)
        for old, view in zip(self.parameters, self._views(master, channels_last), strict=True):
            view.copy_(old.detach())
        for parameter, view in zip(self.parameters, self._views(self.work, channels_last), strict=True):
            parameter.data = view
        self.master = nn.Parameter(master)
        self.master.grad = self.gradient
        self.average = master.clone()
        self.work.copy_(master)
        self.rate = torch.zeros((), device=device)
        self.averaging = torch.ones((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            [self.master],
            lr=self.rate,
            betas=(0.9, 0.99),
            weight_decay=weight_decay,
            fused=device.type == "cuda",
            capturable=device.type == "cuda",
        )

    def _views(self, flat: Tensor, channels_last: bool) -> list[Tensor]:
        views, start = [], 0
        for parameter in self.parameters:
            piece = flat[start : start + parameter.numel()]
            start += _aligned(parameter.numel())
            if channels_last and parameter.ndim == 4:
                out, inside, high, wide = parameter.shape
                views.append(piece.view(out, high, wide, inside).permute(0, 3, 1, 2))
            else:
                views.append(piece.view(parameter.shape))
        return views

    def update(self, loss: Tensor) -> None:
        """One step of AdamW on the loss."""
        self.take(loss)
        self.apply()

    def take(self, loss: Tensor) -> None:
        """The gradient of the loss."""
        torch._foreach_copy_(self.gradients, torch.autograd.grad(loss, self.parameters))

    def apply(self) -> None:
        """AdamW on the gradient, which is clipped to norm 1; one that is no number counts as 0."""
        with torch.no_grad():
            norm = self.gradient.norm()
            self.skipped += 1 - norm.isfinite().float()
            self.gradient.mul_((1.0 / (norm + 1e-6)).clamp(max=1.0))
            self.gradient.copy_(torch.where(norm.isfinite(), self.gradient, torch.zeros_like(self.gradient)))
            self.optimizer.step()
            self.average.lerp_(self.master, self.averaging)
            self.work.copy_(self.master)

    def lasting(self) -> list[Tensor]:
        """All that a step changes and the next one reads."""
        moments = [value for values in self.optimizer.state.values() for value in values.values()]
        return [self.master.detach(), self.average, self.work, *moments]

    def use_average(self) -> None:
        """Let the modules compute with the running average."""
        self.work.copy_(self.average)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on."""
        return {
            "master": self.master.detach(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict()["state"],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; one that holds only an average starts a new optimizer."""
        with torch.no_grad():
            self.average.copy_(state["average"])
            self.master.copy_(state.get("master", state["average"]))
            self.work.copy_(self.master)
        if "optimizer" in state:
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate


def captured(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """The step as one CUDA graph; on a CPU, the step itself. What it returns is overwritten by the next call."""
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # A team's threads look after their communication all the while: what they ask must not end the recording.
    mode = "thread_local" if dist.is_initialized() else "global"
    with torch.cuda.graph(graph, capture_error_mode=mode):
        result = step()
    return CapturedStep(step, graph, result)


@dataclass(frozen=True)
class CapturedStep:
    """A recorded step. It holds the step itself: the graph reads the step's own tensors by their addresses alone, and
    where nothing else holds them their memory is handed to others, sooner or later, in the middle of the training."""

    step: Callable[[], Tensor]
    graph: torch.cuda.CUDAGraph
    result: Tensor

    def __call__(self) -> Tensor:
        """Replay the step; the same tensor is returned, and overwritten, every time."""
        self.graph.replay()
        return self.result


def stepping(gradient: Callable[[], Tensor], arena: Arena, team: Team, device: torch.device) -> Callable[[], Tensor]:
    """A whole step, captured: the gradient (which gives the loss), its mean over the team, and the update."""

    def whole() -> Tensor:
        loss = gradient()
        arena.apply()
        return loss

    def update() -> Tensor:
        arena.apply()
        return arena.skipped

    if team.size == 1:
        return captured(whole, device)
    first, second = captured(gradient, device), captured(update, device)
    team.share(arena.lasting())  # trial runs before the capture saw each one's own gradient

    def step() -> Tensor:
        loss = first()
        team.mean(arena.gradient)
        second()
        return loss

    return step


@dataclass
class Progress:
    """Where a training stands."""

    step: int = 0
    spent: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)


def train(
    step: Callable[[], Tensor],
    arena: Arena,
    plan: Plan,
    progress: Progress,
    save: Callable[[], None],
    report_every: int = 1000,
    team: Team = Team(),
) -> None:
    """Repeat the step until the plan's seconds (or steps) are over; the first of the team saves, every minute and last."""
    start, before, first = time.perf_counter(), progress.spent, progress.step
    saved = before
    total = torch.zeros((), device=arena.rate.device)
    while progress.spent - before < plan.seconds and (plan.steps is None or progress.step - first < plan.steps):
        arena.rate.fill_(plan.rate(progress.step, progress.spent))
        arena.averaging.fill_(plan.averaging_weight(progress.step))
        total += step().nan_to_num(100.0)
        progress.step += 1
        if progress.step % STEPS_BETWEEN_CLOCKS == 0:
            if arena.rate.is_cuda:
                torch.cuda.synchronize()
            progress.spent = team.agree(before + time.perf_counter() - start)
            if team.rank == 0 and progress.spent - saved > SECONDS_BETWEEN_SAVES:
                save()
                saved = progress.spent
        if team.rank == 0 and progress.step % report_every == 0:
            _report(progress, total / report_every, arena, plan, (progress.spent - before) / (progress.step - first))
            total.zero_()
    if team.rank == 0:
        save()


def _report(progress: Progress, mean: Tensor, arena: Arena, plan: Plan, pace: float) -> None:
    loss, skipped = mean.item(), int(arena.skipped.item())
    progress.losses.append((progress.step, loss))
    print(
        f"step {progress.step}  loss {loss:.4f}  rate {plan.rate(progress.step, progress.spent):.2e}  "
        f"{1000 * pace:.1f} ms a step  {progress.spent:.0f} s  {skipped} skipped",
        flush=True,
    )
    if loss > 10 and progress.step > 100:
        raise RuntimeError("the training diverged: start again with a lower --rate")


def balanced_sampler(weights: Tensor, batch: int) -> Callable[[], Tensor]:
    """Draws `batch` indices with the given weights; fit for capture."""
    bounds = (weights.double().cumsum(0) / weights.double().sum()).float()

    def draw() -> Tensor:
        at = torch.rand(batch, device=bounds.device)
        return torch.searchsorted(bounds, at).clamp(max=len(bounds) - 1)

    return draw


def save_checkpoint(path: Path, arena: Arena, progress: Progress) -> None:
    """Write the checkpoint beside the last one, then put it in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    torch.save({"arena": arena.state(), "step": progress.step, "spent": progress.spent}, fresh)
    fresh.replace(path)


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any] | None:
    """A saved checkpoint, or None where there is none yet."""
    if not path.exists():
        return None
    loaded: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return loaded


def affine(images: Tensor, scale: tuple[float, float], shift: float) -> Tensor:
    """Each image in [-1, 1] resized and moved by its own random amounts on white; a scale above 1 makes it smaller."""
    count, device = images.shape[0], images.device
    theta = torch.zeros(count, 2, 3, device=device)
    size = torch.empty(count, device=device).uniform_(*scale)
    theta[:, 0, 0] = size
    theta[:, 1, 1] = size
    theta[:, :, 2] = torch.empty(count, 2, device=device).uniform_(-shift, shift)
    return placed(images, theta)


def placed(images: Tensor, theta: Tensor) -> Tensor:
    """Images in [-1, 1] on white, seen through transformations (count, 2, 3) of the places in them."""
    grid = nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images - 1, grid, align_corners=False) + 1


def sheet(images: Tensor, columns: int, path: Path) -> None:
    """Save images in [-1, 1] as one picture, row by row."""
    from PIL import Image

    bytes_ = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()
    size = bytes_.shape[1]
    canvas = Image.new("RGB", (columns * size, -(-len(bytes_) // columns) * size), "white")
    for number, image in enumerate(bytes_):
        canvas.paste(Image.fromarray(image.numpy()), (number % columns * size, number // columns * size))
    canvas.save(path)
