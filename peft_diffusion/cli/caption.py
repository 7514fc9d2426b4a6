"""``peft-diffusion caption``: describe the pictures of a folder, change their captions, and count what these hold."""

import json

from ..data.caption_settings import CaptionConfig
from .commands import reads
from .progress import GenerationConsole
from .terminal import say


@reads(CaptionConfig)
def caption(config: CaptionConfig) -> None:
    """Describe the pictures of a folder in text files beside them, change these, or count what they hold.

    Captions that are there already stay, unless --overwrite is given.
    """
    from ..data.captioning import caption as run

    with GenerationConsole("captions") as console:
        done = run(config, observers=[console])
    if config.json and done.statistics is not None:
        say(json.dumps(done.statistics.to_json(), indent=2, ensure_ascii=False))
        return
    for line in (*done.lines(), *(done.statistics.lines() if done.statistics else ())):
        say(line)
