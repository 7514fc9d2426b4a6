"""Names of the kohya layout, as data; needs no torch."""

# What a component's sites may begin with in a file. The first is written for SD1 and SD2, and the second for SDXL.
PREFIXES: dict[str, tuple[str, str]] = {
    "unet": ("lora_unet_", "lora_unet_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_", "lora_te2_"),
}


def component_of(site: str) -> str | None:
    """The component that a site's name in a file belongs to."""
    return next((component for component, prefixes in PREFIXES.items() if site.startswith(prefixes)), None)
