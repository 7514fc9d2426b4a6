"""Names of the kohya layout, as data; needs no torch."""

import re

# What a component's sites may begin with in a file. The first is written for SD1 and SD2, and the second for SDXL.
PREFIXES: dict[str, tuple[str, str]] = {
    "unet": ("lora_unet_", "lora_unet_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_", "lora_te2_"),
    "lm": ("lora_lm_", "lora_lm_"),
}

# LyCORIS outside of kohya's trainer begins every name so, whatever model it is on. Paths tell which: those of a text encoder
# and of a language model begin with one of these, and the others are the UNet's.
LYCORIS = "lycoris_"
_LYCORIS_PATHS: dict[str, tuple[str, ...]] = {
    "text_encoder": ("text_model_", "encoder_layers_", "embeddings_", "final_layer_norm"),
    "lm": ("model_", "transformer_", "gpt_neox_", "lm_head", "embed_out"),
    "unet": ("",),
}

# What no published layout can say stands beside it: peft_diffusion.<component>.<path>.<suffix>, a suffix having no dot.
OWN = "peft_diffusion."

# Embeddings of new words have no site in their names: whose token embedding they belong to (see textual_inversion.py).
EMBEDDINGS: dict[str, str] = {
    "emb_params": "text_encoder",
    "emp_params": "text_encoder",  # as OneTrainer spells it
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
}
BUNDLE = "bundle_emb."
WORD = re.compile(r"<\S+>")  # the one tensor of an embedding as diffusers' scripts write it, for the first text encoder


def split(name: str) -> tuple[str, str]:
    """A tensor's name as site and suffix."""
    if name in EMBEDDINGS or name.startswith(BUNDLE) or WORD.fullmatch(name):
        return name, "vectors"
    if name.startswith(OWN):
        site, _, suffix = name.rpartition(".")
    else:
        site, _, suffix = name.partition(".")
    return site, suffix


def component_of(site: str) -> str | None:
    """The component that a site's name in a file belongs to."""
    if site in EMBEDDINGS or site.startswith(BUNDLE):
        return EMBEDDINGS.get(site.rpartition(".")[2])
    if WORD.fullmatch(site):
        return "text_encoder"
    if site.startswith(OWN):
        component = site.removeprefix(OWN).split(".")[0]
        return component if component in PREFIXES else None
    if site.startswith(LYCORIS):
        path = site.removeprefix(LYCORIS)
        return next(component for component, paths in _LYCORIS_PATHS.items() if path.startswith(paths))
    return next((component for component, prefixes in PREFIXES.items() if site.startswith(prefixes)), None)
