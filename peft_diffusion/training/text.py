"""Prompts as what the UNet is told: tokens, embeddings, and how many tokens do not fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import UserError


@dataclass(frozen=True)
class Conditioning:
    """What a UNet is told besides noisy latents and timesteps.

    ``hidden`` is (batch, tokens, width); ``added`` are further inputs by the names that the UNet's config gives them.
    """

    hidden: Tensor
    added: Mapping[str, Tensor] = field(default_factory=dict)


class TextSide:
    """The tokenizer and text encoder of a base, used as its pipeline does when it generates.

    Raises UserError for bases with two encoders, which training does not know.
    """

    def __init__(self, pipe: Any) -> None:
        if getattr(pipe, "text_encoder_2", None) is not None:
            raise UserError("training knows bases with one text encoder (Stable Diffusion 1 and 2), not SDXL")
        self.tokenizer: Any = pipe.tokenizer
        self.encoder: nn.Module = pipe.text_encoder
        self.limit = int(self.tokenizer.model_max_length)
        self.uses_mask = bool(getattr(pipe.text_encoder.config, "use_attention_mask", False))

    def tokens(self, prompt: str) -> int:
        """How many tokens a prompt has, with the two that mark start and end."""
        return len(self.tokenizer(prompt, truncation=False, verbose=False).input_ids)

    def lost(self, prompt: str) -> str:
        """The words at the end of a prompt that do not fit; empty where all do."""
        ids = self.tokenizer(prompt, truncation=False, verbose=False).input_ids
        return str(self.tokenizer.decode(ids[self.limit - 1 : -1])) if len(ids) > self.limit else ""

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """The hidden states of prompts, (prompts, tokens, width), on the encoder's device; cut at the limit."""
        text = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.limit, truncation=True, return_tensors="pt"
        )
        device = next(self.encoder.parameters()).device
        mask = text.attention_mask.to(device) if self.uses_mask else None
        hidden: Tensor = self.encoder(text.input_ids.to(device), attention_mask=mask)[0]
        return hidden


@torch.no_grad()
def encode_frozen(side: TextSide, prompts: list[str]) -> Tensor:
    """The same without gradients, for an encoder that is not trained."""
    return side.encode(prompts)
