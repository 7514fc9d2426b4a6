"""Pipelines of diffusers: what of them this package uses, and the one place that touches what they keep to themselves.

A pipeline tells nobody that it draws, at which steps, and whether it guides. All of diffusers' pipelines open their progress
bar around their steps, so `watching` learns from there which one is at work, also where several share a network.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from ..core.errors import UserError

_NEAR = 0.5  # timesteps are whole numbers, or fractions that are passed on as they are
# What pipelines hold twice over, without and with the prompt, for as long as guidance acts.
_DOUBLED = ("prompt_embeds", "add_text_embeds", "add_time_ids", "mask", "masked_image_latents")


class Pipeline(Protocol):
    """What this package asks of a pipeline; those of diffusers for Stable Diffusion have it."""

    scheduler: Any
    vae: Any

    @property
    def device(self) -> torch.device: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def components(self) -> Mapping[str, Any]: ...
    @property
    def image_processor(self) -> Any: ...
    @property
    def do_classifier_free_guidance(self) -> bool: ...
    @property
    def num_timesteps(self) -> int: ...
    def set_progress_bar_config(self, *, disable: bool) -> None: ...
    def to(self, device: torch.device) -> Self: ...
    @property
    def __call__(self) -> Callable[..., Any]: ...


class _Present(threading.local):
    """The pipelines that draw in a thread, the innermost last."""

    def __init__(self) -> None:
        self.pipelines: list[Pipeline] = []


_present = _Present()
_lock = threading.Lock()


class _Bar:
    """A pipeline's progress bar, between whose opening and closing the pipeline counts as the one that draws."""

    def __init__(self, pipeline: Pipeline, bar: Any) -> None:
        self._pipeline = pipeline
        self._bar = bar

    def __enter__(self) -> Any:
        _present.pipelines.append(self._pipeline)
        return self._bar.__enter__()

    def __exit__(self, *raised: Any) -> Any:
        _present.pipelines.remove(self._pipeline)
        return self._bar.__exit__(*raised)

    def __iter__(self) -> Iterator[Any]:
        present = _present.pipelines  # an iteration that is given up may end in another thread
        present.append(self._pipeline)
        try:
            yield from self._bar
        finally:
            present.remove(self._pipeline)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)


def watch() -> None:
    """Learn from now on which pipeline draws: wrap the progress bar of all pipelines, once in a process.

    What pipelines do and show stays the same.
    """
    from diffusers import DiffusionPipeline

    with _lock:
        plain = DiffusionPipeline.progress_bar
        if getattr(plain, "tells_who_draws", False):
            return

        def progress_bar(self: Any, *given: Any, **named: Any) -> _Bar:
            return _Bar(self, plain(self, *given, **named))

        setattr(progress_bar, "tells_who_draws", True)  # noqa: B010 -- a function has no such attribute to mypy
        DiffusionPipeline.progress_bar = progress_bar


def drawing_with(network: nn.Module) -> Pipeline | None:
    """Tell which pipeline draws with a network in this thread.

    Args:
        network: The network that denoises.

    Returns:
        The innermost pipeline at work that holds it; None where none does, or before `watch`.
    """
    holders = (pipeline for pipeline in reversed(_present.pipelines) if _holds(pipeline, network))
    return next(holders, None)


def uncompiled(module: nn.Module) -> nn.Module:
    """Reach the module that ``torch.compile`` wrapped: its paths are those of the base, and it carries the adapters.

    Args:
        module: Any module.

    Returns:
        The module inside of the wrapper; any other module itself.
    """
    while isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
        module = inner
    return module


def _holds(pipeline: Pipeline, network: nn.Module) -> bool:
    return any(isinstance(part, nn.Module) and uncompiled(part) is network for part in vars(pipeline).values())


def fused_attentions(network: nn.Module) -> list[str]:
    """Find attention layers that compute queries, keys and values from one copy of their weights.

    Args:
        network: The network that denoises.

    Returns:
        The paths of those that ``fuse_qkv_projections`` has changed, and ``unfuse_qkv_projections`` not changed back.
    """
    if getattr(network, "original_attn_processors", None) is None:  # which both of them leave there
        return []
    from diffusers.models.attention_processor import FusedAttnProcessor2_0

    named = network.named_modules()
    return [path for path, module in named if isinstance(getattr(module, "processor", None), FusedAttnProcessor2_0)]


def free_u(network: nn.Module) -> list[float] | None:
    """Tell how FreeU (``pipe.enable_freeu``) weighs what a network's up blocks take.

    Args:
        network: The network that denoises.

    Returns:
        ``s1``, ``s2``, ``b1`` and ``b2``; None where it is off, or the network has none.
    """
    for block in getattr(network, "up_blocks", ()):
        found = [getattr(block, name, None) for name in ("s1", "s2", "b1", "b2")]
        if all(one is not None for one in found):
            return [float(one) for one in found if one is not None]
    return None


