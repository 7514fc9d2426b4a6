"""CLIP, and the text encoders of bases, as encoders of a library."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel
from transformers.utils import logging as transformers_logging

from ..bases import fingerprint
from ..bases.clip_inputs import AT_ONCE, pixels, tokens
from ..bases.loading import model_place, quiet
from ..bases.readers import load_reader
from ..core.errors import UserError, first_line
from ..core.files import if_address
from .encoder import REFERENCE, Array, Encoder, floor_of, unit


def load(name: str) -> Encoder:
    """Load CLIP, or the text encoder of a base.

    Args:
        name: A folder or hub id. A base is told by its ``model_index.json``, or by having no configuration of its own.

    Returns:
        The encoder, on the CPU.

    Raises:
        UserError: There is no such model, or it is neither.
    """
    found = model_place(name)
    if found is None:
        raise UserError(
            f"there is no encoder {name!r}: neither icons, none, nor a folder or hub id of CLIP or of a base"
            f"{if_address(name)}"
        )
    source, local = found
    try:
        with quiet(transformers_logging):
            return _Both(name, source, local) if _is_clip(source, local) else _Reads(name, source, local)
    except UserError:
        raise
    except Exception as error:
        # Whatever a damaged folder makes the libraries raise, the person needs to know which model it was.
        raise UserError(f"the encoder {name!r} cannot be read: {first_line(error)}") from error


def _is_clip(source: str, local: bool) -> bool:
    """Whether a model is CLIP; raises UserError for one of another kind."""
    if local:
        if (Path(source) / "model_index.json").is_file():
            return False
        config = AutoConfig.from_pretrained(source, local_files_only=True)
    else:
        try:
            config = AutoConfig.from_pretrained(source)
        except (OSError, ValueError):  # a base has configurations for its parts alone
            return False
    if config.model_type != "clip":
        raise UserError(f"{source} is a {config.model_type}, and an encoder is CLIP or a base of Stable Diffusion")
    return True


class _Reads:
    """The text encoder of a base: its pooled output, without what all texts have in common."""

    sees = False
    trust = 0.8
    scale = 0.0

    def __init__(self, name: str, source: str, local: bool) -> None:
        self.name = name
        self._model, self._tokenizer = self._parts(source, local)
        self._model.eval().requires_grad_(False)
        self.fingerprint = fingerprint({"model": self._model})
        self._reference = self._raw(REFERENCE)
        self._common = self._reference.mean(0)
        self.floor = floor_of(unit(self._reference - self._common))

    def _parts(self, source: str, local: bool) -> tuple[Any, Any]:
        return load_reader(source, local)

    def texts(self, texts: Sequence[str]) -> Array:
        return unit(self._raw(texts) - self._common)

    def pictures(self, images: Sequence[Image.Image]) -> tuple[Array, Array]:
        return np.zeros((0, len(self._common)), np.float32), np.zeros(0, np.float32)

    def asked(self, text: str) -> Array:
        raw = self._raw([text])[0]
        return np.stack([unit(raw - self._common), raw], 1)

    def _raw(self, texts: Sequence[str]) -> Array:
        """Embeddings of length 1."""
        pieces = [
            self._batch(tokens(self._model, self._tokenizer, texts[start : start + AT_ONCE]))
            for start in range(0, len(texts), AT_ONCE)
        ]
        found: Array = F.normalize(torch.cat(pieces).float()).numpy()
        return found

    def _batch(self, told: dict[str, Tensor]) -> Tensor:
        found: Tensor = self._model(**told).pooler_output
        return found


class _Both(_Reads):
    """CLIP, which also sees pictures."""

    sees = True
    trust = 0.9

    def __init__(self, name: str, source: str, local: bool) -> None:
        super().__init__(name, source, local)
        self._processor = AutoImageProcessor.from_pretrained(source, local_files_only=local)
        self.scale = float(self._model.logit_scale.exp())

    def _parts(self, source: str, local: bool) -> tuple[Any, Any]:
        model: Any = AutoModel.from_pretrained(source, local_files_only=local)
        if not isinstance(model, CLIPModel):
            raise UserError(f"{source} is a {type(model).__name__}, and an encoder is CLIP or a base of Stable Diffusion")
        return model, AutoTokenizer.from_pretrained(source, local_files_only=local)

    def pictures(self, images: Sequence[Image.Image]) -> tuple[Array, Array]:
        if not images:
            return super().pictures(images)
        pieces = []
        for given in pixels(self._model, self._processor, images):
            pieces.append(self._model.visual_projection(self._model.vision_model(pixel_values=given).pooler_output))
        found: Array = F.normalize(torch.cat(pieces).float()).numpy()
        return found, np.logaddexp.reduce(self.scale * found @ self._reference.T, axis=1)

    def _batch(self, told: dict[str, Tensor]) -> Tensor:
        found: Tensor = self._model.text_projection(self._model.text_model(**told).pooler_output)
        return found
