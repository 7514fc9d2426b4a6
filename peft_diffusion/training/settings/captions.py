"""How captions become prompts, as settings: those of a run, which each data set may have otherwise. Imports no torch."""

from ...core.settings import NATURAL, SHARE, WHOLE_SHARE, Group, Texts, setting, settings_class, settle
from ...data.captions import CaptionRules

DATA = Group("Pictures and captions", 2)


@settings_class(kw_only=True)
class CaptionSettings:
    """How captions become prompts. `TrainConfig` is one, so ``pick(CaptionSettings, config, others)`` overrides some.

    Raises:
        UserError: A value is out of its range.
    """

    trigger: str = setting(
        "",
        'Words that call the style, put into every caption: "ink style", or "ink drawing of {}" with {} for the caption.',
        DATA,
    )
    caption_prefix: str = setting("", "Words before every caption, behind the trigger; they are never shuffled.", DATA)
    caption_suffix: str = setting("", "Words behind every caption; they are never shuffled.", DATA)
    caption_template: Texts = setting(
        (),
        'What becomes of every caption: "a page with {caption}, drawn by {trigger}". Given several times, another one is '
        "drawn in every step, for words that should not matter. The trigger goes in front where no {trigger} is.",
        DATA,
    )
    caption_dropout: float | None = setting(
        None, "Share of captions left empty in training (0 to 1); a little keeps guidance working.", DATA, WHOLE_SHARE
    )
    wildcards: bool = setting(
        False,
        "Take one of {a|b} in captions and one of the lines of a caption, others in every step, for words that should not "
        "matter; {{ and }} are braces. Without it, the first line is the caption.",
        DATA,
    )
    shuffle_tags: bool = setting(
        False, "Shuffle comma-separated tags in every step; for tag captions, so that their order means nothing.", DATA
    )
    tag_dropout: float = setting(
        0.0,
        "Share of the comma-separated tags left out in every step (0 to below 1), so that what a picture shows is "
        "learned for each tag alone.",
        DATA,
        SHARE,
    )
    keep_tags: int = setting(
        0, "So many tags at the front stay, and stay in place, when tags are shuffled or left out.", DATA, NATURAL
    )
    keep_separator: str = setting(
        "",
        "A mark in captions, such as |||: tags before it stay, and those behind a second one, in place of --keep-tags. It "
        "is no part of the prompt.",
        DATA,
    )

    def __post_init__(self) -> None:
        settle(self)

    def caption_rules(self) -> CaptionRules:
        """Make what turns captions into prompts.

        Returns:
            The rules; without a caption dropout where none was said.

        Raises:
            UserError: The trigger or a template holds braces that cannot be filled in.
        """
        return CaptionRules(
            trigger=self.trigger,
            dropout=self.caption_dropout or 0.0,
            shuffle=self.shuffle_tags,
            keep_tags=self.keep_tags,
            wildcards=self.wildcards,
            tag_dropout=self.tag_dropout,
            separator=self.keep_separator,
            prefix=self.caption_prefix,
            suffix=self.caption_suffix,
            templates=self.caption_template,
        )
