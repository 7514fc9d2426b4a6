"""Checkpoints of one file, in the layout of the original Stable Diffusion, read without a network."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..core.errors import UserError, first_line
from ..core.meta import shapes_alone
from ..core.parsing import refusing
from ..core.wording import number_of
from .architectures import Architecture

_UNET = "model.diffusion_model."
_IN = f"{_UNET}input_blocks.0.0.weight"  # (320, channels of its input, 3, 3)
_CROSS = f"{_UNET}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"  # (320, width of the text); absent in XL
_XL = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
_REFINER = "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias"
_HINT = "controlnet_cond_embedding"  # what looks at the picture
_LABELS = {
    f"label_emb.0.{there}.{kind}": f"add_embedding.linear_{here}.{kind}"
    for there, here in ((0, 1), (2, 2))
    for kind in ("weight", "bias")
}  # of XL, which diffusers' conversion leaves out
_NORM = f"{_UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_V_PREDICTION, _ZERO_SNR = "v_pred", "ztsnr"  # empty tensors that trainers put into such checkpoints
_TOLD = "modelspec.prediction_type"  # of the metadata: https://github.com/Stability-AI/ModelSpec
_TOLD_AS = {"v": True, "v_prediction": True, "v-prediction": True, "epsilon": False, "eps": False}
_KINDS = "Stable Diffusion 1, 2 and XL, and their inpainting versions"

# Stable Diffusion 2 is trained to predict noise or v, and does not say which. ComfyUI tells them by the spread of this
# norm's bias (comfy/supported_models.py, SD20): what was trained on to predict v has more.
_V_SPREAD = 0.09


def read(path: Path, dtype: torch.dtype) -> Any:
    """Read a checkpoint of one file, with diffusers' own conversion.

    A ``.ckpt`` is read without running code that it may hold.

    Args:
        path: ``.safetensors`` or ``.ckpt``.
        dtype: That of the pipeline.

    Returns:
        The pipeline.

    Raises:
        UserError: It is no Stable Diffusion 1, 2 or XL, or is damaged.
    """
    if path.suffix not in (".safetensors", ".ckpt"):
        raise UserError(f"{path} is no checkpoint: a single file ends in .safetensors or .ckpt")
    found = architecture(path)
    with tempfile.TemporaryDirectory() as folder:
        found.write(Path(folder))
        cls = getattr(diffusers, found.pipeline)
        try:
            pipe = cls.from_single_file(str(path), config=folder, torch_dtype=dtype, local_files_only=True)
        except NotImplementedError:  # torch's, of a tensor that got no data
            raise UserError(f"{path} lacks tensors that a {found.pipeline} has; it is not whole") from None
    pipe.register_to_config(_name_or_path=str(path))  # by which adapters name their base
    return pipe


def architecture(path: Path) -> Architecture:
    """Tell what a checkpoint is of, by the names and shapes of its tensors.

    Args:
        path: ``.safetensors`` or ``.ckpt``.

    Returns:
        The architecture.

    Raises:
        UserError: As `read`.
    """
    return _header(path) if path.suffix == ".safetensors" else _pickled(path)


def _header(path: Path) -> Architecture:
    with refusing(f"{path} is no whole .safetensors file"), safe_open(path, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        told = (file.metadata() or {}).get(_TOLD, "")
        return _architecture(path, shapes, file.get_tensor(_NORM) if _NORM in shapes else None, _TOLD_AS.get(told.lower()))


def _pickled(path: Path) -> Architecture:
    tensors = unpickled(path)
    return _architecture(path, {name: tuple(value.shape) for name, value in tensors.items()}, tensors.get(_NORM))


def unpickled(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint that was pickled, running nothing that it may hold.

    Args:
        path: The ``.ckpt`` or ``.pt``.

    Returns:
        Its tensors by name, left on the disk until they are looked at.

    Raises:
        UserError: It is damaged, or holds more than tensors.
    """
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # damage has no list of what it raises
        raise UserError(
            f"{path} cannot be read without running code that it may hold ({first_line(error)[:120]}); take the"
            " .safetensors of this checkpoint"
        ) from None
    while isinstance(loaded, Mapping) and "state_dict" in loaded:
        loaded = loaded["state_dict"]
    items = loaded.items() if isinstance(loaded, Mapping) else ()
    return {str(name): value for name, value in items if isinstance(value, Tensor)}


def _architecture(
    path: Path, shapes: Mapping[str, tuple[int, ...]], norm: Tensor | None, told: bool | None = None
) -> Architecture:
    """The architecture that these names and shapes say; ``told`` is whether the metadata say that it predicts v."""
    if _REFINER in shapes:
        raise UserError(f"{path} is the refiner of Stable Diffusion XL, which finishes pictures; take the base of it")
    first, cross = shapes.get(_IN), shapes.get(_CROSS)
    width = cross[-1] if cross else None
    if first is None or len(first) != 4 or (_XL not in shapes and width not in (768, 1024)):
        raise UserError(f"{path} is no checkpoint of a Stable Diffusion that is known here: {_KINDS}")
    channels = first[1]
    if channels not in (4, 9):
        raise UserError(f"{path}: its UNet takes {channels} channels, so it is none of {_KINDS}")
    predicts_v = _V_PREDICTION in shapes or bool(told)  # a mark among the tensors outlives metadata that a merge leaves
    marks = {"v_prediction": predicts_v, "zero_snr": _ZERO_SNR in shapes}
    if _XL in shapes:
        return Architecture("sdxl", channels == 9, **marks)
    if width == 768:
        return Architecture("sd1", channels == 9, **marks)
    spread = 0.0 if norm is None or channels == 9 else float(norm.float().std(unbiased=False))
    of_norm = spread > _V_SPREAD if told is None else predicts_v
    return Architecture("sd2-v" if of_norm else "sd2", channels == 9, **marks)


def controlnet(path: Path, network: Any) -> Any:
    """Read a ControlNet of one file, with diffusers' own conversion; the shape is that of the base's network.

    Args:
        path: ``.safetensors``, ``.pth``, ``.pt`` or ``.bin``, in the layout of ControlNet or of diffusers.
        network: The UNet that it is for.

    Returns:
        The ControlNet, on the CPU, without gradients.

    Raises:
        UserError: It is none, is damaged, or is for another kind of base.
    """
    if path.suffix == ".safetensors":
        with refusing(f"{path} is no whole .safetensors file"):
            tensors = load_file(path)
    else:
        tensors = unpickled(path)
    found = convert_controlnet_checkpoint(tensors, network.config)
    bare = {name.removeprefix("control_model."): tensor for name, tensor in tensors.items()}
    found |= {_LABELS[name]: tensor for name, tensor in bare.items() if name in _LABELS}
    hints = (found.get(f"{_HINT}.{name}.weight") for name in ("conv_in", "blocks.1", "blocks.3", "blocks.5"))
    channels = tuple(len(hint) for hint in hints if hint is not None)
    with shapes_alone():
        model = diffusers.ControlNetModel.from_unet(
            network, load_weights_from_unet=False, conditioning_embedding_out_channels=channels or (16, 32, 96, 256)
        )
    wanted = {name: tuple(one.shape) for name, one in model.state_dict().items()}
    there = {name: tuple(one.shape) for name, one in found.items() if one is not None}
    if there != wanted:
        differing = sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))
        told = number_of(len(differing), "tensor")
        raise UserError(
            f"{path} is no ControlNet, or of another kind of base: {told} not as in one of this base,"
            f" first {differing[0]} {there.get(differing[0], 'missing')}; take one that was made for this base"
        )
    model.load_state_dict(found, assign=True)
    return model.requires_grad_(False).eval()
