"""Which tensors of an adapter file other programs read, and what they make of them, written from their sources.

- ComfyUI: ``comfy/lora.py`` and ``comfy/weight_adapter``; Forge: ``packages_3rdparty/comfyui_lora_collection/lora.py``;
- A1111: ``extensions-builtin/Lora/networks.py`` and the modules beside it;
- kohya: ``networks/lora.py`` of sd-scripts, which knows LoRAs alone; LyCORIS reads the rest there;
- InvokeAI: ``invokeai/backend/patches``.

Files of learned words alone go another way in them: ``comfy/sd1_clip.py``, ``modules/textual_inversion`` of A1111 and Forge,
``invokeai/backend/textual_inversion.py``, and ``loaders/textual_inversion.py`` of diffusers.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch import Tensor, nn

from ..bases import family as families
from ..bases.base import Skeleton
from ..core import targets
from ..formats.layouts.original import original_names
from ..formats.names import with_text_model, written_prefix
from .sources import Where

Stems = Mapping[str, Where]
"""What names of tensors begin with, without the dot behind it, and the site that this means."""

Formula = Callable[[Mapping[str, Tensor], "Tensor | None"], "Tensor | None"]
"""The change of a weight, in some shape of its numbers, by the suffixes of a site's tensors and the weight of the base, None
where it is not at hand. None where that weight is needed and not there, or the program's way is not known here."""

Decomposed = Callable[[Tensor, Tensor, Tensor], Tensor]
"""What a program makes of a DoRA: the change of a weight, by the weight, the change of its direction and the magnitudes."""

WeightOf = Callable[[Where], "Tensor | None"]
"""The weight of a site in the base, in float32; None where it is not at hand."""


@dataclass(frozen=True)
class Kind:
    """Tensors of a site that a program knows together.

    Attributes:
        needed: The suffixes without which it does not see this kind.
        beside: Suffixes that it reads with them.
        formula: What it adds to the weight, but for magnitudes; None where that is not computed here.
        decomposed: What it does with ``dora_scale`` beside them; None where that is not computed here.
    """

    needed: frozenset[str]
    beside: frozenset[str] = frozenset()
    formula: Formula | None = None
    decomposed: Decomposed | None = None

    def change(self, values: Mapping[str, Tensor], weight: Tensor | None) -> Tensor | None:
        """Tell what a program adds to a weight.

        Args:
            values: The tensors of the site by suffix, in float32.
            weight: That of the base; None where it is not at hand.

        Returns:
            The change, in some shape of its numbers; None where it is not known.
        """
        change = None if self.formula is None else self.formula(values, weight)
        if change is None or _MAGNITUDES not in values:
            return change
        if self.decomposed is None or weight is None or weight.numel() != change.numel():
            return None
        return self.decomposed(weight, change.reshape(weight.shape), values[_MAGNITUDES])


@dataclass(frozen=True)
class Program:
    """A program that reads adapter files by a map of names.

    Attributes:
        name: What it is called.
        stems: Makes the map, for a base.
        kinds: What it knows at a site; of several that fit, all are read, and the last decides the weight.
        bundles: Whether it reads words that stand in a bundle.
        refuses_unknown: Whether it refuses a file with a site of a kind that it does not know.
        note: What the person should know of it.
    """

    name: str
    stems: Callable[[Skeleton], Stems]
    kinds: Sequence[Kind]
    bundles: bool = False
    refuses_unknown: bool = False
    note: str = ""


@dataclass(frozen=True)
class Theirs:
    """What a program adds to the weight of a site.

    Attributes:
        compute: Makes it, in some shape of its numbers; None where that is not known.
        key: The same for programs that do the same; None where that is not known.
    """

    compute: Callable[[], "Tensor | None"]
    key: object | None = None


@dataclass
class Taken:
    """What a program makes of a file.

    Attributes:
        program: Its name.
        names: The tensors that it reads.
        changes: By site, the change of the weight.
        dropped: Why it leaves tensors out, by name.
        refused: Why it refuses the whole file; "" where it does not.
        note: What the person should know of it.
    """

    program: str
    names: set[str] = field(default_factory=set)
    changes: dict[Where, Theirs] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    refused: str = ""
    note: str = ""


_MAGNITUDES = "dora_scale"
NO_NAME, NO_KIND = "it knows no module of that name", "it knows no such tensors"
BUNDLE = "bundle_emb."
_FIELDS, _PARAMS = ("clip_l", "clip_g", "clip_h"), "emb_params"


