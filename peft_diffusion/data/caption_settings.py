"""What ``caption`` is told: one dataclass for flags, TOML file and Python. Imports no torch."""

from dataclasses import KW_ONLY, field

from ..core.errors import UserError
from ..core.settings import COUNT, PARAMETERS, Flag, Paths, Range, Texts, about, explained, setting, settings_class, settle


@explained
@settings_class()
class CaptionConfig:
    """What describes the pictures of folders, and what is changed or told of their captions.

    Raises:
        UserError: A value is one that nothing can be done with, or nothing is asked for.
    """

    folder: Paths = field(
        metadata=about("Image folders, with their subfolders.", PARAMETERS, flag=Flag(default_shown=False))
    )
    _: KW_ONLY
    model: str | None = setting(
        None,
        "What writes captions: a folder or hub id of a BLIP (Salesforce/blip-image-captioning-base), a Florence-2 "
        "(florence-community/Florence-2-base) or a tagger, such as SmilingWolf/wd-vit-tagger-v3 (needs timm) or any image "
        "classifier of transformers.",
        PARAMETERS,
    )
    prompt: str | None = setting(
        None,
        "What a BLIP's captions begin with, such as \"a drawing of\"; or a Florence-2's task: <CAPTION>, <DETAILED_CAPTION> "
        "or <MORE_DETAILED_CAPTION>, which is the default.",
        PARAMETERS,
    )
    max_tokens: int = setting(100, "The most tokens of a caption that is written.", PARAMETERS, Range(1, 1024))
    beams: int = setting(3, "Captions that are followed side by side; the likeliest is written.", PARAMETERS, Range(1, 16))
    threshold: float = setting(0.35, "How sure a tagger has to be of a tag.", PARAMETERS, Range(0, 1))
    character_threshold: float = setting(
        0.85, "How sure it has to be of the name of a character, where it tells these apart.", PARAMETERS, Range(0, 1)
    )
    exclude: Texts = setting((), "A tag that is never written; give it again for more.", PARAMETERS)
    batch_size: int = setting(4, "Pictures described at once; lower it when memory runs out.", PARAMETERS, COUNT)
    device: str = setting("auto", "Where to compute: auto, cpu, cuda, cuda:1, mps.", PARAMETERS)
    overwrite: bool = setting(False, "Replace captions that are there already.", PARAMETERS, kept=False)
    edit: Texts = setting(
        (),
        "FIND=REPLACE: replace words in the caption files, whole words alone; nothing behind = takes them out. Give it "
        "again for more, which are done in turn.",
        PARAMETERS,
    )
    stats: bool = setting(False, "Tell how many pictures have which tag, and which have no caption.", PARAMETERS)
    json: bool = setting(False, "Tell the statistics as JSON, with every tag.", PARAMETERS)

    def __post_init__(self) -> None:
        settle(self)
        if not (self.model or self.edit or self.stats or self.json):
            raise UserError("nothing is asked for: give --model to write captions, --edit FIND=REPLACE or --stats")
        for text in self.edit:
            find, equals, _ = text.partition("=")
            if not (find.strip() and equals):
                raise UserError(f"--edit {text!r}: give what is found and what comes in its place, as in cat=dog")
        if self.prompt is not None and not self.model:
            raise UserError("--prompt is for --model alone")
