"""Aspect buckets: pictures keep their shape, and a batch is made of pictures of one shape."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    """A shape that pictures are brought to, in pixels."""

    width: int
    height: int

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width / self.height


@dataclass(frozen=True)
class Fit:
    """How one picture becomes its bucket: resized, then cropped in the middle. Sizes are (width, height) in pixels.

    `crop` is (left, top, right, bottom) in the resized picture; SDXL is told `original` and the crop's top left.
    """

    bucket: Bucket
    original: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int, int, int]

    @property
    def kept(self) -> float:
        """The share of the picture's area that the crop keeps, above 0 and up to 1."""
        return self.bucket.width * self.bucket.height / (self.resized[0] * self.resized[1])


def make_buckets(resolution: int, step: int = 64, max_aspect: float = 2.5) -> tuple[Bucket, ...]:
    """Shapes of about `resolution` squared pixels, never more, whose sides are multiples of `step`.

    For every shorter side the longest other side that the area allows, both ways round, up to `max_aspect` to 1;
    ordered by aspect. `step` is 64 for Stable Diffusion: 8 times what the UNet downsamples by.
    Raises `UserError` for sizes that allow no bucket.
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


def fit(width: int, height: int, bucket: Bucket) -> Fit:
    """Scale a picture until it just covers the bucket, and cut out the middle."""
    scale = max(bucket.width / width, bucket.height / height)
    resized = max(bucket.width, round(width * scale)), max(bucket.height, round(height * scale))
    left, top = (resized[0] - bucket.width) // 2, (resized[1] - bucket.height) // 2
    return Fit(bucket, (width, height), resized, (left, top, left + bucket.width, top + bucket.height))


def arrange(
    pictures: Sequence[Sized], resolution: int, step: int = 64, max_aspect: float = 2.5, no_upscale: bool = True
) -> tuple[Fit, ...]:
    """A fit for each picture: the bucket nearest in aspect ratio.

    With `no_upscale` a picture that its bucket would enlarge gets a bucket of its own size, rounded down to the step
    and held to the same area and aspect; only a picture smaller than one step is enlarged, to one step.
    """
    buckets = make_buckets(resolution, step, max_aspect)

    def one(width: int, height: int) -> Fit:
        bucket = min(buckets, key=lambda bucket: (abs(math.log(width / height / bucket.aspect)), bucket))
        if no_upscale and (width < bucket.width or height < bucket.height):
            bucket = _own_bucket(width, height, resolution, step, max_aspect)
        return fit(width, height, bucket)

    return tuple(one(picture.width, picture.height) for picture in pictures)


def _own_bucket(width: int, height: int, resolution: int, step: int, max_aspect: float) -> Bucket:
    short, long = (max(1, side // step) for side in sorted((width, height)))
    long = min(long, int(short * max_aspect))
    while long > 1 and short * long * step**2 > resolution**2:
        long -= 1
    short = min(short, long)
    return Bucket(long * step, short * step) if width >= height else Bucket(short * step, long * step)


def place(
    image: Image.Image, chosen: Fit, flip: bool = False, resampling: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """The picture in its bucket; flipped left to right after the crop if asked."""
    placed = image.resize(chosen.resized, resampling).crop(chosen.crop)
    return placed.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else placed


def group(fits: Sequence[Fit]) -> dict[Bucket, tuple[int, ...]]:
    """The indices of the pictures in each bucket, buckets in order."""
    groups: dict[Bucket, list[int]] = {}
    for index, one in enumerate(fits):
        groups.setdefault(one.bucket, []).append(index)
    return {bucket: tuple(groups[bucket]) for bucket in sorted(groups)}


def repeated(groups: Mapping[Bucket, Sequence[int]], times: Sequence[int]) -> dict[Bucket, tuple[int, ...]]:
    """The same buckets with each index as often as `times` says, which an epoch then draws it."""
    return {bucket: tuple(one for one in indices for _ in range(times[one])) for bucket, indices in groups.items()}


@dataclass(frozen=True)
class Batch:
    """The pictures of one step, by index, all in one bucket."""

    bucket: Bucket
    indices: tuple[int, ...]


def batches(pictures_by_bucket: Mapping[Bucket, Sequence[int]], batch_size: int, seed: int, epoch: int) -> tuple[Batch, ...]:
    """The steps of one epoch, full batches only; a pure function of its arguments, whatever the order of the mapping.

    Every picture is drawn once. A bucket's last batch is filled up with the first pictures of that bucket's order in
    this epoch, over and over if need be, so that a lone picture still makes a batch; each epoch repeats others.
    """
    if batch_size < 1:
        raise UserError(f"the batch size must be 1 or more, not {batch_size}")
    rng = random.Random(f"batches {seed} {epoch}")
    steps: list[Batch] = []
    for bucket in sorted(pictures_by_bucket):
        order = sorted(pictures_by_bucket[bucket])
        rng.shuffle(order)
        for start in range(0, len(order), batch_size):
            indices = (order[index % len(order)] for index in range(start, start + batch_size))
            steps.append(Batch(bucket, tuple(indices)))
    rng.shuffle(steps)
    return tuple(steps)


def steps_per_epoch(pictures_by_bucket: Mapping[Bucket, Sequence[int]], batch_size: int) -> int:
    """How many batches `batches` gives."""
    return sum(math.ceil(len(indices) / batch_size) for indices in pictures_by_bucket.values())


def stream(
    pictures_by_bucket: Mapping[Bucket, Sequence[int]], batch_size: int, seed: int, start: int = 0
) -> Iterator[Batch]:
    """Batches without end from step `start` on: a resumed run sees those that an uninterrupted one would."""
    if not any(pictures_by_bucket.values()):
        raise UserError("there is no picture to make a batch of")
    epoch, skipped = divmod(start, steps_per_epoch(pictures_by_bucket, batch_size))
    while True:
        yield from batches(pictures_by_bucket, batch_size, seed, epoch)[skipped:]
        epoch, skipped = epoch + 1, 0


def describe_buckets(fits: Sequence[Fit]) -> list[str]:
    """Lines of plain text: how many pictures each bucket has, and the hardest crop in it."""
    return [
        f"{bucket.width}x{bucket.height}: {len(indices)} picture{'' if len(indices) == 1 else 's'}, "
        f"{min(fits[index].kept for index in indices):.0%} or more of each kept"
        for bucket, indices in group(fits).items()
    ]
