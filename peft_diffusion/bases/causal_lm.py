"""Causal language models as bases."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..core import quantized
from ..core.errors import UserError, first_line
from ..core.files import at_home, if_address
from ..core.parsing import refusing
from .digest import fingerprint
from .digest import quantize as quantize_all
from .embedded import TINY_LM, embedded
from .family import LANGUAGE
from .loading import is_hub_id, named_source, pick_device, pick_dtype, quiet, refuse_beyond


@dataclass(frozen=True)
class LanguageInfo:
    """What an adapter must know of a language model: its class, and its vocabulary and context in tokens."""

    name: str
    architecture: str
    vocabulary: int
    context: int
    fingerprint: str
    family: str = LANGUAGE.name


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer; ``lm`` maps ``input_ids`` to ``logits``."""

    lm: Any
    tokenizer: Any
    name: str

    @property
    def context(self) -> int:
        """The most tokens that it knows places for."""
        return int(self.lm.config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        device: torch.device = self.lm.device
        return device

    def start(self) -> list[int]:
        """The tokens that its tokenizer puts before every text, those of soft prompts first."""
        return list(self.tokenizer("").input_ids)

    def encode(self, text: str) -> list[int]:
        """Encode a text.

        Args:
            text: The text.

        Returns:
            Its tokens and nothing else.
        """
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def describe(self) -> LanguageInfo:
        """Name, architecture and fingerprint."""
        config = self.lm.config
        return LanguageInfo(
            name=self.name,
            architecture=type(self.lm).__name__,
            vocabulary=int(config.vocab_size),
            context=self.context,
            fingerprint=fingerprint({"lm": self.lm}),
        )


def load_lm(
    source: str | Path | LanguageModel = TINY_LM,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
) -> LanguageModel:
    """Load a causal language model, frozen, in eval mode.

    Args:
        source: ``"tiny-lm"`` (embedded), a folder in the format of transformers, or a hub id.
        device: ``auto`` takes an accelerator if there is one.
        dtype: float32, bfloat16, float16, or ``auto``: the best that the device computes fast.
        quantize: nf4 or int8 for Linear layers in fewer bits; the output layer stays as it is.

    Returns:
        The model with its tokenizer, on its device.

    Raises:
        UserError: There is no such base, or it cannot be read as a causal language model or quantized.
    """
    if isinstance(source, LanguageModel):
        if quantize is not None and quantized.kind_of(source.lm) != quantize:
            raise UserError(f"this base is loaded already, and not as {quantize}; load it with load_lm(..., quantize=...)")
        return _checked(source)
    named = named_source(source, "a LanguageModel")
    if quantize is not None:
        quantized.check(quantize)  # before gigabytes are read
    where = pick_device(device)
    chosen = pick_dtype(dtype, where)
    with quiet(transformers_logging):
        model, tokenizer, name = _read(named, chosen)
    if quantize is not None:
        quantize_all({"lm": model}, quantize, where)
    with refusing(f"base {named!r} has a configuration that cannot be used"):
        return frozen(LanguageModel(model.to(where), tokenizer, name))


def frozen(base: LanguageModel) -> LanguageModel:
    """Take gradients and dropout from a language model.

    Args:
        base: The model.

    Returns:
        The same.

    Raises:
        UserError: It lacks what a language model needs.
    """
    _checked(base)
    base.lm.requires_grad_(False)
    base.lm.eval()
    return base


def _checked(base: LanguageModel) -> LanguageModel:
    if not isinstance(base.lm, nn.Module) or getattr(base.lm.config, "max_position_embeddings", None) is None:
        raise UserError(f"base {base.name!r} does not say how long a text it takes, so it is no model to be taught text")
    return base


def _read(source: str, dtype: torch.dtype) -> tuple[Any, Any, str]:
    path = embedded("text/base") if source == TINY_LM else at_home(Path(source))
    try:
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise UserError(f"{path} is no folder of a language model: it holds no config.json")
            refuse_beyond(path)
            # By absolute path, or a folder such as "owner/name" would be looked up on the hub.
            model = AutoModelForCausalLM.from_pretrained(str(path.resolve()), dtype=dtype, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(str(path.resolve()), local_files_only=True)
            return model, tokenizer, TINY_LM if source == TINY_LM else path.resolve().name
        if is_hub_id(source) and not path.parent.is_dir():
            return AutoModelForCausalLM.from_pretrained(source, dtype=dtype), AutoTokenizer.from_pretrained(source), source
    except UserError:
        raise
    except Exception as error:
        # Whatever a damaged folder makes the libraries raise, the person needs to know which base it was.
        raise UserError(f"base {source!r} cannot be read as a causal language model: {first_line(error)}") from error
    known = f"neither {TINY_LM!r}, nor a folder, nor a hub id (owner/name)"
    raise UserError(f"there is no base {source!r}: {known}{if_address(source)}")
