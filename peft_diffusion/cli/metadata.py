"""``peft-diffusion metadata``: what a safetensors file says of itself, shown and changed."""

import json

from ..core.errors import UserError, did_you_mean
from ..tools.tool_settings import MetadataGetConfig, MetadataRemoveConfig, MetadataSetConfig
from .commands import reads
from .terminal import say


@reads(MetadataGetConfig)
def get_entries(config: MetadataGetConfig) -> None:
    """Show the metadata of a safetensors file, or the values of some entries."""
    from ..tools.labels import metadata

    told = metadata(config.file)
    for key in config.keys:
        if key not in told:
            raise UserError(f"{config.file} has no entry {key!r}{did_you_mean(key, told)}")
    chosen = {key: told[key] for key in config.keys or sorted(told)}
    if config.json:
        say(json.dumps(chosen, indent=2, ensure_ascii=False))
        return
    for key, value in chosen.items():
        say(value if config.keys else f"{key}: {value}")


@reads(MetadataSetConfig)
def set_entries(config: MetadataSetConfig) -> None:
    """Add or replace entries of the metadata. No byte of the tensors changes."""
    from ..tools.labels import set_metadata

    set_metadata(config.file, config.told(), output=config.output)
    say(config.output or config.file)


@reads(MetadataRemoveConfig)
def remove_entries(config: MetadataRemoveConfig) -> None:
    """Remove entries of the metadata. No byte of the tensors changes."""
    from ..tools.labels import remove_metadata

    remove_metadata(config.file, config.keys, output=config.output)
    say(config.output or config.file)
