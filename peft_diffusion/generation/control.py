"""ControlNets, T2I-Adapters and IP-Adapters beside a base, for as long as it draws: on every pipeline of its network."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from ..bases import denoiser_of, single_file
from ..bases.base import dtype_of
from ..bases.loading import is_hub_id, quiet
from ..bases.pipelines import Pipeline, computes_on
from ..core.errors import UserError, first_line
from ..core.files import weights_sha256
from ..core.parsing import refusing
from ..fast import drawing as fast
from ..fast.parts import PartEngine
from ..formats.container import sha256
from .control_settings import Control
from .recipe import UsedControl
from .source import opened

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_HUB_PARTS = 2  # owner and name


def used(controls: Sequence[Control], scale: float) -> tuple[UsedControl, ...]:
    """Tell what recipes say of controls.

    Args:
        controls: What was asked for.
        scale: What the scale of all is multiplied by.

    Returns:
        One each.

    Raises:
        UserError: A model is not there.
    """
    found = []
    for one in controls:
        weights, picture = _weights(one), sha256(one.picture)
        found.append(UsedControl(one.kind, one.model, weights_sha256(weights), str(one.picture), picture, one.scale * scale))
    return tuple(found)


def _weights(control: Control) -> Path:
    """The file of a model, fetched from the hub where it is no file or folder here. Raises UserError."""
    place = Path(control.model).expanduser()
    names: tuple[str, ...] = _WEIGHTS
    if place.is_file() and control.kind != "t2i-adapter":
        return place
    if control.kind == "ip-adapter":
        parts = Path(control.model).parts
        hub_id, names = "/".join(parts[:_HUB_PARTS]), ("/".join(parts[_HUB_PARTS:]),)
    else:
        hub_id = control.model
        if place.is_dir():
            there = [place / name for name in names if (place / name).is_file()]
            if not there:
                raise UserError(f"the folder {place} holds no {' or '.join(names)}, so it is no {control.kind} of diffusers")
            return there[0]
    if place.exists() or not is_hub_id(hub_id) or not all(names):
        raise UserError(f"there is no {control.kind} {control.model}; {_wanted(control.kind)}")
    problem = ""
    for name in names:
        try:
            return Path(hf_hub_download(hub_id, name))
        except Exception as error:  # the hub's library has no list of what it raises
            problem = first_line(error)
    raise UserError(f"the {control.kind} {control.model} cannot be fetched from the hub: {problem}")


def _wanted(kind: str) -> str:
    if kind == "ip-adapter":
        return "name its file, or one of the hub as h94/IP-Adapter/models/ip-adapter_sd15.safetensors"
    return f"name a folder of diffusers{', a file' if kind == 'controlnet' else ''} or a hub id"


@dataclass
class _Steering:
    """A ControlNet or T2I-Adapter at work on a network, in the thread that made it.

    What it adds goes into the call of the network, so that it acts in every pipeline and in both passes of a picture.
    """

    control: Control
    model: Any
    picture: Image.Image
    scale: float
    factor: int
    channels: int
    made: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    thread: int = field(default_factory=threading.get_ident)

    def __call__(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add what the model makes of the picture to what the network is called with."""
        if threading.get_ident() != self.thread:
            return None
        sample: Tensor = args[0] if args else kwargs["sample"]
        seen = self._seen(sample)
        if self.control.kind == "t2i-adapter":
            name, found = "down_intrablock_additional_residuals", self._features(network, seen, sample)
            return args, kwargs | {name: _summed(kwargs.get(name), found)}
        down, middle = self.model(
            sample[:, : self.channels],  # without the mask and what it leaves, of a base that inpaints
            args[1] if len(args) > 1 else kwargs["timestep"],
            encoder_hidden_states=kwargs["encoder_hidden_states"],
            controlnet_cond=seen.expand(len(sample), -1, -1, -1),
            conditioning_scale=self.scale,
            added_cond_kwargs=kwargs.get("added_cond_kwargs"),
            return_dict=False,
        )
        before = kwargs.get("mid_block_additional_residual")
        down = _summed(kwargs.get("down_block_additional_residuals"), down)
        middle = middle if before is None else before + middle
        return args, kwargs | {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    def _seen(self, sample: Tensor) -> Tensor:
        """The picture at the size of what is drawn, from 0 to 1, (1, channels, height, width)."""
        height, width = (side * self.factor for side in sample.shape[-2:])
        if (height, width) not in self.made:
            gray = self.control.kind == "t2i-adapter" and self.model.config.in_channels == 1
            processor = VaeImageProcessor(do_normalize=False, do_convert_rgb=not gray, do_convert_grayscale=gray)
            self.made[height, width] = processor.preprocess(self.picture, height, width).to(sample)
        return self.made[height, width]

    def _features(self, network: Any, seen: Tensor, sample: Tensor) -> list[Tensor]:
        found = [one * self.scale for one in self.model(seen)]
        shapes, wanted = [tuple(one.shape[1:]) for one in found], _taken(network, sample)
        if shapes[: len(wanted)] != wanted:
            raise UserError(_of_another(self.control, f"features {shapes}, not {wanted}"))
        return [one.expand(len(sample), -1, -1, -1) for one in found]


def _taken(network: Any, sample: Tensor) -> list[tuple[int, ...]]:
    """The shapes of features that the down blocks of a UNet of diffusers take, (channels, height, width) each."""
    sides, found = list(sample.shape[-2:]), []
    for block, channels in zip(network.down_blocks, network.config.block_out_channels, strict=True):
        after = [-(-side // 2) for side in sides] if block.downsamplers else sides
        found.append((channels, *(sides if getattr(block, "has_cross_attention", False) else after)))
        sides = after
    return found


def _summed(before: Sequence[Tensor] | None, found: Sequence[Tensor]) -> list[Tensor]:
    """What several add, a new list each time: a network takes its parts off it."""
    return list(found) if before is None else [one + other for one, other in zip(before, found, strict=True)]


def _of_another(control: Control, what: str) -> str:
    return f"the {control.kind} {control.model} is of another kind of base ({what}); take one that was made for this base"


@dataclass(frozen=True)
class Controls:
    """What steers a base.

    Attributes:
        arguments: What the pipeline is called with besides.
        modules: Those that run beside its own.
        steer: Makes a context in which the network is steered, in the thread that enters it.
    """

    arguments: dict[str, Any]
    modules: tuple[nn.Module, ...]
    steer: Callable[[], Any]


@contextmanager
def controlled(pipe: Pipeline, controls: Sequence[Control], scale: float) -> Iterator[Controls]:
    """Load controls for as long as the context is open.

    Args:
        pipe: The pipeline.
        controls: What was asked for.
        scale: What the scale of all is multiplied by.

    Yields:
        What steers.

    Raises:
        UserError: A model is not there, or is not for this base.
    """
    denoiser = denoiser_of(pipe)
    if controls and not isinstance(denoiser.network, diffusers.UNet2DConditionModel):
        raise UserError(f"--control is for a UNet, and {type(pipe).__name__} has a {type(denoiser.network).__name__}")
    steerings = [
        _Steering(one, _loaded(pipe, one), opened(one.picture), one.scale * scale, denoiser.factor, denoiser.channels)
        for one in controls
        if one.kind != "ip-adapter"
    ]
    if fast.engine_of(denoiser.network) is not None:
        for one in steerings:  # which end with this context, and their engines with them
            fast.start(one.model, fast.Engine if one.control.kind == "controlnet" else PartEngine)
    shown = [one for one in controls if one.kind == "ip-adapter"]

    before: list[Callable[..., Any]] = [*steerings, *([_of_guided] if shown else [])]

    @contextmanager
    def steer() -> Iterator[None]:
        with ExitStack() as hooks:
            for one in before:
                hook = denoiser.network.register_forward_pre_hook(one, with_kwargs=True)
                hooks.callback(hook.remove)
            yield

    with _shown(pipe, shown, scale) as arguments:
        yield Controls(arguments, tuple(one.model for one in steerings), steer)


def _of_guided(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Leave out of what IP-Adapters show the half without picture, where guidance has ended.

    A pipeline makes it once, before its first step, and lets no callback replace it; the attention would take the rows of
    both halves for more tokens of fewer pictures.
    """
    sample: Tensor = args[0] if args else kwargs["sample"]
    told = kwargs.get("added_cond_kwargs") or {}
    shown = told.get("image_embeds", ())
    if not any(len(one) > len(sample) for one in shown):
        return None
    return args, kwargs | {"added_cond_kwargs": told | {"image_embeds": [one[-len(sample) :] for one in shown]}}


def _loaded(pipe: Pipeline, control: Control) -> Any:
    """A ControlNet or T2I-Adapter on the device. Raises UserError."""
    weights = _weights(control)
    place = Path(control.model).expanduser()
    if place.is_file():
        return single_file.controlnet(place, denoiser_of(pipe).network).to(computes_on(pipe), dtype_of(pipe))
    kind: Any = diffusers.ControlNetModel if control.kind == "controlnet" else diffusers.T2IAdapter
    told = {"torch_dtype": dtype_of(pipe), "use_safetensors": weights.suffix == ".safetensors"}
    with quiet(diffusers_logging, transformers_logging), refusing(f"the {control.kind} {control.model} cannot be read"):
        model = kind.from_pretrained(str(place) if place.is_dir() else control.model, **told)
    model = model.to(computes_on(pipe)).requires_grad_(False).eval()
    wanted = getattr(denoiser_of(pipe).network.config, "cross_attention_dim", None)
    if control.kind == "controlnet" and model.config.cross_attention_dim != wanted:
        raise UserError(_of_another(control, f"text of {model.config.cross_attention_dim} channels, not {wanted}"))
    return model


@contextmanager
def _shown(pipe: Any, controls: Sequence[Control], scale: float) -> Iterator[dict[str, Any]]:
    """IP-Adapters on a pipeline, which has afterwards what it had."""
    if not controls:
        yield {}
        return
    if not hasattr(pipe, "load_ip_adapter") or not hasattr(pipe, "image_encoder"):
        raise UserError(f"a {type(pipe).__name__} takes no IP-Adapter")
    unet: Any = denoiser_of(pipe).network
    parts = ("image_encoder", "feature_extractor")
    processors, projection = dict(unet.attn_processors), unet.encoder_hid_proj
    kind, before = unet.config.encoder_hid_dim_type, {name: getattr(pipe, name) for name in parts}
    try:
        _load_ip_adapters(pipe, controls)
        pipe.set_ip_adapter_scale([one.scale * scale for one in controls])
        yield {"ip_adapter_image": [opened(one.picture) for one in controls]}
    finally:
        unet.set_attn_processor(processors)
        unet.encoder_hid_proj, unet.config.encoder_hid_dim_type = projection, kind
        pipe.register_modules(**before)


def _load_ip_adapters(pipe: Any, controls: Sequence[Control]) -> None:
    places = []
    for one in controls:
        weights = _weights(one)
        if Path(one.model).expanduser().is_file():
            places.append((str(weights.parent), "", weights.name))
        else:
            parts = Path(one.model).parts
            places.append(("/".join(parts[:_HUB_PARTS]), "/".join(parts[_HUB_PARTS:-1]), parts[-1]))
    folders, subfolders, names = (list(column) for column in zip(*places, strict=True))
    try:
        with quiet(diffusers_logging, transformers_logging):
            pipe.load_ip_adapter(folders, subfolder=subfolders, weight_name=names)
    except OSError as error:
        raise UserError(
            f"the IP-Adapter {controls[0].model} needs its image encoder in the folder image_encoder beside it:"
            f" {first_line(error)}"
        ) from error
    except Exception as error:  # diffusers has no list of what it raises for the weights of another base
        raise UserError(_of_another(controls[0], first_line(error))) from error
    network: Any = denoiser_of(pipe).network
    own = [one for one in network.attn_processors.values() if isinstance(one, nn.Module)]
    for part in (*own, network.encoder_hid_proj, pipe.image_encoder):
        part.to(device=computes_on(pipe), dtype=dtype_of(pipe)).requires_grad_(False).eval()
