"""Aspect buckets: images keep their shape, and a batch consists of images of one shape."""

import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from PIL import Image

from peft_diffusion.core.errors import UserError


class Sized(Protocol):
    """Anything with a size in pixels."""

    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...


@dataclass(frozen=True, order=True)
class Bucket:
    """A shape that images are resized and cropped to, in pixels."""

    width: int
    height: int

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width / self.height


@dataclass(frozen=True)
class ResizeCrop:
    """How one image becomes its bucket's shape: resized, then cropped in the middle.

    Attributes:
        bucket: The shape.
        original: (width, height) in pixels before.
        resized: (width, height) in pixels before the crop. SDXL's conditioning takes `original` and the crop's top left.
        crop: (left, top, right, bottom) in the resized image.
    """

    bucket: Bucket
    original: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int, int, int]

    @property
    def kept(self) -> float:
        """The share of the image's area that the crop keeps, above 0 and up to 1."""
        return self.bucket.width * self.bucket.height / (self.resized[0] * self.resized[1])


def make_buckets(resolution: int, step: int = 64, max_aspect: float = 2.5) -> tuple[Bucket, ...]:
    """List the shapes of at most `resolution` squared pixels whose sides are multiples of `step`.

    Each shorter side is paired with the longest other side that the area and the aspect allow, both ways round.

    Args:
        resolution: The side of a square image, in pixels.
        step: Pixels; 64 for Stable Diffusion, 8 times what its UNet downsamples by.
        max_aspect: The largest ratio of the longer side to the shorter, 1 or more.

    Returns:
        The shapes, by aspect.

    Raises:
        UserError: The sizes allow no bucket.
    """
    if step < 1 or resolution < step:
        raise UserError(f"a resolution of {resolution} is below the step of {step} pixels that the base works in")
    if max_aspect < 1:
        raise UserError(f"the largest aspect ratio is the longer side over the shorter, 1 or more, not {max_aspect}")
    wide = [Bucket(resolution**2 // short // step * step, short) for short in range(step, resolution + 1, step)]
    wide = [bucket for bucket in wide if bucket.aspect <= max_aspect]
    square = resolution // step * step
    if not wide or wide[-1].aspect > 1:
        wide.append(Bucket(square, square))
    shapes = {*wide, *(Bucket(bucket.height, bucket.width) for bucket in wide)}
    return tuple(sorted(shapes, key=lambda bucket: bucket.aspect))


def resize_crop(width: int, height: int, bucket: Bucket) -> ResizeCrop:
    """Scale an image until it just covers a bucket, and crop the middle.

    Args:
        width: Pixels.
        height: Pixels.
        bucket: The shape to cover.

    Returns:
        The sizes and the crop.
    """
    scale = max(bucket.width / width, bucket.height / height)
    resized = max(bucket.width, round(width * scale)), max(bucket.height, round(height * scale))
    left, top = (resized[0] - bucket.width) // 2, (resized[1] - bucket.height) // 2
    return ResizeCrop(bucket, (width, height), resized, (left, top, left + bucket.width, top + bucket.height))


def cut_outs(fit: ResizeCrop, count: int) -> tuple[ResizeCrop, ...]:
    """Crop an image at several places, side by side along the side of which a part is cut away.

    Args:
        fit: The crop in the middle.
        count: How many, 1 or more.

    Returns:
        The different ones; of one, and where nothing is cut away, the one in the middle.
    """
    width, height = fit.bucket.width, fit.bucket.height
    spare = fit.resized[0] - width, fit.resized[1] - height
    if count == 1:
        return (fit,)
    places = [(spare[0] * place // (count - 1), spare[1] * place // (count - 1)) for place in range(count)]
    crops = [(left, top, left + width, top + height) for left, top in dict.fromkeys(places)]
    return tuple(replace(fit, crop=crop) for crop in crops)


def arrange(
    pictures: Sequence[Sized], resolution: int, step: int = 64, max_aspect: float = 2.5, no_upscale: bool = True
) -> tuple[ResizeCrop, ...]:
    """Choose a bucket for each image: the one nearest in aspect ratio.

    Args:
        pictures: The images' sizes.
        resolution: See `make_buckets`.
        step: See `make_buckets`.
        max_aspect: See `make_buckets`.
        no_upscale: Give an image that its bucket would enlarge a bucket of its own size instead, rounded to the step and
            within the same area and aspect. That enlarges a side by half a step at most, or to one step.

    Returns:
        One entry an image, in their order.

    Raises:
        UserError: The sizes allow no bucket.
    """
    buckets = make_buckets(resolution, step, max_aspect)

    def one(width: int, height: int) -> ResizeCrop:
        bucket = min(buckets, key=lambda bucket: (abs(math.log(width / height / bucket.aspect)), bucket))
        if no_upscale and (width < bucket.width or height < bucket.height):
            bucket = _own_bucket(width, height, resolution, step, max_aspect)
        return resize_crop(width, height, bucket)

    return tuple(one(picture.width, picture.height) for picture in pictures)


def _own_bucket(width: int, height: int, resolution: int, step: int, max_aspect: float) -> Bucket:
    # Rounded: a picture that is a pixel short would lose a whole step otherwise.
    short, long = (max(1, (side + step // 2) // step) for side in sorted((width, height)))
    long = min(long, int(short * max_aspect))
    while long > 1 and short * long * step**2 > resolution**2:
        long -= 1
    short = min(short, long)
    return Bucket(long * step, short * step) if width >= height else Bucket(short * step, long * step)


def place(
    image: Image.Image, chosen: ResizeCrop, flip: bool = False, resampling: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Resize and crop an image to its bucket.

    Args:
        image: The image.
        chosen: From `arrange`.
        flip: Mirror it left to right after the crop.
        resampling: Pillow's filter.

    Returns:
        An image of the bucket's size.
    """
    placed = image.resize(chosen.resized, resampling).crop(chosen.crop)
    return placed.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else placed


def group(fits: Sequence[ResizeCrop]) -> dict[Bucket, tuple[int, ...]]:
    """Group images by bucket.

    Args:
        fits: One entry an image.

    Returns:
        The indices of the images in each bucket, buckets in order.
    """
    groups: dict[Bucket, list[int]] = {}
    for index, one in enumerate(fits):
        groups.setdefault(one.bucket, []).append(index)
    return {bucket: tuple(groups[bucket]) for bucket in sorted(groups)}


def repeated(groups: Mapping[Bucket, Sequence[int]], times: Sequence[int]) -> dict[Bucket, tuple[int, ...]]:
    """Repeat each index as often as an epoch draws it.

    Args:
        groups: Indices by bucket.
        times: The repeats of each index.

    Returns:
        The same buckets with repeated indices.
    """
    return {bucket: tuple(one for one in indices for _ in range(times[one])) for bucket, indices in groups.items()}


def share_out(pictures: Sequence[Sized], draws: Mapping[Bucket, int]) -> tuple[tuple[int, Bucket], ...]:
    """Give images to buckets that others are drawn from, one bucket an image, so that no bucket is without any.

    A bucket gets images in proportion to its draws, one at least, and of images in the order of their aspects it gets those
    that stand where it stands among the buckets. With fewer images than buckets, an image is in more than one.

    Args:
        pictures: The images' sizes.
        draws: How often an epoch draws from each bucket, above 0.

    Returns:
        Index and bucket, by bucket.
    """
    shapes = sorted(draws, key=lambda bucket: (bucket.aspect, bucket))
    order = sorted(range(len(pictures)), key=lambda index: (pictures[index].width / pictures[index].height, index))
    if len(order) < len(shapes):
        return tuple((order[place * len(order) // len(shapes)], bucket) for place, bucket in enumerate(shapes))
    spare, total = len(order) - len(shapes), sum(draws.values())
    ends, drawn = [], 0
    for place, bucket in enumerate(shapes, start=1):
        drawn += draws[bucket]
        ends.append(place + spare * drawn // total)
    starts = [0, *ends[:-1]]
    return tuple(
        (index, bucket)
        for bucket, start, end in zip(shapes, starts, ends, strict=True)
        for index in sorted(order[start:end])
    )


@dataclass(frozen=True)
class Batch:
    """The images of one step, all in one bucket.

    Attributes:
        bucket: The shape.
        indices: The images, by index.
        weights: What each counts; 1 in the mean over an epoch, and 1 each where every bucket fills its batches.
    """

    bucket: Bucket
    indices: tuple[int, ...]
    weights: tuple[float, ...]


def batches(pictures_by_bucket: Mapping[Bucket, Sequence[int]], batch_size: int, seed: int, epoch: int) -> tuple[Batch, ...]:
    """List the batches of one epoch, full ones only. A pure function of its arguments, whatever the order of the mapping.

    A bucket's last batch is filled with the first images of that bucket's order in this epoch, repeatedly if needed, so
    that a single image still makes a batch; each epoch repeats others. What an image counts is divided among its copies:
    every image counts alike in an epoch, times how often it is listed, however rare its shape is.

    Args:
        pictures_by_bucket: Indices by bucket.
        batch_size: Images a batch, 1 or more.
        seed: The run's seed.
        epoch: From 0.

    Returns:
        The batches in the order of the steps.

    Raises:
        UserError: The batch size is below 1.
    """
    if batch_size < 1:
        raise UserError(f"the batch size must be 1 or more, not {batch_size}")
    rng = random.Random(f"batches {seed} {epoch}")
    wanted = sum(map(len, pictures_by_bucket.values()))
    filled = steps_per_epoch(pictures_by_bucket, batch_size) * batch_size
    steps: list[Batch] = []
    for bucket in sorted(pictures_by_bucket):
        order = sorted(pictures_by_bucket[bucket])
        rng.shuffle(order)
        drawn = [order[place % len(order)] for place in range(-(-len(order) // batch_size) * batch_size)]
        listed, copies = Counter(order), Counter(drawn)
        weights = {index: filled / wanted * listed[index] / copies[index] for index in listed}
        for start in range(0, len(drawn), batch_size):
            indices = tuple(drawn[start : start + batch_size])
            steps.append(Batch(bucket, indices, tuple(weights[index] for index in indices)))
    rng.shuffle(steps)
    return tuple(steps)


def steps_per_epoch(pictures_by_bucket: Mapping[Bucket, Sequence[int]], batch_size: int) -> int:
    """Count the batches of an epoch.

    Args:
        pictures_by_bucket: Indices by bucket.
        batch_size: Images a batch.

    Returns:
        The number of batches that `batches` lists.
    """
    return sum(math.ceil(len(indices) / batch_size) for indices in pictures_by_bucket.values())


def stream(
    pictures_by_bucket: Mapping[Bucket, Sequence[int]], batch_size: int, seed: int, start: int = 0
) -> Iterator[Batch]:
    """Give batches without end; a resumed run sees those that an uninterrupted one would.

    Args:
        pictures_by_bucket: Indices by bucket.
        batch_size: Images a batch.
        seed: The run's seed.
        start: The first step, from 0.

    Yields:
        Batches, epoch after epoch.

    Raises:
        UserError: There is no image.
    """
    if not any(pictures_by_bucket.values()):
        raise UserError("there is no picture to make a batch of")
    epoch, skipped = divmod(start, steps_per_epoch(pictures_by_bucket, batch_size))
    while True:
        yield from batches(pictures_by_bucket, batch_size, seed, epoch)[skipped:]
        epoch, skipped = epoch + 1, 0


def describe_buckets(fits: Sequence[ResizeCrop]) -> list[str]:
    """Describe how many images each bucket has and the hardest crop in it, in lines of plain text.

    Args:
        fits: One entry an image.

    Returns:
        One line a bucket.
    """
    return [
        f"{bucket.width}x{bucket.height}: {len(indices)} picture{'' if len(indices) == 1 else 's'}, "
        f"{min(fits[index].kept for index in indices):.0%} or more of each kept"
        for bucket, indices in group(fits).items()
    ]
