"""CLIP and DINOv2 as judges, loaded through transformers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel, Dinov2Model
from transformers.utils import logging as transformers_logging

from ..bases.clip_inputs import pixels, tokens
from ..bases.loading import model_place, pick_device, pick_dtype, quiet
from ..core.errors import UserError, first_line
from ..core.files import if_address
from .judge import Judge


class _Seen(Judge):
    """A vision transformer. Its middle layer tells styles: means and deviations of the patches, which are what style
    transfer matches (Huang and Belongie 2017, https://arxiv.org/abs/1703.06868)."""

    def __init__(self, name: str, model: Any, processor: Any, seen: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self.name = name
        self.model = model
        self.processor = processor
        self.seen = seen

    def style(self, images: Sequence[Image.Image]) -> Tensor:
        """Means and deviations of the patches in the middle layer."""
        return self.both(images)[0]

    def subject(self, images: Sequence[Image.Image]) -> Tensor:
        """The embedding of the whole picture."""
        return self.both(images)[1]

    def both(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Both of one pass through the model."""
        styles, subjects = zip(*self._looked(images), strict=True)
        return torch.cat(styles), torch.cat(subjects)

    def words(self, texts: Sequence[str]) -> Tensor | None:
        """Nothing: this model does not read."""
        return None

    def names(self, images: Sequence[Image.Image]) -> list[str] | None:
        """Nothing: the model was trained on no styles."""
        return None

    def marks(self, images: Sequence[Image.Image]) -> Tensor:
        """The embedding of the whole picture."""
        return self.subject(images)

    def apart(self, marks: Tensor, known: Tensor) -> Tensor:
        """1 less the cosine of the embeddings."""
        return 1 - marks @ known.T

    @torch.inference_mode()
    def _looked(self, images: Sequence[Image.Image]) -> Iterator[tuple[Tensor, Tensor]]:
        """Style and subject of pictures, batch by batch."""
        for given in pixels(self.model, self.processor, images):
            patches, whole = self.seen(given)
            patches = patches[:, 1:].float()  # the first stands for the whole picture
            statistics = torch.cat([patches.mean(1), patches.std(1, correction=0)], 1)
            yield statistics.cpu().clone(), F.normalize(whole.float()).cpu().clone()


class _Reads(_Seen):
    """CLIP, which also reads."""

    def __init__(self, name: str, model: Any, processor: Any, tokenizer: Any) -> None:
        super().__init__(name, model, processor, self._of_clip)
        self.tokenizer = tokenizer

    @torch.inference_mode()
    def words(self, texts: Sequence[str]) -> Tensor | None:
        """The embeddings of texts."""
        told = tokens(self.model, self.tokenizer, texts)
        return F.normalize(self.model.text_projection(self.model.text_model(**told).pooler_output).float()).cpu().clone()

    def _of_clip(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model.vision_model(pixel_values=pixels, output_hidden_states=True)
        states = found.hidden_states
        return states[len(states) // 2], self.model.visual_projection(found.pooler_output)


def clip_judge(model: str, device: str = "cpu") -> Judge:
    """Load CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020) as a judge.

    Args:
        model: A folder or hub id.
        device: Where it computes.

    Returns:
        The judge.

    Raises:
        UserError: There is no such model, or it is no CLIP.
    """
    source, local = _place(model)
    found, processor = _loaded(source, local, CLIPModel, device, "clip")
    return _Reads(f"CLIP ({model})", found, processor, AutoTokenizer.from_pretrained(source, local_files_only=local))


def dino_judge(model: str, device: str = "cpu") -> Judge:
    """Load DINOv2 (Oquab et al. 2023, https://arxiv.org/abs/2304.07193) as a judge.

    Args:
        model: A folder or hub id.
        device: Where it computes.

    Returns:
        The judge.

    Raises:
        UserError: There is no such model, or it is no DINOv2.
    """
    source, local = _place(model)
    found, processor = _loaded(source, local, Dinov2Model, device, "dino")

    def seen(pixels: Tensor) -> tuple[Tensor, Tensor]:
        given = found(pixel_values=pixels, output_hidden_states=True)
        states = given.hidden_states
        return states[len(states) // 2], given.pooler_output

    return _Seen(f"DINOv2 ({model})", found, processor, seen)


def _loaded(source: str, local: bool, kind: type, device: str, judge: str) -> tuple[Any, Any]:
    """A model on its device and its image processor. Raises UserError where they are not of the kind, or damaged."""
    place = pick_device(device)
    try:
        with quiet(transformers_logging):
            model: Any = AutoModel.from_pretrained(source, dtype=pick_dtype("auto", place), local_files_only=local)
            processor = AutoImageProcessor.from_pretrained(source, local_files_only=local)
    except Exception as error:
        # Whatever a damaged folder makes the libraries raise, the person needs to know which model it was.
        raise UserError(f"the judge {source} cannot be read: {first_line(error)}") from error
    if not isinstance(model, kind):
        raise UserError(f"the judge {source} is a {type(model).__name__}, and --judge {judge} takes a {kind.__name__}")
    return cast(Any, model).to(place).eval(), processor


def _place(model: str) -> tuple[str, bool]:
    """Where a model lies, for transformers, and whether that is on this machine. Raises UserError where it is nowhere."""
    found = model_place(model)
    if found is None:
        raise UserError(f"there is no judge {model!r}: neither a folder nor a hub id (owner/name){if_address(model)}")
    return found
