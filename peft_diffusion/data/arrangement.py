"""What becomes of images in their buckets, in words: which lose much by the crop, and which have a bucket to themselves."""

from collections.abc import Sequence

from .buckets import ResizeCrop, group
from .folder import TrainingImage

KEPT = 0.7
"""The share of an image below which its crop is told by name."""


def cropped(pictures: Sequence[TrainingImage], fits: Sequence[ResizeCrop]) -> list[str]:
    """Name the images that lose much by the crop, the worst first.

    Args:
        pictures: The images.
        fits: How each becomes its bucket.

    Returns:
        A line for each that keeps less than `KEPT` of its area.
    """
    pairs = sorted(zip(pictures, fits, strict=True), key=lambda pair: pair[1].kept)
    return [
        f"{picture.path}: {picture.width}x{picture.height}, of which {fit.bucket.width}x{fit.bucket.height} keeps"
        f" {fit.kept:.0%}, the middle"
        for picture, fit in pairs
        if fit.kept < KEPT
    ]


def alone(pictures: Sequence[TrainingImage], fits: Sequence[ResizeCrop]) -> list[str]:
    """Name the images that no other shares a bucket with.

    Args:
        pictures: The images.
        fits: How each becomes its bucket.

    Returns:
        A line for each; none where there is but one bucket.
    """
    groups = group(fits)
    lone = [(bucket, indices[0]) for bucket, indices in groups.items() if len(indices) == 1 < len(groups)]
    return [f"{pictures[index].path}: {bucket.width}x{bucket.height}" for bucket, index in lone]
