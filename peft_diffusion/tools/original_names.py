"""What a checkpoint of one file calls the tensors of a base: the names of the original Stable Diffusion, and of open_clip.

kohya's trainer, A1111, Forge and ComfyUI read such files. The UNet's names are those of the layout ``original``; here are
the autoencoder's and the text encoders', of which open_clip's keeps query, key and value of an attention as one.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor, nn

from ..formats.layouts.original import original_names
from ..formats.names import TEXT_MODEL

Form: TypeAlias = Literal["same", "turned", "convolution"]
"""How a tensor lies in such a file: as diffusers has it, with its sides exchanged, or as a convolution of kernel 1."""

VAE = "vae"
_OPEN_CLIP_WIDTH = 1024  # of the text encoder of Stable Diffusion 2; that of 1 is CLIP's own, of 768
_OF_ENCODER_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OF_ENCODER = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OF_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


@dataclass(frozen=True)
class Row:
    """A tensor of a single file and what it is made of.

    Attributes:
        name: What the file calls it.
        component: The part of the base.
        keys: The tensors of that part, in diffusers' names; of several, one below the other.
        form: How it lies in the file.
    """

    name: str
    component: str
    keys: tuple[str, ...]
    form: Form = "same"


def rows(parts: Mapping[str, nn.Module]) -> list[Row]:
    """List the tensors of a base as a single file has them.

    Args:
        parts: The UNet, the text encoders and the autoencoder, by name; they may be on the meta device.

    Returns:
        A row for each tensor of the file.
    """
    return [row for component, module in parts.items() for row in _rows(component, module, parts)]


def _rows(component: str, module: nn.Module, parts: Mapping[str, nn.Module]) -> Iterable[Row]:
    keys = [bare(key) for key in module.state_dict()]
    if component == VAE:
        return _of_vae(keys)
    if component == "unet":
        return _of_unet(module, keys)
    prefix, is_open_clip = _encoder_prefix(component, module, parts)
    if is_open_clip:
        return _of_open_clip(component, keys, prefix)
    return [Row(f"{prefix}{TEXT_MODEL}{key}", component, (key,)) for key in keys]


def bare(key: str) -> str:
    """Spell the name of a tensor as all versions of transformers and diffusers are compared.

    Args:
        key: Its name in a state dict or a file.

    Returns:
        Without ``text_model.``, which transformers 5 dropped, and with the newer names of an autoencoder's attention.
    """
    plain = key.removeprefix(TEXT_MODEL)
    older = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    match = re.fullmatch(r"(.*mid_block\.attentions\.0\.)(query|key|value|proj_attn)\.(weight|bias)", plain)
    return f"{match[1]}{older[match[2]]}.{match[3]}" if match else plain


def _of_unet(module: nn.Module, keys: Iterable[str]) -> Iterator[Row]:
    names = original_names(module)
    for key in keys:
        path, _, kind = key.rpartition(".")
        if path in names:
            yield Row(f"model.diffusion_model.{names[path]}.{kind}", "unet", (key,))


def _encoder_prefix(component: str, module: nn.Module, parts: Mapping[str, nn.Module]) -> tuple[str, bool]:
    """What the names of a text encoder begin with, and whether they are open_clip's."""
    if component == "text_encoder_2":  # the refiner has no other
        return f"conditioner.embedders.{int('text_encoder' in parts)}.model.", True
    if "text_encoder_2" in parts:
        return "conditioner.embedders.0.transformer.", False
    width = next(tensor.shape[1] for key, tensor in module.state_dict().items() if bare(key) == _TOKENS)
    is_open_clip = width == _OPEN_CLIP_WIDTH
    return ("cond_stage_model.model." if is_open_clip else "cond_stage_model.transformer."), is_open_clip


_TOKENS = "embeddings.token_embedding.weight"


def _of_open_clip(component: str, keys: Iterable[str], prefix: str) -> Iterator[Row]:
    for key in keys:
        if key in _OF_ENCODER:
            yield Row(prefix + _OF_ENCODER[key], component, (key,))
        elif key == "text_projection.weight":
            yield Row(f"{prefix}text_projection", component, (key,), "turned")
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key):
            place = f"{prefix}transformer.resblocks.{match[1]}"
            if match[2] in _OF_ENCODER_LAYER:
                yield Row(f"{place}.{_OF_ENCODER_LAYER[match[2]]}.{match[3]}", component, (key,))
            elif match[2] == "self_attn.q_proj":
                three = tuple(key.replace("q_proj", f"{letter}_proj") for letter in "qkv")
                yield Row(f"{place}.attn.in_proj_{match[3]}", component, three)


def _of_vae(keys: Iterable[str]) -> Iterator[Row]:
    keys = list(keys)
    up_blocks = [int(match[1]) for key in keys if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", key))]
    last = max(up_blocks, default=0)
    for key in keys:
        path, _, kind = key.rpartition(".")
        attention = re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)", path)
        if attention:
            name = f"{attention[1]}.mid.attn_1.{_OF_VAE_ATTENTION[attention[2]]}"
            is_matrix = attention[2] != "group_norm" and kind == "weight"
            yield Row(f"first_stage_model.{name}.{kind}", VAE, (key,), "convolution" if is_matrix else "same")
        else:
            yield Row(f"first_stage_model.{_vae_module(path, last)}.{kind}", VAE, (key,))


def _vae_module(path: str, last: int) -> str:
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.(\d)\.(.+)", path):
        return f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
    if match := re.fullmatch(r"(?:en|de)coder\.(down|up)_blocks\.(\d+)\.(.+)", path):
        down = match[1] == "down"
        place = f"encoder.down.{match[2]}" if down else f"decoder.up.{last - int(match[2])}"
        inner = re.sub(r"^resnets\.", "block.", match[3]).replace("conv_shortcut", "nin_shortcut")
        inner = re.sub(r"^(down|up)samplers\.0\.", r"\1sample.", inner)
        return f"{place}.{inner}"
    return path.replace("conv_norm_out", "norm_out")


def laid(row: Row, tensors: Iterable[Tensor]) -> Tensor:
    """Bring tensors of a part into the form of a single file.

    Args:
        row: What it is made of.
        tensors: Those, in the row's order.

    Returns:
        The tensor of the file.
    """
    import torch

    every = tuple(tensors)
    whole = every[0] if len(every) == 1 else torch.cat(every)
    if row.form == "turned":
        return whole.T
    return whole[:, :, None, None] if row.form == "convolution" and whole.ndim == 2 else whole


def taken(row: Row, key: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Take a tensor of a part out of one of a single file: the inverse of `laid`.

    Args:
        row: What that is made of.
        key: The one that is wanted.
        tensor: Of the file.
        shape: What the part has it in: some files have matrices as convolutions with a kernel of 1, or the reverse.

    Returns:
        The tensor of the part.
    """
    whole = tensor.T if row.form == "turned" else tensor
    if len(row.keys) > 1:
        whole = whole.chunk(len(row.keys))[row.keys.index(key)]
    return whole.reshape(shape)
