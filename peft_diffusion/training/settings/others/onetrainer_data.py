"""OneTrainer's concepts, as ``training_concepts/concepts.json`` and its configurations have them.

What each field means is read from its ``modules/util/config/ConceptConfig.py``. Imports no torch.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from ....core.encodings import unicode_text
from ....core.errors import UserError
from ....core.files import regular
from ....data.picture_names import SUFFIXES
from ..datasets import Dataset
from .taking import Found, Options, evenly, existing

_SILENT = ("name", "seed", "__version", "enabled", "image_variations", "text_variations")
_UNDONE = (
    *(f"{how}_{what}" for how in ("random", "fixed") for what in ("rotate", "brightness", "contrast", "saturation", "hue")),
    "fixed_flip",
)
_FINEST = 60  # parts of a draw that repeats are rounded to


def read(file: Path, concepts: Sequence[Any]) -> Found:
    """Read concepts.

    Args:
        file: The file that has them.
        concepts: What is in it.

    Returns:
        What they say.

    Raises:
        UserError: One has another shape, or a value cannot be.
    """
    found = Found()
    times: list[Fraction] = []
    for place, concept in enumerate(concepts):
        if not isinstance(concept, dict) or not isinstance(concept.get("path"), str):
            raise UserError(f'{file}, concept {place + 1} is not like {{"path": "pictures", ...}}: {concept!r:.80}')
        name = concept.get("name") or concept["path"]
        options = Options(concept, f"{file}, concept {name!r}", found)
        kind = str(options.take("type") or ("VALIDATION" if options.take("validation_concept") else "STANDARD"))
        if concept.get("enabled") is False:
            continue
        if kind == "VALIDATION":
            options.lack("type", kind, "--held-out keeps pictures apart to measure on")
            continue
        folder = existing(options.take("path") or "", file)
        subfolders = bool(options.take("include_subdirectories"))
        given = options.number("balancing", "repeats")
        balance = Fraction(1 if given is None else given).limit_denominator(_FINEST)
        if balance <= 0:  # it is never drawn
            continue
        if str(options.take("balancing_strategy")) == "SAMPLES":
            balance /= max(1, len(_pictures(folder, subfolders)))
            balance = balance.limit_denominator(_FINEST)
        found.datasets.append(_dataset(file, folder, subfolders, kind == "PRIOR_PREDICTION", options))
        times.append(max(balance, Fraction(1, _FINEST)))
    if not found.datasets:
        raise UserError(f"{file} has no concept that is enabled")
    evenly(found, times)
    return found


def _dataset(file: Path, folder: Path, subfolders: bool, of_class: bool, options: Options) -> Dataset:
    values: dict[str, Any] = {"weight": options.number("loss_weight"), "regularisation": of_class}
    image = Options(_part(options, "image"), f"{options.where}, image", options.found)
    text = Options(_part(options, "text"), f"{options.where}, text", options.found)
    values["flip"] = bool(image.take("enable_random_flip"))
    if image.take("enable_resolution_override"):
        values["resolution"] = resolutions(image, "resolution_override")
    for name in _UNDONE:
        if image.take(f"enable_{name}"):
            image.lack(f"enable_{name}", True, "pictures are encoded before")
    for name in ("enable_crop_jitter", "enable_random_circular_mask_shrink", "enable_random_mask_rotate_crop"):
        if image.take(name):
            image.lack(name, True, "pictures are cropped in the middle")
    values |= _captions(file, folder, subfolders, text)
    for name, value in options.left.items():
        if name not in _SILENT:
            options.lack(name, value)
    return Dataset(folder, subfolders=subfolders, missing_captions="empty", **values)


def _captions(file: Path, folder: Path, subfolders: bool, text: Options) -> dict[str, Any]:
    source = text.take("prompt_source") or "sample"
    values: dict[str, Any] = {"captions": {"filename": "names", "concept": "caption"}.get(source, "files")}
    path = text.take("prompt_path")
    lines: list[str] = []
    if source == "concept":
        lines = _lines(existing(str(path or ""), file))
        values["caption"] = "\n".join(lines)
    elif source == "sample":
        files = (one.with_suffix(".txt") for one in _pictures(folder, subfolders))
        lines = max((_lines(one) for one in files if one.is_file()), key=len, default=[])
    if len(lines) > 1:  # one of the lines in every step
        values["wildcards"] = True
    keep = text.whole("keep_tags_count")
    if text.take("enable_tag_shuffling"):
        values["shuffle_tags"] = True
    if text.take("tag_dropout_enable"):
        mode, share = str(text.take("tag_dropout_mode") or "FULL"), text.number("tag_dropout_probability") or 0.0
        if mode == "RANDOM":
            values["tag_dropout"] = share
        elif mode == "FULL" and not keep:
            values["caption_dropout"] = share
        else:
            text.lack("tag_dropout_mode", mode, "tags are left out each by itself, or the whole caption is")
    if keep and ("shuffle_tags" in values or "tag_dropout" in values):
        values["keep_tags"] = keep
    if text.take("tag_delimiter") not in (None, ","):
        text.lack("tag_delimiter", text.given["tag_delimiter"], "tags are separated by commas")
    if text.take("tag_dropout_special_tags") and str(text.take("tag_dropout_special_tags_mode")) != "NONE":
        text.lack("tag_dropout_special_tags", text.given["tag_dropout_special_tags"])
    if text.take("caps_randomize_enable"):
        text.lack("caps_randomize_enable", True)
    return values


def resolutions(options: Options, name: str) -> tuple[int, ...] | None:
    """Take resolutions out: ``512``, ``512,768`` or ``512x768``, which is one of its area.

    Args:
        options: The options.
        name: What it is called.

    Returns:
        Pixels a side of a square picture; None where nothing is said.

    Raises:
        UserError: It is none.
    """
    given = str(options.take(name) or "")
    found = []
    for part in filter(None, (part.strip() for part in given.split(","))):
        sides = part.lower().split("x")
        if len(sides) > 2 or not all(side.strip().isdecimal() for side in sides):
            raise UserError(f"{options.where}: {name} is like 512, 512,768 or 512x768, not {given!r}")
        first, last = int(sides[0]), int(sides[-1])
        found.append(round((first * last) ** 0.5))
    return tuple(dict.fromkeys(found)) or None


def _part(options: Options, name: str) -> Mapping[str, Any]:
    part = options.take(name)
    return part if isinstance(part, dict) else {}


def _pictures(folder: Path, subfolders: bool) -> list[Path]:
    found = folder.rglob("*") if subfolders else folder.glob("*")
    return [one for one in found if one.suffix.lower() in SUFFIXES]


def _lines(file: Path) -> list[str]:
    """The prompts in a text file, one a line."""
    try:
        text = unicode_text(regular(file).read_bytes())
    except ValueError as error:
        raise UserError(f"{file} {error}; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"the prompts {file} cannot be read: {error.strerror}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
