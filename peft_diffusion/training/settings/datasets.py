"""Folders that have settings of their own in a run: a `Dataset` each, ``[[dataset]]`` in TOML. Imports no torch."""

import os
from collections.abc import Mapping
from dataclasses import KW_ONLY, field
from typing import TYPE_CHECKING, Any, TypeAlias

from ...core.settings import (
    COUNT,
    NATURAL,
    OnePath,
    OptionalNumbers,
    OptionalTexts,
    Range,
    Settings,
    about,
    explained,
    setting,
    settings_class,
    settings_of,
    settle,
)
from .captions import DATA, CaptionSettings
from .choices import CaptionSource, Masks, MissingCaptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...core.settings import _Taken

_PIXELS = Range(1, 8192)


@settings_class(kw_only=True)
class FolderSettings:
    """What becomes of the pictures of folders, in a run; a `Dataset` may have it otherwise.

    Raises:
        UserError: A value is out of its range.
    """

    missing_captions: MissingCaptions = setting(
        "stop",
        "What becomes of pictures without caption: stop, use the file name, use the prompt that a picture carries and was "
        "drawn from (recipe), use no words (empty), or skip them; a caption that is there and cannot be read always stops. "
        "In folders without caption files such prompts are captions in any case, and names where there are none.",
        DATA,
        free_on_resume=True,
    )
    flip: bool = setting(
        False, "Learn from mirrored pictures too; not for a style with writing or a side that matters.", DATA
    )
    crops: int = setting(
        1,
        "Cut-outs of each picture that its shape does not hold whole: 1 is the middle, more lie side by side, and an epoch "
        "draws each.",
        DATA,
        Range(1, 16),
    )
    max_aspect: float = setting(
        2.5,
        "The longest shape that pictures keep, its longer side over the shorter; what is longer is cropped. 1 crops all to "
        "squares.",
        DATA,
        Range(1, 32),
    )
    upscale: bool = setting(
        False,
        "Enlarge pictures below the resolution; otherwise they are trained at their own size, to the nearest step.",
        DATA,
    )
    masks: Masks = setting(
        "files",
        "What of a picture is learned: the white of NAME-mask.png (or NAME-masklabel.png, masks/NAME.png) beside it "
        "(files), what is not transparent where there is no such file (alpha), or all of it (off).",
        DATA,
    )

    def __post_init__(self) -> None:
        settle(self)


def _own(kind: type[Settings], name: str) -> Any:
    """A setting of a run that a data set may have otherwise; None where it has not."""
    (told,) = (one.setting for one in settings_of(kind) if one.name == name)
    return setting(
        None,
        f"{told.help} By default as the run has it.",
        DATA,
        told.range,
        unit=told.unit,
        free_on_resume=told.free_on_resume,
    )


@explained
@settings_class()
class Dataset:
    """A folder with settings of its own. What is left out is as the run has it.

    Raises:
        UserError: A value is one that no run can use.
    """

    folder: OnePath = field(metadata=about("The folder with the pictures.", DATA, free_on_resume=True))
    _: KW_ONLY
    repeats: int | None = setting(
        None,
        "How often an epoch draws each picture; by default once, or as often as a name such as 10_cat says.",
        DATA,
        COUNT,
    )
    weight: float | None = setting(None, "What its pictures count in the loss, 1 by default.", DATA, NATURAL)
    regularisation: bool = setting(
        False, "Its pictures are of the class that a subject is one of, as --regularisation has them.", DATA
    )
    subfolders: bool = setting(True, "Read the folders in it too.", DATA)
    resolution: OptionalNumbers = setting(
        None,
        "Pixels a side of a square picture, or several: an epoch draws each picture at each. By default as the run has it.",
        DATA,
        _PIXELS,
        unit="pixels",
    )
    captions: CaptionSource = setting(
        "auto",
        "Where captions come from: text files, or else prompts that pictures carry, or names (auto); from files alone "
        "(files), from the names of pictures (names), or the one that is the same for all (caption).",
        DATA,
    )
    caption: str = setting(
        "", "The caption of pictures that have none, or of all; each line is an alternative for wildcards.", DATA
    )
    caption_extension: str = setting(
        "", "What the names of caption files end in, such as .tags; by default .txt and .caption.", DATA
    )

    missing_captions: MissingCaptions | None = _own(FolderSettings, "missing_captions")
    flip: bool | None = _own(FolderSettings, "flip")
    crops: int | None = _own(FolderSettings, "crops")
    max_aspect: float | None = _own(FolderSettings, "max_aspect")
    upscale: bool | None = _own(FolderSettings, "upscale")
    masks: Masks | None = _own(FolderSettings, "masks")

    trigger: str | None = _own(CaptionSettings, "trigger")
    caption_prefix: str | None = _own(CaptionSettings, "caption_prefix")
    caption_suffix: str | None = _own(CaptionSettings, "caption_suffix")
    caption_template: OptionalTexts = _own(CaptionSettings, "caption_template")
    caption_dropout: float | None = _own(CaptionSettings, "caption_dropout")
    wildcards: bool | None = _own(CaptionSettings, "wildcards")
    shuffle_tags: bool | None = _own(CaptionSettings, "shuffle_tags")
    tag_dropout: float | None = _own(CaptionSettings, "tag_dropout")
    keep_tags: int | None = _own(CaptionSettings, "keep_tags")
    keep_separator: str | None = _own(CaptionSettings, "keep_separator")

    def __post_init__(self) -> None:
        settle(self)

    def overrides(self) -> Mapping[str, Any]:
        """Give what is otherwise here than in the run.

        Returns:
            Values by the name of the setting, those of `FolderSettings` and `CaptionSettings`.
        """
        names = (one.name for kind in (FolderSettings, CaptionSettings) for one in settings_of(kind))
        return {name: value for name in names if (value := getattr(self, name)) is not None}


if TYPE_CHECKING:
    _Given = Dataset | str | os.PathLike[str] | Mapping[str, Any]
    Datasets: TypeAlias = _Taken[tuple[Dataset, ...], _Given | Sequence[_Given]]
else:
    Datasets = tuple[Dataset, ...]
