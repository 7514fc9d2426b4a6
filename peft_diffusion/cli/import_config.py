"""``peft-diffusion import-config``: a training of another program as a file of settings."""

from ..training.settings.imported import ImportConfig
from .commands import reads
from .terminal import say


@reads(ImportConfig)
def import_config(config: ImportConfig) -> None:
    """Write a training of sd-scripts, kohya_ss or OneTrainer as a TOML file of settings.

    Every option that has no counterpart is listed, and stands as a comment in the file.
    """
    from ..training.settings.imported import import_config as run

    made = run(config)
    for line in made.absent:
        say(f"no counterpart: {line}")
    say(f"wrote {made.output}; to train: peft-diffusion train --config {made.output}")
