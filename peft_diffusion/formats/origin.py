"""Which model an adapter file is for, told from the names, shapes and metadata in its header. Imports no torch.

Files of models that this package does not run are named too. The names are those that kohya's sd-scripts, ComfyUI
(``comfy/lora.py``), diffusers (``loaders/lora_conversion_utils.py``) and OneTrainer give the modules; what a metadata entry
says is in ``library/sai_model_spec.py`` of sd-scripts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .container import Header

_SD1, _SD2, _SDXL = "Stable Diffusion 1", "Stable Diffusion 2", "Stable Diffusion XL"
_REFINER = "Stable Diffusion XL refiner"
_LANGUAGE = "a language model"
_FAMILIES: Mapping[str, str] = {_SD1: "sd1", _SD2: "sd2", _SDXL: "sdxl", _LANGUAGE: "lm"}
RUN = frozenset(_FAMILIES)
"""What this package runs."""

_FLUX, _SD3, _QWEN, _Z, _LUMINA = "Flux.1", "Stable Diffusion 3", "Qwen-Image", "Z-Image", "Lumina 2"
_WAN, _HUNYUAN = "Wan", "HunyuanVideo"

# By what kohya's trainer and others write: ss_base_model_version, or modelspec.architecture without what follows a slash.
_TOLD: tuple[tuple[str, str], ...] = (
    (r"sdxl[-_]refiner.*|stable-diffusion-xl-v1-refiner", _REFINER),
    (r"sdxl.*|stable-diffusion-xl.*", _SDXL),
    (r"sd_v1.*|sd_1.*|stable-diffusion-v1.*", _SD1),
    (r"sd_v2.*|sd_2.*|stable-diffusion-v2.*", _SD2),
    (r"sd3.*|stable-diffusion-3.*", _SD3),
    (r"flux-?2.*|flux\.2.*", "Flux.2"),
    (r"flux.*", _FLUX),
    (r"chroma.*", "Chroma"),
    (r"lumina.*", _LUMINA),
    (r"z-?image.*|zimage.*", _Z),
    (r"qwen.*", _QWEN),
    (r"wan.*", _WAN),
    (r"hunyuan[-_]?video.*", _HUNYUAN),
    (r"hunyuan-image.*", "HunyuanImage"),
    (r"hidream.*", "HiDream"),
    (r"anima.*", "Anima"),
    (r"stable-?cascade.*", "Stable Cascade"),
    (r"pixart.*", "PixArt"),
    (r"ltx.*", "LTX"),
)
# By what a name holds between its ends, with underscores for dots; the first that any name has.
_NAMED: tuple[tuple[str, str], ...] = (
    (r"distilled_guidance_layer", "Chroma"),
    (r"double_stream_blocks_\d+|double_stream_modulation", "HiDream"),
    (r"single_transformer_blocks_\d+_attn_to_qkv_mlp_proj|double_stream_modulation_img", "Flux.2"),
    (r"token_refiner|double_blocks_\d+_(?:img|txt)_mod_linear", _HUNYUAN),
    (r"joint_transformer_blocks_\d+|double_layers_\d+", "AuraFlow"),
    (r"double_blocks_\d+|single_blocks_\d+|single_transformer_blocks_\d+", _FLUX),
    (r"joint_blocks_\d+", _SD3),
    (r"transformer_blocks_\d+_(?:img|txt)_(?:mlp|mod)", _QWEN),
    (r"blocks_\d+_(?:self|cross)_attn_[qkv]_proj", "Anima"),
    (r"blocks_\d+_(?:self|cross)_attn_(?:q|k|v|o|k_img|v_img)_|blocks_\d+_ffn", _WAN),
    (r"(?<!transformer_)blocks_\d+_attn[12]_", _WAN),
    (r"(?:layers|noise_refiner|context_refiner)_\d+_attention_to_(?:q|k|v|out_0)", _Z),
    (r"(?:layers|noise_refiner|context_refiner)_\d+_attn_to_(?:q|k|v|out_0)", _LUMINA),
    (r"caption_projection|adaln_single", "PixArt"),
)
_ATTENTION = r"transformer_blocks_(\d+)_attn_(?:add_[qkv]_proj|to_add_out)"  # of Stable Diffusion 3, Flux.1 and Qwen-Image
_FUSED = r"layers_\d+_attention_qkv"  # of Lumina 2 and Z-Image in their own layouts
_UNET = (
    r"(?:down|up)_blocks_\d+_(?:attentions|resnets|downsamplers|upsamplers)|mid_block_|(?:in|out)put_blocks_\d+"
    r"|middle_block_"
)
_CONTEXT = r"(?:down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)_.*attn2_to_[kv]"
_CONTEXTS = {768: _SD1, 1024: _SD2, 2048: _SDXL, 1280: _REFINER}
_DEEP = r"(?:attentions_\d+|blocks_\d+_1|block_1)_transformer_blocks_[1-9]"  # more than one to a place has the XL alone
_FOURTH = r"(?:down|up)_blocks_3_|(?:in|out)put_blocks_(?:9|1[01])_"  # the XL has three blocks on each side
_TEXT = r"(?:te|te1|text_encoder|clip_[lh]|text_model)_?.*encoder_layers_\d+_(?:self_attn_[qkv]_proj|mlp_fc1)"
_TEXTS = {768: _SD1, 1024: _SD2}
_FIRST_OF_TWO = r"lora_te1_|text_encoders?_|clip_l_"  # kohya's lora_te_ has the XL not; other programs name both alike
_SD1_OR_2, _SD1_OR_XL = f"{_SD1} or 2", f"{_SD1} or XL"
_EITHER = {_SD1_OR_2: (_SD1, _SD2), _SD1_OR_XL: (_SD1, _SDXL)}
_SECOND = r"lora_te2_|text_encoder_2_|clip_g_"
_LM = r"model_layers_\d+_(?:self_attn|mlp)_"
_TRANSFORMER = re.compile(r"^(?:transformer\.|lora_transformer_)")
_ENDS = re.compile(r"(?:lora_down\.weight|lora_A(?:\.[^.]+)?\.weight|lora_A|lora\.down\.weight|hada_w1_b)$")

# What sites that share adapters call a model, in small letters and with single spaces.
_SHARED: tuple[tuple[str, str], ...] = (
    (r"(?:sdxl|pony|illustrious|noobai)\b.*", _SDXL),
    (r"sd ?1(?:\b.*)?", _SD1),
    (r"sd ?2(?:\b.*)?", _SD2),
    (r"sd ?3(?:\b.*)?", _SD3),
)

NOT_RUN = frozenset(name for table in (_TOLD, _NAMED) for _, name in table) - RUN
"""Models that this package knows by name and does not run."""


@dataclass(frozen=True)
class Origin:
    """Which model a file is for.

    Attributes:
        name: As its makers call it; "" where nothing tells.
        why: What it was told from.
        other: What the names of the tensors tell, where the metadata say another model; "" where they agree.
    """

    name: str = ""
    why: str = ""
    other: str = ""


def origin(header: Header) -> Origin:
    """Tell which model a file is for.

    Args:
        header: Of the file.

    Returns:
        The model. What the metadata say counts first, and a contradiction is told.
    """
    told = _of_metadata(header.metadata)
    named = _of_names(header)
    if told:
        return Origin(told, "its metadata", named if named and told not in (named, *_EITHER.get(named, ())) else "")
    return Origin(named, "the names and shapes of its tensors" if named else "")


def families_of(name: str) -> tuple[str, ...]:
    """Tell the families of bases that a model may be of.

    Args:
        name: Of an `Origin`.

    Returns:
        Their names; none for a model that this package does not run, and for "".
    """
    return tuple(_FAMILIES[one] for one in _EITHER.get(name, (name,)) if one in _FAMILIES)


def shared_as(told: str) -> str:
    """Tell which model is meant by what a site that shares adapters calls it.

    Args:
        told: Such as "SD 1.5", "SDXL 1.0", "Pony" or "Flux.1 D".

    Returns:
        The name, as an `Origin` has it; "" for a model that is not known.
    """
    words = " ".join(told.lower().split())
    return next((name for pattern, name in (*_SHARED, *_TOLD) if re.fullmatch(pattern, words)), "")


def _of_metadata(metadata: Mapping[str, str]) -> str:
    for key in ("ss_base_model_version", "modelspec.architecture", "ot_model_type"):
        told = metadata.get(key, "").partition("/")[0].lower()
        found = next((name for pattern, name in _TOLD if re.fullmatch(pattern, told)), "")
        if found:
            return found
    return ""


def _of_names(header: Header) -> str:
    # Without what names of transformers begin with: its last word could be that of the first block.
    flat = {name: f"_{_TRANSFORMER.sub('', name).replace('.', '_')}" for name in header.tensors}
    for pattern, name in _NAMED:
        if _any(pattern, flat):
            return name
    blocks = [int(match[1]) for one in flat.values() if (match := re.search(_ATTENTION, one))]
    if blocks:
        width = _width(_ATTENTION, flat, header)
        return _QWEN if max(blocks) > 37 else _SD3 if width in (1536, 2432) else _FLUX
    if _any(_FUSED, flat):
        return _LUMINA if _width(_FUSED, flat, header) == 2304 else _Z
    if _any(_UNET, flat):
        return _unet(flat, header)
    if _any(_SECOND, flat):
        return _SDXL
    if _any(_LM, flat):
        return _LANGUAGE
    return _words(header) or _TEXTS.get(_width(_TEXT, flat, header), "")


def _unet(flat: Mapping[str, str], header: Header) -> str:
    """Which Stable Diffusion the names of a UNet are of: by the width of the text that it reads, or by its blocks."""
    told = _CONTEXTS.get(_width(_CONTEXT, flat, header), "")
    if told:
        return told
    if _any(_SECOND, flat) or _any(_DEEP, flat):
        return _SDXL
    text, fourth = _TEXTS.get(_width(_TEXT, flat, header), ""), _any(_FOURTH, flat)
    if text == _SD1 and not fourth and _any(_FIRST_OF_TWO, flat):  # the same encoder in both
        return _SD1_OR_XL
    return text or (_SD1_OR_2 if fourth else "")


def _words(header: Header) -> str:
    """Which model a file of learned words is for, by their names and width."""
    if "clip_g" in header.tensors:
        return _SDXL
    widths = {entry.shape[-1] for entry in header.tensors.values() if entry.shape}
    alone = len(header.tensors) == 1 and "." not in next(iter(header.tensors))
    return _TEXTS.get(widths.pop(), "") if alone and len(widths) == 1 else ""


def _any(pattern: str, flat: Mapping[str, str]) -> bool:
    found = re.compile(f"_(?:{pattern})")
    return any(found.search(one) for one in flat.values())


def _width(pattern: str, flat: Mapping[str, str], header: Header) -> int:
    """The inputs of the first layer of such a name whose tensor tells them; 0 where none does."""
    found = re.compile(pattern)
    for name, one in flat.items():
        shape = header.tensors[name].shape
        if _ENDS.search(name) and len(shape) > 1 and found.search(one):
            return shape[1]
    return 0
