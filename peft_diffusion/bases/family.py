"""Families of bases as rows of data: what their components are, what files call them, and where their defaults lie.

A new family is one row, added with `register`, and, where its network that denoises is of a new kind, one file with a
`denoiser.Denoiser` such as `unet.py`. Those of others come in as plug-ins: see `core.plugins`. Imports no torch.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, TypeVar

from ..core import plugins, target_tables
from ..core.errors import UserError, did_you_mean
from ..core.target_tables import TargetTable

Role: TypeAlias = Literal["denoiser", "text encoder", "language model"]
Value = TypeVar("Value")
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Component:
    """A part of a base that can carry adapters.

    Attributes:
        name: The attribute of the pipeline that holds it, which is also its name in settings, specs and files.
        role: What it does.
        rate: The setting that holds its learning rate.
        tokenizer: The attribute of the pipeline that holds its tokenizer; None where it reads no words.
        kohya: What its sites begin with in kohya's layout.
        dotted: What its names begin with in the layouts that keep the dots of paths (diffusers, ComfyUI), the one that is
            written first.
        lycoris: What its paths begin with in files of LyCORIS outside of kohya's trainer, which say no component; ("",)
            takes every path that no other component claims.
        embeddings: What embeddings of its words are called in files of other programs, the one that is written first.
        flat: What flat names of other programs begin with, beside ``kohya``. They are read and not written.
        omi: What its names begin with in the layout of the Open Model Initiative, without the dot behind it.
    """

    name: str
    role: Role
    rate: str
    tokenizer: str | None = None
    kohya: str = ""
    dotted: tuple[str, ...] = ()
    lycoris: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    flat: tuple[str, ...] = ()
    omi: str = ""


@dataclass(frozen=True)
class Version:
    """What other programs call a base of a family.

    Attributes:
        architecture: `modelspec.architecture`, without what is behind the slash.
        base_model: `ss_base_model_version` of kohya's trainer.
        v2: `ss_v2` of kohya's trainer.
    """

    architecture: str
    base_model: str
    v2: bool = False


@dataclass(frozen=True)
class Family:
    """A family of bases: one row.

    Attributes:
        name: What files and reports call it.
        components: Its parts that can carry adapters, the one that denoises first.
        kind: The class that reaches its network that denoises, a `denoiser.Denoiser`, as ``module:Class``; None for language
            models.
        versions: What other programs call it, by prediction type; "" stands for all that are not named.
        implementation: `modelspec.implementation`.
        presets: Defaults of training by preset and setting, where others suit it than those that `defaults` gives to all.
        small: Whether its bases are so small that they need other rates, steps and weights of timesteps.
        targets: What targets mean in its components, by the name of their class, where `core.target_tables` does not know
            it.
        blocks: Blocks of the network that denoises that are known for something, by a name for that, as strengths and
            targets take it.
    """

    name: str
    components: tuple[Component, ...]
    kind: str | None = None
    versions: Mapping[str, Version] = field(default_factory=lambda: _NOTHING)
    implementation: str = "https://github.com/huggingface/diffusers"
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: _NOTHING)
    small: bool = False
    targets: Mapping[str, TargetTable] = field(default_factory=lambda: _NOTHING)
    blocks: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _NOTHING)

    @property
    def denoiser(self) -> Component | None:
        """The component that denoises; None in a language model."""
        return next((one for one in self.components if one.role == "denoiser"), None)

    @property
    def text_encoders(self) -> tuple[Component, ...]:
        """The components that read prompts, in the order of the pipeline."""
        return tuple(one for one in self.components if one.role == "text encoder")

    def defaults(self, preset: str) -> Mapping[str, Any]:
        """Give the defaults of training.

        Args:
            preset: Its name.

        Returns:
            By setting: the family's own, and for what it leaves out those of all diffusion bases of its size.
        """
        return {**(_SMALL_PRESETS if self.small else _PRESETS)[preset], **self.presets.get(preset, {})}

    def component(self, name: str) -> Component:
        """Look a component up.

        Args:
            name: Its name.

        Returns:
            The row of the component.

        Raises:
            UserError: The family has no such component.
        """
        for one in self.components:
            if one.name == name:
                return one
        raise UserError(f"{self.name} has no component {name!r}; it has: {', '.join(one.name for one in self.components)}")

    def by_roles(self, roles: Iterable[Role]) -> tuple[str, ...]:
        """Name the component of each role, of several the first.

        Args:
            roles: What they do.

        Returns:
            Their names; nothing for a role that no component has.
        """
        chosen = (next((one.name for one in self.components if one.role == role), None) for role in roles)
        return tuple(name for name in chosen if name is not None)

    def meant(self, names: Mapping[str, Value]) -> dict[str, Value]:
        """Put the blocks that are known for something in the place of the names for that.

        Args:
            names: By the name of a block, whatever kind of name.

        Returns:
            The same by the names that the network has for blocks.

        Raises:
            UserError: A name is known of another family, and means no blocks of this one.
        """
        others = {name: one.name for one in every() for name in one.blocks}
        found: dict[str, Value] = {}
        for name, value in names.items():
            if name not in self.blocks and name in others:
                raise UserError(
                    f"{name!r} names blocks of {others[name]}, and it is not known which blocks of {self.name} would be"
                    " that; name the blocks, as mid or up.1"
                )
            found |= dict.fromkeys(self.blocks.get(name, (name,)), value)
        return found

    def version(self, prediction_type: str) -> Version | None:
        """What other programs call a base of this family.

        Args:
            prediction_type: What it predicts, as the scheduler's configuration says it.

        Returns:
            The names; None where there are none.
        """
        return self.versions.get(prediction_type) or self.versions.get("")


# What one step learns from is the base's own size; "other" are small bases such as the embedded one.
_LATENT_DIFFUSION: dict[str, Any] = {
    "rank": 16,
    "unet_lr": 1e-4,
    "text_encoder_lr": 1e-5,
    "steps": 1500,
    "batch_size": 4,
    "scheduler": "cosine",
    "warmup": 50,
    "min_snr_gamma": 5.0,
    "timestep_bias": "none",
    "caption_dropout": 0.05,
}
_SMALL_DIFFUSION: dict[str, Any] = {
    **_LATENT_DIFFUSION,
    "unet_lr": 1e-3,
    "text_encoder_lr": 1e-4,
    "steps": 300,
    "batch_size": 8,
    "warmup": 10,
    "min_snr_gamma": 0.0,
    "timestep_bias": "later",
}
# A step of a subject holds as many images of the class besides, which the base answers too.
_SUBJECT: dict[str, Any] = {**_LATENT_DIFFUSION, "steps": 800, "batch_size": 2, "scheduler": "constant"}
_PRESETS = {"style": _LATENT_DIFFUSION, "subject": _SUBJECT}
_SMALL_PRESETS = {
    "style": _SMALL_DIFFUSION,
    "subject": {**_SMALL_DIFFUSION, "batch_size": 4, "timestep_bias": "none"},
}

UNET_KIND = "peft_diffusion.bases.unet:UNetDenoiser"
"""The kind of network of Stable Diffusion 1, 2 and XL."""

_UNET = Component(
    "unet",
    "denoiser",
    "unet_lr",
    None,
    "lora_unet_",
    ("unet.", "diffusion_model.", "lora_unet."),  # the last inside of OneTrainer
    ("",),
    flat=("lora_prior_unet_", "diffusion_model_", "oft_unet_"),  # of ComfyUI, A1111 and kohya's networks/oft.py
    omi="unet",
)
_CLIP_PATHS = ("text_model_", "encoder_layers_", "embeddings_", "final_layer_norm", "text_projection")
_TEXT = Component(
    "text_encoder",
    "text encoder",
    "text_encoder_lr",
    "tokenizer",
    "lora_te_",
    (
        "text_encoder.",
        "text_encoders.clip_l.transformer.",
        "text_encoders.clip_h.transformer.",  # ComfyUI's of Stable Diffusion 2
        "clip_l.",  # of the Open Model Initiative, which OneTrainer writes
        "lora_te.",
        "lora_te1.",
    ),
    _CLIP_PATHS,
    # The third as OneTrainer spells it, the last as older scripts of diffusers do.
    ("clip_l", "emb_params", "emp_params", "text_encoders_0"),
    ("transformer_text_model_", "0_transformer_text_model_", "model_transformer_"),  # of A1111
    "clip_l",
)
_TEXT_XL = replace(_TEXT, kohya="lora_te1_", lycoris=(), embeddings=("clip_l",))
_TEXT_XL_2 = Component(
    "text_encoder_2",
    "text encoder",
    "text_encoder_2_lr",
    "tokenizer_2",
    "lora_te2_",
    ("text_encoder_2.", "text_encoders.clip_g.transformer.", "clip_g.", "lora_te2."),
    (),
    ("clip_g", "text_encoders_1"),
    ("lora_prior_te_", "1_model_transformer_"),  # of ComfyUI and A1111
    "clip_g",
)
_LM = Component(
    "lm",
    "language model",
    "lr",
    "tokenizer",
    "lora_lm_",
    (),
    ("model_", "transformer_", "gpt_neox_", "lm_head", "embed_out"),
)

_FAMILIES: dict[str, Family] = {}
_every: tuple[Family, ...] = ()
_registered_by: dict[str, str] = {}  # modules by the name of the family


def register(family: Family) -> None:
    """Add a family, so that bases of it can be loaded, trained and drawn with.

    Args:
        family: The row.

    Raises:
        UserError: Another family has its name.
    """
    if _FAMILIES.setdefault(family.name, family) != family:
        raise UserError(f"there is a family of bases {family.name!r} already; give the new one another name")
    _registered_by.setdefault(family.name, sys._getframe(1).f_globals["__name__"])
    for name, table in family.targets.items():
        target_tables.register(name, table)


def plugin_of(name: str) -> str | None:
    """Name the plug-in that a family comes from.

    Args:
        name: The name of the family.

    Returns:
        The module that registered it, for ``--plugin``; None for a family of this package, and for an unknown name.
    """
    module = _registered_by.get(name)
    return None if module is None else plugins.origin(module)


def every() -> tuple[Family, ...]:
    """List the families, with those that installed packages bring, in the order of registration.

    Returns:
        Their rows: the same tuple while none is added, so that what is made of it can be kept.

    Raises:
        UserError: A plug-in cannot be imported.
    """
    global _every
    plugins.discover(plugins.FAMILIES_GROUP)
    if len(_every) != len(_FAMILIES):  # none is ever taken out or replaced
        _every = tuple(_FAMILIES.values())
    return _every


def find(name: str) -> Family:
    """Look a family up.

    Args:
        name: Its name.

    Returns:
        The row; that of small bases for a name that is not known, as files of newer versions may have.
    """
    return next((family for family in every() if family.name == name), SMALL_DIFFUSION)


def components(role: Role | None = None, families: Iterable[Family] | None = None) -> dict[str, Component]:
    """List the components that families have.

    Args:
        role: Only those that do this; None for all.
        families: The families; None for all that there are.

    Returns:
        The first row of each by name, in the order of registration.
    """
    found: dict[str, Component] = {}
    for family in every() if families is None else families:
        for one in family.components:
            if role is None or one.role == role:
                found.setdefault(one.name, one)
    return found


def of_version(base_model: str) -> tuple[Family, str] | None:
    """Tell which bases kohya's trainer calls by a name.

    Args:
        base_model: `ss_base_model_version` of a file.

    Returns:
        Their family and prediction type, which is "" where the name does not tell it; None for an unknown name.
    """
    rows = ((family, prediction, version) for family in every() for prediction, version in family.versions.items())
    return next(((family, prediction) for family, prediction, version in rows if version.base_model == base_model), None)


def block_names() -> frozenset[str]:
    """List the names for what blocks are known for, of all families.

    Returns:
        The names.
    """
    return frozenset(name for family in every() for name in family.blocks)


def role_of(component: str) -> Role | None:
    """Tell what a component does.

    Args:
        component: Its name.

    Returns:
        Its role; None for a name that no family has.
    """
    known = components()
    return known[component].role if component in known else None


def rate_setting(component: str) -> str:
    """Name the setting that holds a component's learning rate.

    Args:
        component: Its name.

    Returns:
        The name of the setting.

    Raises:
        UserError: No family has such a component.
    """
    known = components()
    if component not in known:
        near = did_you_mean(component, known)
        raise UserError(f"no family of bases has a component {component!r}; there are: {', '.join(known)}{near}")
    return known[component].rate


SMALL_DIFFUSION = Family(
    "other",
    (_UNET, _TEXT),
    UNET_KIND,
    small=True,
)
"""Small bases such as the embedded one, and unknown ones. Settings take its components before a base is loaded."""

LANGUAGE = Family("lm", (_LM,), implementation="https://github.com/huggingface/transformers")
"""Causal language models."""

for _family in (
    Family(
        "sd1",
        (_UNET, _TEXT),
        UNET_KIND,
        {"": Version("stable-diffusion-v1", "sd_v1"), "v_prediction": Version("stable-diffusion-v1", "sd_v1_v")},
    ),
    Family(
        "sd2",
        (_UNET, _TEXT),
        UNET_KIND,
        {
            "": Version("stable-diffusion-v2-512", "sd_v2", v2=True),
            "v_prediction": Version("stable-diffusion-v2-768-v", "sd_v2_v", v2=True),
        },
    ),
    Family(
        "sdxl",
        (_UNET, _TEXT_XL, _TEXT_XL_2),
        UNET_KIND,
        {"": Version("stable-diffusion-xl-v1-base", "sdxl_base_v1-0")},
        implementation="https://github.com/Stability-AI/generative-models",
        presets={"style": {"rank": 32}, "subject": {"rank": 32}},
        # What B-LoRA trains (Frenkel et al. 2024, https://arxiv.org/abs/2403.14572): BLOCKS in its blora_utils.py.
        blocks={"content": ("up_blocks.0.attentions.0",), "style": ("up_blocks.0.attentions.1",)},
    ),
    SMALL_DIFFUSION,
    LANGUAGE,
):
    register(_family)
