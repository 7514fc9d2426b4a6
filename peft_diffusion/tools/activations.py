"""A LoRA for an adapter that changes no weight, fitted on what its base computes while it draws.

At each site it is seen what goes into the layer and what the adapter adds to its output; the pair is the one of its rank
that comes nearest to that in the mean square (reduced-rank regression, Izenman 1975). An adapter of a whole sublayer gets
its pair at the layer that the sublayer ends with.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..bases import components, load_base
from ..bases.base import describe
from ..core import site as sites_of
from ..core.adapter import LowRank
from ..core.errors import UserError
from ..core.parsing import json_value
from ..core.reduction import Reduced
from ..core.weight_change import serves
from ..formats.planning import Plan
from ..generation import Adapters
from .results import trigger_phrases
from .sources import Source, Where
from .watch import Watch

_LAST_LAYERS = ("to_out.0", "net.2", "out_proj", "fc2")  # of attentions and feed-forwards, in UNets and in CLIP
_SUBJECTS = ("a house by a lake", "a portrait of a woman", "a red apple", "a cat")
_MOST_CAPTIONS, _STEPS, _GUIDANCE = 4, 6, 5.0
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean square of an input: directions that hardly occur are not fitted


def fitted(source: Source, sites: Sequence[Where], rank: int, base: str, watch: Watch) -> dict[Where, tuple[Where, Reduced]]:
    """Fit a pair for each of some sites.

    Args:
        source: The file.
        sites: Those whose adapters change no weight.
        rank: Of the pairs.
        base: The base, with its weights.
        watch: Is told how far it is.

    Returns:
        By site, where the pair sits, and the pair with its error: the norm of what it misses of what the adapter adds,
        against that of the whole, on a picture that it was not fitted on.

    Raises:
        UserError: The base cannot be read or does not fit, or a site ends with no layer that takes a pair.
    """
    pipe: Any = load_base(base, dtype="float32")
    adapters = Adapters(pipe)
    name = adapters.load(source.plan)
    parts = components(pipe)
    observed = {where: _Observed(parts[where[0]].get_submodule(where[1]), where) for where in sites}
    prompts = usual_prompts(source.plan)
    with ExitStack() as stack:
        for one in observed.values():
            stack.enter_context(one)
        for number, prompt in enumerate(watch.each("drawing to see what the base computes", prompts)):
            for one in observed.values():
                one.kept_apart = number == len(prompts) - 1
            draw(pipe, prompt, number)
    adapters.remove(name)
    return {where: ((where[0], one.place), one.solved(rank)) for where, one in observed.items()}


def draw(pipe: Any, prompt: str, seed: int) -> None:
    """Draw a picture in a few steps, to see what is computed meanwhile.

    Args:
        pipe: The pipeline, whose progress bar is off from now on.
        prompt: What it shows.
        seed: Of its noise.
    """
    size = describe(pipe).resolution
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    pipe(
        prompt,
        num_inference_steps=_STEPS,
        guidance_scale=_GUIDANCE,
        height=size,
        width=size,
        generator=generator,
        output_type="latent",
    )


def usual_prompts(plan: Plan) -> list[str]:
    """Give prompts for an adapter.

    Args:
        plan: Its file.

    Returns:
        What it was trained on, as far as the file tells, and common subjects with its triggers; at least two.
    """
    found = dict.fromkeys(_captions(plan)[:_MOST_CAPTIONS])
    words = ", ".join(trigger_phrases(plan))
    found |= dict.fromkeys(f"{words}, {subject}" if words else subject for subject in _SUBJECTS)
    return list(found)


def _captions(plan: Plan) -> list[str]:
    """The captions or tags that the metadata name, the most frequent first."""
    told: object = plan.spec.training.get("tag_frequency") if plan.spec is not None else None
    try:
        told = json_value(told) if isinstance(told, str) else told
        told = json_value(plan.header.metadata.get("ss_tag_frequency", "{}")) if told is None else told
    except (ValueError, json.JSONDecodeError):  # of another program: shown, and never relied on
        return []
    folders = told.values() if isinstance(told, Mapping) else ()
    counts: dict[str, int] = {}
    for folder in folders:
        for tag, count in folder.items() if isinstance(folder, Mapping) else ():
            counts[str(tag)] = counts.get(str(tag), 0) + (count if isinstance(count, int) else 0)
    return sorted(counts, key=lambda tag: -counts[tag])


@dataclass
class _Sums:
    """Sums over all positions: of inputs by inputs, of outputs by inputs, and of squared outputs."""

    inputs: Tensor
    across: Tensor
    outputs: float = 0.0

    def add(self, x: Tensor, change: Tensor) -> None:
        """Take the products to the processor, which holds and solves them for bases on any device."""
        self.inputs += (x.T @ x).cpu()
        self.across += (change.T @ x).cpu()
        self.outputs += float(change.square().sum())

    def missed(self, weight: Tensor) -> float:
        """The squared norm of what a weight makes of the inputs otherwise than the adapter."""
        return self.outputs - 2 * float((weight * self.across).sum()) + float(((weight @ self.inputs) * weight).sum())


class _Observed:
    """A site while the base draws; a context that watches it inside."""

    def __init__(self, module: nn.Module, where: Where) -> None:
        self.module = module
        path, self.layer = _layer(module, where)
        self.place = f"{where[1]}.{path}" if path else where[1]
        weight: Any = self.layer.weight
        outputs, inputs = len(weight), weight[0].numel()
        self.sums = [_Sums(torch.zeros(inputs, inputs), torch.zeros(outputs, inputs)) for _ in range(2)]
        self.kept_apart = False
        self._seen: Tensor | None = None
        self._computing = False

    def __enter__(self) -> "_Observed":
        self._hooks = [self.module.register_forward_hook(self._compare, with_kwargs=True)]
        if self.layer is not self.module:
            self._hooks.append(self.layer.register_forward_pre_hook(self._see))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        if self._computing:
            self._seen = args[0]

    @torch.no_grad()
    def _compare(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._computing:
            return
        self._seen, self._computing = (args[0] if args and self.layer is module else None), True
        try:
            plain = sites_of.base_class(module).forward(module, *args, **kwargs)
        finally:
            self._computing = False
        after, before = (one[0] if isinstance(one, tuple) else one for one in (output, plain))
        if self._seen is not None:
            x, change = _rows(self.layer, self._seen, after - before)
            self.sums[self.kept_apart].add(x, change)

    def solved(self, rank: int) -> Reduced:
        """The pair of a rank that comes nearest on what was kept apart, of those of several ridges, and its error there."""
        check = self.sums[True]
        found = [(pair, check.missed(pair.up @ pair.down)) for pair in (self._pair(rank, ridge) for ridge in _RIDGES)]
        pair, missed = min(found, key=lambda one: one[1])
        if missed >= check.outputs:  # no pair is better than none
            pair, missed = LowRank(pair.down, torch.zeros_like(pair.up)), check.outputs
        error = math.sqrt(max(0.0, missed) / check.outputs) if check.outputs else 0.0
        return Reduced(pair, error, math.sqrt(check.outputs))

    def _pair(self, rank: int, ridge: float) -> LowRank:
        fit = self.sums[False]
        inputs = fit.inputs.double()
        side = len(inputs)
        inputs = inputs + torch.eye(side, dtype=inputs.dtype) * (ridge * float(inputs.trace()) / side + 1e-12)
        root = torch.linalg.cholesky(inputs)
        whitened = torch.linalg.solve_triangular(root, fit.across.double().T, upper=False).T
        u, values, v = torch.linalg.svd(whitened, full_matrices=False)
        kept = min(rank, len(values))
        roots = values[:kept].sqrt()
        down = torch.linalg.solve_triangular(root.T, (roots[:, None] * v[:kept]).T, upper=True).T
        return LowRank(down.float(), (u[:, :kept] * roots).float())


def _layer(module: nn.Module, where: Where) -> tuple[str, nn.Module]:
    """The layer of a site that takes a pair, and its path in it. Raises UserError where there is none."""
    if serves(module):
        return "", module
    for path in _LAST_LAYERS:
        try:
            found = module.get_submodule(path)
        except AttributeError:
            continue
        if serves(found):
            return path, found
    raise UserError(f"{'.'.join(where)} is a {type(module).__name__}, which ends with no layer that a LoRA is known to take")


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Bring what goes into a layer into the form that its weight, as a matrix, multiplies.

    Args:
        layer: A Linear, or a convolution without groups.
        x: Its input.

    Returns:
        (positions, inputs), float32; of a convolution the inputs of its kernel.
    """
    if isinstance(layer, nn.Conv2d):
        size: Any = layer.kernel_size
        shape: dict[str, Any] = {"dilation": layer.dilation, "padding": layer.padding, "stride": layer.stride}
        patches = F.unfold(x, size, **shape).transpose(1, 2)
        return patches.reshape(-1, patches.shape[-1]).float()
    return x.reshape(-1, x.shape[-1]).float()


def _rows(layer: nn.Module, x: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and changes, a row for each position."""
    if change.ndim == 4:  # of a convolution, or of an attention that was given a picture
        change = change.flatten(2).transpose(1, 2)
    return input_rows(layer, x), change.reshape(-1, change.shape[-1]).float()
