"""Models that describe pictures: BLIP and Florence-2, which write sentences, and taggers, which name what they see."""

import csv
import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from ..bases.loading import model_place, pick_device, pick_dtype, quiet
from ..core.encodings import unicode_text
from ..core.errors import UserError, first_line
from ..core.files import if_address, regular
from .caption_settings import CaptionConfig

WRITERS = ("blip", "florence2")
"""The kinds of models that write sentences, as transformers calls them."""

_TASK = "<MORE_DETAILED_CAPTION>"
_TASKS = ("<CAPTION>", "<DETAILED_CAPTION>", _TASK)
_TAGS = "selected_tags.csv"
_CHARACTER, _RATING = "4", "9"  # categories of booru tags, as the lists of the WD taggers have them


class Captioner(Protocol):
    """What describes pictures."""

    def describe(self, pictures: Sequence[Image.Image]) -> list[str]:
        """Describe pictures.

        Args:
            pictures: RGB images.

        Returns:
            A caption for each.
        """
        ...


@dataclass(frozen=True)
class Writer:
    """A model that writes sentences.

    Attributes:
        model: Of transformers.
        processor: Its processor.
        prompt: What is said beside a picture; None for nothing.
        max_tokens: The most tokens of a caption.
        beams: How many captions are followed side by side.
    """

    model: Any
    processor: Any
    prompt: str | None
    max_tokens: int
    beams: int

    @torch.inference_mode()
    def describe(self, pictures: Sequence[Image.Image]) -> list[str]:
        """Write captions.

        Args:
            pictures: RGB images.

        Returns:
            A sentence or several for each.
        """
        said = {} if self.prompt is None else {"text": [self.prompt] * len(pictures)}
        inputs = self.processor(images=list(pictures), return_tensors="pt", **said)
        inputs = inputs.to(self.model.device, self.model.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_tokens, num_beams=self.beams, do_sample=False)
        texts: list[str] = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


@dataclass(frozen=True)
class Label:
    """What a tagger may name: a word or several, and from which probability on; above 1 never."""

    text: str
    threshold: float
    first: bool = False


