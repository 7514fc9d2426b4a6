"""What CLIP takes, of whatever texts and pictures: tokens that its text encoder has places for, and batches of pixels."""

from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

AT_ONCE = 16
"""Texts or pictures that are computed together."""


def tokens(model: Any, tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """Cut texts into tokens, those that are too long at their end.

    Args:
        model: CLIP, or its text encoder, of transformers.
        tokenizer: Its tokenizer.
        texts: One or more.

    Returns:
        What a text encoder is called with, on the model's device.
    """
    config = model.config
    most = getattr(config, "text_config", config).max_position_embeddings
    told = tokenizer(list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt")
    return {name: told[name].to(model.device) for name in ("input_ids", "attention_mask")}


def pixels(model: Any, processor: Any, images: Sequence[Image.Image]) -> Iterator[Tensor]:
    """Bring pictures to the size of a vision transformer.

    Args:
        model: CLIP, or another model of transformers that takes pixels.
        processor: Its image processor.
        images: The pictures.

    Yields:
        (images, 3, height, width), of at most `AT_ONCE` pictures, on the model's device and of its dtype.
    """
    for start in range(0, len(images), AT_ONCE):
        batch = [image.convert("RGB") for image in images[start : start + AT_ONCE]]
        yield processor(images=batch, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
