"""What ``text generate`` can be told: flags, TOML keys and Python arguments in one place. Imports no torch."""

from dataclasses import KW_ONLY

from ..core.errors import UserError
from ..core.settings import COUNT, NATURAL, PARAMETERS, Flag, Range, Texts, explained, setting, settings_class, settle
from .settings import SEEDS, NamesAdapters, Precision, Quantize, check_last_seed, check_text


@explained
@settings_class()
class TextGenerateConfig(NamesAdapters):
    """Which texts are written: every prompt goes on ``count`` times.

    Raises:
        UserError: A value is one that cannot be used.
    """

    prompts: Texts = setting((), "How the texts begin, each prompt in quotes.", PARAMETERS, flag=Flag(default_shown=False))
    _: KW_ONLY
    adapter: Texts = setting(
        (),
        "An adapter FILE, or FILE=STRENGTH (1 is as trained); give it again for more.",
        PARAMETERS,
        flag=Flag(aliases=("-a",), default_shown=False),
    )
    strict: bool = setting(False, "Refuse an adapter file of which a tensor would be left out.", PARAMETERS)
    max_tokens: int = setting(120, "The most tokens that are written after the prompt.", PARAMETERS, COUNT, unit="tokens")
    temperature: float = setting(
        0.8, "How freely the next token is chosen: 0 takes the likeliest always, 1 follows the model.", PARAMETERS, NATURAL
    )
    top_p: float = setting(
        0.95,
        "Choose only among the likeliest tokens that together have this probability; 1 is among all.",
        PARAMETERS,
        Range(0, 1, above=True),
    )
    seed: int = setting(0, "The first seed: it decides what is chosen.", PARAMETERS, SEEDS)
    count: int = setting(1, "Texts of each prompt, with the seeds that follow.", PARAMETERS, COUNT)
    base: str = setting(
        "tiny-lm", 'The embedded base "tiny-lm", a folder in the format of transformers, or a hub id.', PARAMETERS
    )
    device: str = setting("auto", "Such as cpu, cuda or mps; by default the fastest there is.", PARAMETERS)
    precision: Precision = setting(
        "auto", "Of the base; by default float32 on a CPU and a half precision elsewhere.", PARAMETERS
    )
    quantize: Quantize | None = setting(
        None,
        "Hold the base's linear layers in fewer bits, which saves memory: int8, or nf4 for the least (slightly off).",
        PARAMETERS,
    )

    def __post_init__(self) -> None:
        settle(self)
        if not self.prompts:
            raise UserError('there is no prompt; say how the text begins, as in "In the beginning"')
        check_text(*self.prompts)
        check_last_seed(self.seed, self.count)