@dataclass(frozen=True)
class Tagger:
    """A model that names what it sees in a picture.

    Attributes:
        model: Of transformers, with a number for each label.
        processor: Its image processor.
        labels: The labels.
        several: Whether each label is there or not by itself; otherwise they share one certainty.
        booru: Whether it is a WD tagger, which sees squares on white, blue before green before red.
    """

    model: Any
    processor: Any
    labels: Sequence[Label]
    several: bool
    booru: bool

    @torch.inference_mode()
    def describe(self, pictures: Sequence[Image.Image]) -> list[str]:
        """Name what is seen in pictures.

        Args:
            pictures: RGB images.

        Returns:
            Tags of each, with commas: characters first, then what is surest.
        """
        given = [squared(picture) if self.booru else picture for picture in pictures]
        inputs = self.processor(images=given, return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        logits = self.model(pixels.flip(1) if self.booru else pixels).logits.float()
        rows = (logits.sigmoid() if self.several else logits.softmax(-1)).tolist()
        return [self._tags(row) for row in rows]

    def _tags(self, row: Sequence[float]) -> str:
        sure = [(label, value) for label, value in zip(self.labels, row, strict=True) if value >= label.threshold]
        return ", ".join(label.text for label, _ in sorted(sure, key=lambda pair: (not pair[0].first, -pair[1])))


def squared(picture: Image.Image) -> Image.Image:
    """Put a picture in the middle of a white square, as the WD taggers were trained.

    Args:
        picture: Any.

    Returns:
        The square, as large as its longer side.
    """
    side = max(picture.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def load_captioner(config: CaptionConfig) -> Captioner:
    """Load what describes pictures.

    Args:
        config: The settings, with a model.

    Returns:
        The model on its device.

    Raises:
        UserError: There is no such model, or it is none that describes pictures.
    """
    source, local = _place(config.model or "")
    device = pick_device(config.device)
    dtype = pick_dtype("auto", device)
    try:
        with _silence():
            kind = AutoConfig.from_pretrained(source, local_files_only=local)
            if kind.model_type in WRITERS:
                return _writer(config, source, kind.model_type, local, device, dtype)
            if kind.model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
                return _tagger(config, source, local, device, dtype)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{config.model} needs a package that is missing: {first_line(error)}") from None
    except Exception as error:
        # Whatever a damaged folder makes the libraries raise, the person needs to know which model it was.
        hint = "; take florence-community/Florence-2-base" if "florence" in source.lower() else ""
        raise UserError(f"--model {config.model} cannot be read: {first_line(error)}{hint}") from error
    known = "a BLIP, a Florence-2 or an image classifier"
    raise UserError(f"--model {config.model} is a {kind.model_type}, which does not describe pictures; give {known}")


def _silence() -> AbstractContextManager[None]:
    return quiet(transformers_logging)


def _place(model: str) -> tuple[str, bool]:
    """Where a model lies, for transformers, and whether that is on this machine. Raises UserError where it is nowhere."""
    found = model_place(model)
    if found is None:
        raise UserError(f"there is no model {model!r}: neither a folder nor a hub id (owner/name){if_address(model)}")
    source, local = found
    if local and not (Path(source) / "config.json").is_file():
        raise UserError(f"{model} is no folder of a model: it holds no config.json")
    return source, local


def _writer(config: CaptionConfig, source: str, kind: str, local: bool, device: torch.device, dtype: torch.dtype) -> Writer:
    prompt = (config.prompt or _TASK) if kind == "florence2" else config.prompt
    if kind == "florence2" and prompt not in _TASKS:
        raise UserError(f"--prompt of a Florence-2 is a task: {', '.join(_TASKS)}, not {prompt!r}")
    loaded: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, local_files_only=local)
    processor = AutoProcessor.from_pretrained(source, local_files_only=local)
    return Writer(loaded.to(device).eval(), processor, prompt, config.max_tokens, config.beams)


def _tagger(config: CaptionConfig, source: str, local: bool, device: torch.device, dtype: torch.dtype) -> Tagger:
    if config.prompt is not None:
        raise UserError(f"--prompt is nothing for {config.model}, which names tags")
    loaded: Any = AutoModelForImageClassification.from_pretrained(source, dtype=dtype, local_files_only=local)
    processor = AutoImageProcessor.from_pretrained(source, local_files_only=local)
    model = loaded.to(device).eval()
    listed = _tag_list(source, local)
    excluded = {_key(text) for text in config.exclude}
    if listed is None:
        names = [str(model.config.id2label[number]) for number in range(model.config.num_labels)]
        labels = [Label(name, config.threshold) for name in names]
    else:
        labels = labels_of(listed, config.threshold, config.character_threshold, where=f"{source}/{_TAGS}")
    if len(labels) != model.config.num_labels:
        raise UserError(f"{source}: {_TAGS} has {len(labels)} tags, and the model tells {model.config.num_labels}")
    labels = [Label(one.text, 2.0) if _key(one.text) in excluded else one for one in labels]
    several = listed is not None or model.config.problem_type == "multi_label_classification"
    return Tagger(model, processor, labels, several, listed is not None)


def _key(tag: str) -> str:
    return tag.replace("_", " ").strip().lower()


def _tag_list(source: str, local: bool) -> str | None:
    """The list of tags that a WD tagger comes with; None for another model."""
    path = Path(source) / _TAGS
    if not local:
        try:
            path = Path(hf_hub_download(source, _TAGS))
        except EntryNotFoundError:
            return None
    return unicode_text(regular(path).read_bytes()) if path.exists() else None


def labels_of(listed: str, threshold: float, character_threshold: float, where: str) -> list[Label]:
    """Read the list of tags of a WD tagger: tags, characters and ratings, which are none of the picture's words.

    Args:
        listed: CSV with ``name`` and ``category``.
        threshold: Of tags.
        character_threshold: Of characters.
        where: What errors call the list.

    Returns:
        The labels, in order. Underscores are spaces but in short ones such as ``^_^``, as sd-scripts' tagger has it.

    Raises:
        UserError: It lacks a column.
    """
    rows = list(csv.DictReader(io.StringIO(listed)))
    if not rows or not {"name", "category"} <= set(rows[0]):
        raise UserError(f"{where} needs the columns name and category")
    names = [row["name"] or "" for row in rows]
    texts = [name.replace("_", " ") if len(name) > 3 else name for name in names]
    kinds = [row["category"] for row in rows]
    limits = {_CHARACTER: character_threshold, _RATING: 2.0}
    pairs = zip(texts, kinds, strict=True)
    return [Label(text, limits.get(kind or "", threshold), kind == _CHARACTER) for text, kind in pairs]
