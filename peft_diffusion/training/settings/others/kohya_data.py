"""A dataset file of kohya's sd-scripts: ``[general]``, ``[[datasets]]`` and ``[[datasets.subsets]]``.

The rules are those of its ``library/config_util.py`` and ``docs/config_README-en.md``: what is said of a subset comes before
what is said of its data set, and that before what is said in general. Imports no torch.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from ....core.errors import UserError
from ..datasets import Dataset
from .taking import Found, Options, evenly, existing

_OPTIONS = {
    "shuffle_caption": "shuffle_tags",
    "keep_tokens_separator": "keep_separator",
    "enable_wildcard": "wildcards",
    "flip_aug": "flip",
    "caption_prefix": "caption_prefix",
    "caption_suffix": "caption_suffix",
    "caption_dropout_rate": "caption_dropout",
    "caption_tag_dropout_rate": "tag_dropout",
    "caption_extension": "caption_extension",
    "class_tokens": "caption",
    "is_reg": "regularisation",
}
_WHY = {
    "random_crop": "pictures are encoded before; crops = 3 learns three cut-outs of each",
    "color_aug": "pictures are encoded before",
    "face_crop_aug_range": "pictures are encoded before",
    "bucket_reso_steps": "sides are multiples of what the base works in",
    "metadata_file": "captions are read from files beside the pictures, or metadata.jsonl",
    "validation_split": "--held-out of the whole run",
    "conditioning_data_dir": "a ControlNet is not trained here",
}
_SILENT = ("cache_info", "validation_seed", "debug_dataset")
SUBSET_DEFAULTS = {"num_repeats": 1}


FALLBACKS = frozenset((*_OPTIONS, "keep_tokens", "num_repeats", "batch_size")) - {"class_tokens", "is_reg"} | {
    "resolution", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_no_upscale", "random_crop", "color_aug",
}  # fmt: skip
"""Options of a training that count where a dataset file says nothing."""


def read(file: Path, table: Mapping[str, Any], training: Mapping[str, Any] | None = None) -> Found:
    """Read a dataset file.

    Args:
        file: The file.
        table: What is in it.
        training: The options of the training that names it, if there is one.

    Returns:
        What it says.

    Raises:
        UserError: It has another shape, or a value cannot be.
    """
    found = Found()
    general = {name: value for name, value in (training or {}).items() if name in FALLBACKS}
    general |= _table(file, table.get("general", {}), "[general]")
    times: list[Fraction] = []
    sizes: set[int] = set()
    for number, one in enumerate(_tables(file, table.get("datasets"), "[[datasets]]")):
        subsets = _tables(file, one.get("subsets"), "[[datasets.subsets]]")
        of_all = general | {name: value for name, value in one.items() if name != "subsets"}
        seen: set[str] = set()
        for place, subset in enumerate(subsets):
            where = f"{file}, [[datasets]] {number + 1}, [[datasets.subsets]] {place + 1}"
            options = Options(SUBSET_DEFAULTS | of_all | subset, where, found)
            size = options.whole("batch_size")
            sizes |= {size} if size else set()
            count = options.whole("num_repeats") or 0
            folder = options.take("image_dir")
            if not isinstance(folder, str):
                raise UserError(f"{where} lacks image_dir, the folder of its pictures")
            if folder in seen or count < 1:  # as sd-scripts leaves them out
                continue
            seen.add(folder)
            found.datasets.append(_dataset(existing(folder, file), options))
            times.append(Fraction(count))
    if not found.datasets:
        raise UserError(f"{file} names no folder: there is no [[datasets.subsets]] with an image_dir")
    evenly(found, times)
    if any(one.regularisation for one in found.datasets):
        found.settings["prior_target"] = "noise"  # there, pictures of the class are learned as they are
    if len(sizes) == 1:
        found.settings["batch_size"] = sizes.pop()
    elif sizes:
        found.absent.append(f"{file}: batch_size = {sorted(sizes)} (a run has one --batch-size)")
    found.absent = list(dict.fromkeys(found.absent))
    return found


def _dataset(folder: Path, options: Options) -> Dataset:
    values: dict[str, Any] = {here: value for there, here in _OPTIONS.items() if (value := options.take(there)) is not None}
    keep = options.whole("keep_tokens")
    if keep is not None:  # there, tags of the prefix are counted, which stays outside here
        values["keep_tags"] = max(0, keep - str(values.get("caption_prefix", "")).count(","))
    if options.take("alpha_mask"):
        values["masks"] = "alpha"
    weight = options.number("prior_loss_weight")
    if weight is not None:
        options.found.settings["prior_weight"] = weight
    values |= shape(options)
    if options.take("caption_separator") not in (None, ","):
        options.lack("caption_separator", options.given["caption_separator"], "tags are separated by commas")
    for name, value in options.left.items():
        if name not in _SILENT and not (name == "bucket_reso_steps" and value == 64):
            options.lack(name, value, _WHY.get(name, ""))
    # Pictures lie in the folder itself, and those without a caption file have the class tokens.
    return Dataset(folder, captions="files", subfolders=False, **values)


def shape(options: Options) -> dict[str, Any]:
    """Take what says which sizes and shapes pictures have; without buckets they are cropped to squares.

    Args:
        options: Those of a subset, or of a whole training.

    Returns:
        Values of `Dataset`.

    Raises:
        UserError: The resolution is none.
    """
    values: dict[str, Any] = {"upscale": not options.take("bucket_no_upscale")}
    given = options.take("resolution", "max_resolution")
    parts = (
        given.split(",") if isinstance(given, str) else given if isinstance(given, list) else [given] * (given is not None)
    )
    sides = Options({f"resolution {place}": part for place, part in enumerate(parts)}, options.where, options.found)
    found = [side for name in list(sides.left) if (side := sides.whole(name))]
    if given is not None and len(found) not in (1, 2):
        raise UserError(f"{options.where}: resolution is a number or two, not {given!r}")
    area = math.prod(found if len(found) == 2 else found * 2)
    if found:
        values["resolution"] = (round(math.sqrt(area)),)
    least, most = options.whole("min_bucket_reso") or 256, options.whole("max_bucket_reso") or 1024
    if not options.take("enable_bucket"):
        if len(set(found)) == 2:
            options.lack("resolution", given, "without buckets all pictures are squares here")
        values["max_aspect"] = 1.0
    elif found:
        values["max_aspect"] = min(32.0, max(1.0, min(most, area // least) / least))
    return values


def _table(file: Path, value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{file}: {name} is a table, not {value!r:.80}")
    return value


def _tables(file: Path, value: Any, name: str) -> Sequence[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{file} has no {name}")
    return [_table(file, one, name) for one in value]