def images_drawn(pipeline: Pipeline, rows: int) -> int:
    """Count the images in a call of the network that denoises.

    Args:
        pipeline: The one that draws.
        rows: Noisy latents in the batch, each once more for each kind of guidance: classifier-free, and perturbed attention.

    Returns:
        How many images are drawn.
    """
    perturbed = bool(getattr(pipeline, "do_perturbed_attention_guidance", False))
    return rows // (1 + bool(pipeline.do_classifier_free_guidance) + perturbed)


def progress(pipeline: Pipeline, now: float) -> float:
    """Tell how far a timestep is from the first of a pipeline's to the last; some samplers take one twice.

    Args:
        pipeline: The one that draws.
        now: The timestep.

    Returns:
        From 0 at the first to 1 at the last.

    Raises:
        UserError: It is not among them.
    """
    return place(pipeline.scheduler.timesteps.tolist(), now)


def place(timesteps: Sequence[float], now: float) -> float:
    """Tell how far a timestep is from the first to the last.

    Args:
        timesteps: Those of a picture; some samplers take one twice.
        now: The timestep.

    Returns:
        From 0 at the first to 1 at the last.

    Raises:
        UserError: It is not among them.
    """
    steps = list(dict.fromkeys(timesteps))
    nearest = min(range(len(steps)), key=lambda step: abs(steps[step] - now))
    if abs(steps[nearest] - now) > _NEAR:
        raise UserError(
            f"the network is called at timestep {now:g}, which is none of the scheduler's {len(steps)}: a schedule cannot"
            " tell how far that is; call it through the pipeline, or set a plain strength"
        )
    return nearest / max(1, len(steps) - 1)


def guides(pipe: Pipeline, timestep: float, stop: float) -> bool:
    """Tell whether guidance acts at a timestep.

    In a limited interval it spoils less of what was learned (Kynkäänniemi et al. 2024, https://arxiv.org/abs/2404.07724).

    Args:
        pipe: The pipeline.
        timestep: Where it is.
        stop: The share of the timesteps, from the noisiest, in which it acts.

    Returns:
        Whether it does.
    """
    steps: int = pipe.scheduler.config.num_train_timesteps
    return timestep >= (1 - stop) * steps


def computes_on(pipeline: Pipeline) -> torch.device:
    """Tell on which device a pipeline computes, wherever its parts wait.

    Args:
        pipeline: A pipeline of diffusers.

    Returns:
        The device.
    """
    # Each of both goes through all modules, so only one is asked.
    name = "_execution_device" if hasattr(type(pipeline), "_execution_device") else "device"
    device: torch.device = getattr(pipeline, name)
    return device


def guided_tensors(pipeline: Pipeline) -> list[str]:
    """Name the tensors that a pipeline holds twice over while it guides, and lets its callback replace.

    Args:
        pipeline: A pipeline of diffusers.

    Returns:
        The names, for `callback_on_step_end_tensor_inputs`.
    """
    private: Any = pipeline
    return [name for name in _DOUBLED if name in private._callback_tensor_inputs]


def end_guidance(pipeline: Pipeline, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Have a pipeline guide no more, from within its callback after a step.

    There is no public way: diffusers' own manual writes `_guidance_scale`, from which `do_classifier_free_guidance` follows
    (https://huggingface.co/docs/diffusers/using-diffusers/callback).

    Args:
        pipeline: The one that draws.
        tensors: What the callback was given: `guided_tensors`.

    Returns:
        The halves with the prompt, for the pipeline to go on with.
    """
    private: Any = pipeline
    private._guidance_scale = 1.0
    return {name: tensor.chunk(2)[1] for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def interrupt(pipeline: Pipeline) -> None:
    """Have a pipeline take no more steps, from within its callback after one, as diffusers' manual does it.

    Args:
        pipeline: The one that draws.
    """
    private: Any = pipeline
    private._interrupt = True


@contextmanager
def drawing(pipeline: Pipeline, scheduler: Any) -> Iterator[None]:
    """Give a pipeline a scheduler, and take its progress bar away.

    Args:
        pipeline: The pipeline.
        scheduler: The scheduler to draw with.

    Yields:
        Once; afterwards the pipeline has what it had.
    """
    before, bar = pipeline.scheduler, dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = scheduler
    try:
        yield
    finally:
        pipeline.scheduler = before
        pipeline.set_progress_bar_config(**bar)