def taken(program: Program, tensors: Mapping[str, Tensor], base: Skeleton, weight_of: WeightOf) -> Taken:
    """Read a file as a program does.

    Args:
        program: Which.
        tensors: Those of the file.
        base: The base that the file is for.
        weight_of: Reads the weight of a site, for methods whose change depends on it.

    Returns:
        What it makes of it.
    """
    stems, found = program.stems(base), Taken(program.name, note=program.note)
    sites: dict[str, dict[str, str]] = {}
    suffixes = frozenset[str]().union(*(kind.needed | kind.beside for kind in program.kinds))
    for name in tensors:
        if name.startswith(BUNDLE):
            (found.names.add(name) if program.bundles else found.dropped.update({name: "it reads no words from a bundle"}))
            continue
        stem, suffix = _parted(name, stems, suffixes)
        if stem is None:
            found.dropped[name] = NO_NAME
        else:
            sites.setdefault(stem, {})[suffix] = name
    for stem, own in sites.items():
        _take(program, found, stems[stem], own, tensors, weight_of)
    unknown = next((name for name, why in found.dropped.items() if why == NO_KIND), None)
    if unknown is not None and program.refuses_unknown:
        found.refused = f"it knows no tensors such as {unknown}, and refuses a file that has some"
        found.names, found.changes = set(), {}
    return found


def words_taken(names: Sequence[str]) -> list[Taken]:
    """Read a file of learned words alone as the programs do that read such.

    Args:
        names: Of its tensors, in their order.

    Returns:
        What each makes of it.
    """
    fields, both = [name for name in names if name in _FIELDS], set(names) >= set(_FIELDS[:2])
    several = names if both or len(names) == 1 else ()
    read: dict[str, Sequence[str]] = {
        "diffusers": names if len(names) == 1 else (),
        "ComfyUI": fields or names[:1],
        "Forge": several,
        "A1111": several,
        "InvokeAI": [_PARAMS] if _PARAMS in names else fields if both else names[:1],
    }
    return [
        Taken(
            program,
            set(own),
            dropped={name: "it takes another tensor for the word" for name in names if name not in own},
            refused=""
            if own
            else f"it takes one tensor{'' if program == 'diffusers' else ', or those of both text encoders'}",
        )
        for program, own in read.items()
    ]


def _parted(name: str, stems: Stems, suffixes: frozenset[str]) -> tuple[str | None, str]:
    """What a name begins with and its suffix; None where the program knows no such beginning."""
    known = max(
        (one for one in suffixes if name.endswith(f".{one}") and name[: -len(one) - 1] in stems), key=len, default=""
    )
    if known:
        return name[: -len(known) - 1], known
    stem, _, suffix = name.partition(".")
    return (stem, suffix) if stem in stems else (None, suffix)


def _take(
    program: Program,
    found: Taken,
    where: Where,
    own: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    weight_of: WeightOf,
) -> None:
    kinds = [kind for kind in program.kinds if kind.needed <= own.keys()]
    read = frozenset[str]().union(*(kind.needed | kind.beside for kind in kinds))
    for suffix, name in own.items():
        if suffix in read:
            found.names.add(name)
        else:
            found.dropped[name] = NO_KIND
    kind = next((one for one in reversed(kinds) if one.formula is not None), None)
    if kind is not None:
        values = {suffix: tensors[name] for suffix, name in own.items() if suffix in read}
        key = (kind.formula, kind.decomposed if _MAGNITUDES in values else None, frozenset(own[suffix] for suffix in values))
        found.changes[where] = Theirs(
            lambda: kind.change({suffix: one.float() for suffix, one in values.items()}, weight_of(where)), key
        )


# What changes are, by the suffixes of kohya's and LyCORIS' layout.


def _norms_of_inputs(weight: Tensor) -> Tensor:
    norms: Tensor = weight.transpose(0, 1).flatten(1).norm(dim=1)
    return norms.view(1, -1, *[1] * (weight.ndim - 2))


def _by_inputs(weight: Tensor, change: Tensor, magnitudes: Tensor) -> Tensor:
    """That of A1111 and InvokeAI, which divide by the norms of inputs whatever the magnitudes are of."""
    merged = weight + change
    return merged * (magnitudes / _norms_of_inputs(merged)) - weight


