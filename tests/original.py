"""Checkpoints in the layout of the original Stable Diffusion, made from diffusers' models: what loading undoes."""

import re
from collections.abc import Iterator

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, UNet2DConditionModel
from torch import Tensor
from transformers import PreTrainedModel

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_OUTER = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


def checkpoint(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """All tensors of a pipeline under the names of the original."""
    found = {f"model.diffusion_model.{_unet(name, pipe.unet)}": tensor for name, tensor in _tensors(pipe.unet)}
    found |= dict(_vae(pipe.vae))
    if getattr(pipe, "text_encoder_2", None) is not None:
        found |= dict(_clip(pipe.text_encoder, "conditioner.embedders.0.transformer."))
        found |= dict(_open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model."))
    elif pipe.text_encoder.config.hidden_size == 1024:
        found |= dict(_open_clip(pipe.text_encoder, "cond_stage_model.model."))
    else:
        found |= dict(_clip(pipe.text_encoder, "cond_stage_model.transformer."))
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _tensors(model: ModelMixin | PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    yield from model.state_dict().items()


def _unet(name: str, unet: UNet2DConditionModel) -> str:
    layers = unet.config.layers_per_block
    for ours, theirs in _OUTER.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
        side, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        number = (layers + 1) * block + layer
        place = f"input_blocks.{number + 1}" if side == "down" else f"output_blocks.{number}"
        return f"{place}.0.{_resnet(rest)}" if kind == "resnets" else f"{place}.1.{rest}"
    if match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", name):
        return f"input_blocks.{(layers + 1) * (int(match[1]) + 1)}.0.op.{match[2]}"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.*)", name):
        block = int(match[1])
        after = 2 if "CrossAttn" in unet.config.up_block_types[block] else 1
        return f"output_blocks.{(layers + 1) * block + layers}.{after}.conv.{match[2]}"
    match = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name)
    assert match, name
    return f"middle_block.{2 * int(match[2])}.{_resnet(match[3])}" if match[1] == "resnets" else f"middle_block.1.{match[3]}"


def _resnet(rest: str) -> str:
    part, _, kind = rest.rpartition(".")
    return f"{_RESNET[part]}.{kind}"


def _vae(vae: AutoencoderKL) -> Iterator[tuple[str, Tensor]]:
    last = len(vae.config.block_out_channels) - 1
    for name, tensor in _tensors(vae):
        name = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)", r"encoder.down.\1.block.\2", name)
        name = re.sub(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample", name)
        name = re.sub(
            r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"decoder.up.{last - int(m[1])}.block.{m[2]}", name
        )
        name = re.sub(r"decoder\.up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"decoder.up.{last - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        if "mid_block.attentions.0" in name:
            parts = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
            for ours, theirs in parts.items():
                name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        yield f"first_stage_model.{name}", tensor


def _clip(encoder: PreTrainedModel, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in _tensors(encoder):
        yield f"{prefix}text_model.{name.removeprefix('text_model.')}", tensor


def _open_clip(encoder: PreTrainedModel, prefix: str) -> Iterator[tuple[str, Tensor]]:
    outer = {
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias",
    }  # fmt: skip
    inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    own = {name.removeprefix("text_model."): tensor for name, tensor in _tensors(encoder)}
    for name, tensor in own.items():
        if name in outer:
            yield prefix + outer[name], tensor
        elif name == "text_projection.weight":
            yield f"{prefix}text_projection", tensor.T
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name):
            place = f"{prefix}transformer.resblocks.{match[1]}"
            if match[2] in inner:
                yield f"{place}.{inner[match[2]]}.{match[3]}", tensor
            elif match[2] == "self_attn.out_proj":
                yield f"{place}.attn.out_proj.{match[3]}", tensor
            elif match[2] == "self_attn.q_proj":
                three = [own[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                yield f"{place}.attn.in_proj_{match[3]}", torch.cat(three)