def _by_either(weight: Tensor, change: Tensor, magnitudes: Tensor) -> Tensor:
    """That of ComfyUI and Forge. Magnitudes of outputs are divided by the norms of the base's own weight."""
    merged = weight + change
    if len(magnitudes) == len(weight):
        norms: Tensor = weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))
    else:
        norms = _norms_of_inputs(merged)
    return merged * (magnitudes / (norms + torch.finfo(weight.dtype).eps)) - weight


def _scale(values: Mapping[str, Tensor], rank: int) -> float:
    return float(values["alpha"]) / rank if "alpha" in values else 1.0


def _lora(down: str, up: str) -> Formula:
    def formula(values: Mapping[str, Tensor], _: Tensor | None) -> Tensor | None:
        first, second = values[down], values[up].flatten(1)
        rank = len(first)
        if "lora_mid.weight" in values:
            first = torch.einsum("ij...,jn->in...", values["lora_mid.weight"], first.flatten(1))
        return (second @ first.flatten(1)) * _scale(values, rank)

    return formula


def _lora_of_kohya(values: Mapping[str, Tensor], weight: Tensor | None) -> Tensor | None:
    """That of kohya's ``LoRAModule``, to which an alpha of 0 is none."""
    kept = {suffix: tensor for suffix, tensor in values.items() if suffix != "alpha" or float(tensor)}
    return _lora("lora_down.weight", "lora_up.weight")(kept, weight)


def _loha(values: Mapping[str, Tensor], _: Tensor | None) -> Tensor | None:
    halves = []
    for number in ("1", "2"):
        a, b, core = values[f"hada_w{number}_a"], values[f"hada_w{number}_b"], values.get(f"hada_t{number}")
        halves.append(a @ b if core is None else torch.einsum("ij...,jr,ip->pr...", core, b, a))
    return (halves[0] * halves[1]).flatten(1) * _scale(values, len(values["hada_w1_b"]))


def _lokr(values: Mapping[str, Tensor], _: Tensor | None) -> Tensor | None:
    rank = next((len(values[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in values), None)
    w1 = values["lokr_w1"] if "lokr_w1" in values else values["lokr_w1_a"] @ values["lokr_w1_b"]
    if "lokr_w2" in values:
        w2 = values["lokr_w2"]
    elif "lokr_t2" in values:
        w2 = torch.einsum("ij...,jr,ip->pr...", values["lokr_t2"], values["lokr_w2_b"], values["lokr_w2_a"])
    else:
        w2 = values["lokr_w2_a"] @ values["lokr_w2_b"].flatten(1)
    kron = torch.kron(w1.view(*w1.shape, *[1] * (w2.ndim - 2)), w2.contiguous())
    return kron.flatten(1) * (1.0 if rank is None else _scale(values, rank))


def _ia3(values: Mapping[str, Tensor], weight: Tensor | None) -> Tensor | None:
    """That of A1111 and InvokeAI, which fits the weights of Linears."""
    if weight is None or weight.ndim != 2:
        return None
    factors = values["weight"].flatten()
    on_input = "on_input" in values and bool(values["on_input"])
    return weight * (factors if on_input else factors[:, None])


def _glora_of_comfy(values: Mapping[str, Tensor], weight: Tensor | None) -> Tensor | None:
    """That of ComfyUI and Forge, which tell LyCORIS' first version, with each pair the other way round, by the shapes."""
    if weight is None:
        return None
    a1, a2, b1, b2 = (values[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    first = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    if b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]:
        first = first and len(a2) == len(weight) == weight.shape[1]
    scale = _scale(values, len(a1) if first else len(a2))
    a1, a2, b1, b2 = (one.flatten(1) for one in (a1, a2, b1, b2))
    if first:
        return scale * (b2 @ b1 + weight.flatten(1) @ a2 @ a1)
    return scale * (torch.einsum("oi...,ij->oj...", weight, a1 @ a2).flatten(1) + b1 @ b2)


def _glora_of_a1111(values: Mapping[str, Tensor], weight: Tensor | None) -> Tensor | None:
    """That of A1111: LyCORIS' first version, and no alpha. A layer that this does not fit fails, and is drawn without."""
    if weight is None:
        return None
    a1, a2, b1, b2 = (values[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    try:
        return ((b2 @ b1) + ((weight @ a2) @ a1)).reshape(weight.shape)
    except RuntimeError:
        return torch.zeros_like(weight)


def _turned(blocks: Tensor, weight: Tensor | None, constraint: float) -> Tensor | None:
    """A weight (outputs, inputs) whose outputs are turned by Cayley rotations, in blocks: of an OFT (number, size, size), of
    a BOFT (rotations, number, size, size). A constraint above 0 is the most that the norm of all skew matrices may be."""
    size = blocks.shape[-1]
    if weight is None or blocks.ndim not in (3, 4) or blocks.shape[-3] * size != len(weight):
        return None
    skew, identity = blocks - blocks.mT, torch.eye(size)
    norm = float(skew.norm())
    if 0 < constraint < norm:
        skew = skew * ((constraint + 1e-8) / (norm + 1e-8))
    rotations, rows = (identity + skew) @ (identity - skew).inverse(), weight.flatten(1)
    if blocks.ndim == 3:
        return torch.einsum("knm,kni->kmi", rotations, rows.unflatten(0, (-1, size))).flatten(0, 1)
    for number, turn in enumerate(rotations):  # each mixes outputs that are twice as far apart as those before
        apart = 2**number * (size // 2)
        paired = rows.unflatten(0, (-1, 2, apart)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
        mixed = torch.einsum("bij,bjn->bin", turn, paired).flatten(0, 1)
        rows = mixed.unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
    return rows


def _oft_of_comfy(values: Mapping[str, Tensor], weight: Tensor | None) -> Tensor | None:
    """That of ComfyUI, to which alpha itself is the constraint. Of an OFT it reads ``rescale`` and leaves it out."""
    butterfly = values["oft_blocks"].ndim == 4
    return _of_rotations(values, weight, float(values.get("alpha", torch.zeros(()))), rescaled=butterfly)


def _oft_of_a1111(values: Mapping[str, Tensor], weight: Tensor | None) -> Tensor | None:
    """That of A1111, to which alpha times the outputs is the constraint, as to the trainers."""
    outputs = 0 if weight is None else len(weight)
    return _of_rotations(values, weight, float(values.get("alpha", torch.zeros(()))) * outputs, rescaled=True)


def _of_rotations(
    values: Mapping[str, Tensor], weight: Tensor | None, constraint: float, *, rescaled: bool
) -> Tensor | None:
    turned = _turned(values["oft_blocks"], weight, constraint)
    if weight is None or turned is None:
        return None
    if rescaled and "rescale" in values:
        turned = values["rescale"].reshape(-1, 1) * turned
    return turned - weight.flatten(1)


def _of(*suffixes: str) -> frozenset[str]:
    return frozenset(suffixes)


def _without_magnitudes(kinds: Sequence[Kind]) -> tuple[Kind, ...]:
    return tuple(replace(one, beside=one.beside - {_MAGNITUDES}) for one in kinds)


def _decomposing(kinds: Sequence[Kind], way: Decomposed) -> tuple[Kind, ...]:
    return tuple(replace(one, decomposed=way) for one in kinds)


_BESIDE = _of("alpha", _MAGNITUDES)
_KOHYA_LORA = Kind(_of("lora_down.weight", "lora_up.weight"), _of("alpha"), _lora("lora_down.weight", "lora_up.weight"))
_LORA = Kind(_KOHYA_LORA.needed, _BESIDE | {"lora_mid.weight"}, _KOHYA_LORA.formula)
_DOTTED_LORA = [
    Kind(_of(down, up), _BESIDE, _lora(down, up))
    for down, up in (
        ("lora_A.weight", "lora_B.weight"),
        ("lora.down.weight", "lora.up.weight"),
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    )
]
_LOHA = Kind(_of("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), _BESIDE | {"hada_t1", "hada_t2"}, _loha)
_LOKR = [
    Kind(frozenset((*first, *second)), _BESIDE | {"lokr_t2"}, _lokr)
    for first, second in product((("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")), (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b")))
]
_GLORA = Kind(_of("a1.weight", "a2.weight", "b1.weight", "b2.weight"), _BESIDE, _glora_of_comfy)
_NORM = Kind(_of("w_norm"), _of("b_norm"), lambda values, _: values["w_norm"])
_DIFF = Kind(_of("diff"), _of("diff_b"), lambda values, _: values["diff"])
_BIAS = Kind(_of("diff_b"))
_IA3 = Kind(_of("weight"), _of("on_input"), _ia3)
_OFT = Kind(_of("oft_blocks"), _BESIDE | {"rescale"}, _oft_of_comfy)
_SET = Kind(_of("set_weight"), formula=lambda values, weight: None if weight is None else values["set_weight"] - weight)
_OF_COMFY = _decomposing([_LORA, *_DOTTED_LORA, _LOHA, *_LOKR, _GLORA], _by_either)


# Which names mean which modules.


def _denoiser(base: Skeleton) -> tuple[str, nn.Module] | None:
    names = [name for name in families.components("denoiser") if name in base.parts]
    return (names[0], base.parts[names[0]]) if names else None


def _weighed(module: nn.Module) -> list[str]:
    """The paths of a component's modules that have a weight."""
    return [path for path, one in targets.modules(module).items() if isinstance(getattr(one, "weight", None), Tensor)]


def flattened(path: str) -> str:
    """Spell a path as flat names do.

    Args:
        path: Of a module.

    Returns:
        The path with underscores for dots.
    """
    return path.replace(".", "_")


def _text_layers(base: Skeleton) -> list[tuple[str, str, str]]:
    """Component, path and the path with ``text_model`` of the layers of text encoders."""
    found = []
    for name in families.components("text encoder"):
        for path in _weighed(base.parts[name]) if name in base.parts else ():
            spelled = with_text_model(name, path)
            if re.fullmatch(r"text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])", spelled):
                found.append((name, path, spelled))
    return found


def _diffusers_names_of_comfy(path: str) -> str:
    processed = path.replace(".to_", ".processor.to_")
    return processed[: -len(".0")] if processed.endswith(".to_out.0") else processed


def _forge(base: Skeleton) -> dict[str, Where]:
    """The map of ComfyUI as Forge has it."""
    found: dict[str, Where] = {}
    denoiser = _denoiser(base)
    if denoiser is not None:
        name, module = denoiser
        original = original_names(module)
        for path in _weighed(module):
            where = (name, path)
            found[f"lora_unet_{flattened(path)}"] = where
            found |= dict.fromkeys((f"{start}{_diffusers_names_of_comfy(path)}" for start in ("", "unet.")), where)
            if path in original:
                starts = ("lora_unet_", "lora_prior_unet_")
                found |= {f"{start}{flattened(original[path])}": where for start in starts}
                found[f"diffusion_model.{original[path]}"] = where
    first = "text_encoder" in base.parts
    for component, path, spelled in _text_layers(base):
        second = component == "text_encoder_2" and first
        flat = ("lora_te2_",) if second else ("lora_te_", "lora_te1_")
        found |= {f"{start}{flattened(spelled)}": (component, path) for start in flat}
        found[f"text_encoder{'_2' if second else ''}.{spelled}"] = (component, path)
    return found


def _comfy(base: Skeleton) -> dict[str, Where]:
    found = _forge(base)
    denoiser = _denoiser(base)
    if denoiser is not None:
        found |= {f"lycoris_{flattened(path)}": (denoiser[0], path) for path in _weighed(denoiser[1])}
    clips = {"text_encoder": "clip_h" if base.info.family == "sd2" else "clip_l", "text_encoder_2": "clip_g"}
    for component, clip in clips.items():
        for path in _weighed(base.parts[component]) if component in base.parts else ():
            found[f"text_encoders.{clip}.transformer.{with_text_model(component, path)}"] = (component, path)
    return found


_RESNETS = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "norm1": "in_layers_0",
    "norm2": "out_layers_0",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}


def _compvis(flat: str) -> str | None:
    """The original's flat name of a flat name of diffusers, by A1111's own rules, which know blocks of three alone."""
    if flat in ("conv_in", "conv_out"):
        return {"conv_in": "input_blocks_0_0", "conv_out": "out_2"}[flat]
    if match := re.fullmatch(r"time_embedding_linear_(\d+)", flat):
        return f"time_embed_{int(match[1]) * 2 - 2}"
    if match := re.match(r"(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", flat):
        number = int(match[2]) * 3 + int(match[4]) + (1 if match[1] == "down" else 0)
        end = _RESNETS.get(match[5], match[5]) if match[3] == "resnets" else match[5]
        return f"{'input' if match[1] == 'down' else 'output'}_blocks_{number}_{int(match[3] == 'attentions')}_{end}"
    if match := re.match(r"mid_block_(attentions|resnets)_(\d+)_(.+)", flat):
        resnet = match[1] == "resnets"
        end = _RESNETS.get(match[3], match[3]) if resnet else match[3]
        return f"middle_block_{int(match[2]) * 2 if resnet else 1}_{end}"
    if match := re.match(r"down_blocks_(\d+)_downsamplers_0_conv", flat):
        return f"input_blocks_{3 + int(match[1]) * 3}_0_op"
    if match := re.match(r"up_blocks_(\d+)_upsamplers_0_conv", flat):
        return f"output_blocks_{2 + int(match[1]) * 3}_{2 if int(match[1]) > 0 else 1}_conv"
    return None


def _a1111(base: Skeleton) -> dict[str, Where]:
    found: dict[str, Where] = {}
    denoiser = _denoiser(base)
    if denoiser is not None:
        name, module = denoiser
        there = {flattened(own): (name, path) for path, own in original_names(module).items()}
        found |= {f"{start}{own}": where for start in ("lora_unet_", "oft_unet_") for own, where in there.items()}
        for path in _weighed(module):
            own = _compvis(flattened(path))
            if own in there:
                found[f"lora_unet_{flattened(path)}"] = there[own]
    xl = "text_encoder_2" in base.parts
    for component, path, spelled in _text_layers(base):
        starts = ["lora_te2_" if component == "text_encoder_2" else "lora_te1_" if xl else "lora_te_"]
        if not xl and base.info.family != "sd2":
            starts.append("lora_te1_")
        found |= {f"{start}{flattened(spelled)}": (component, path) for start in starts}
    return found


def _kohya(base: Skeleton) -> dict[str, Where]:
    found: dict[str, Where] = {}
    denoiser = _denoiser(base)
    if denoiser is not None:
        name, module = denoiser
        original = original_names(module)
        layers = {path for path, one in targets.modules(module).items() if isinstance(one, (nn.Linear, nn.Conv2d))}
        inside = re.compile(r".*\.(attentions|resnets|downsamplers|upsamplers)\.\d+\..+")
        for path in filter(inside.fullmatch, sorted(layers)):
            found[f"lora_unet_{flattened(path)}"] = (name, path)
            if base.info.family == "sdxl" and path in original:
                found[f"lora_unet_{flattened(original[path])}"] = (name, path)
    for component, path, spelled in _text_layers(base):
        found[f"{written_prefix(component, base.info.family)}{flattened(spelled)}"] = (component, path)
    return found


def _invoke(base: Skeleton) -> dict[str, Where]:
    found: dict[str, Where] = {}
    for component, module in base.parts.items():
        prefix = written_prefix(component, base.info.family)
        for path in _weighed(module):
            found[f"{prefix}{flattened(with_text_model(component, path))}"] = (component, path)
        if base.info.family == "sdxl":
            found |= {f"{prefix}{flattened(own)}": (component, path) for path, own in original_names(module).items()}
    return found


PROGRAMS = (
    Program("ComfyUI", _comfy, (*_OF_COMFY, _OFT, _NORM, _DIFF, _BIAS, _SET)),
    Program("Forge", _forge, (*_OF_COMFY, _NORM, _DIFF, _BIAS)),
    Program(
        "A1111",
        _a1111,
        (
            *_decomposing([_LORA, _LOHA], _by_inputs),
            _IA3,
            replace(_OFT, formula=_oft_of_a1111),
            *_decomposing(_LOKR, _by_inputs),
            _DIFF,
            Kind(_NORM.needed | _NORM.beside, formula=_NORM.formula),
            Kind(_GLORA.needed | {"alpha"}, _BESIDE, _glora_of_a1111, _by_inputs),
        ),
        bundles=True,
    ),
    Program(
        "kohya",
        _kohya,
        (Kind(_KOHYA_LORA.needed, _KOHYA_LORA.beside, _lora_of_kohya),),
        note="LyCORIS reads other methods there, with network_module=lycoris.kohya",
    ),
    Program(
        "InvokeAI",
        _invoke,
        # It takes every site with magnitudes for a LoRA, and fails where there is none.
        (_IA3, _NORM, _DIFF, *_without_magnitudes([*_LOKR, _LOHA]), *_decomposing([_LORA], _by_inputs)),
        refuses_unknown=True,
    ),
)
"""The programs that are known by their maps."""
