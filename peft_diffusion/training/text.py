"""Prompts as what the UNet is told: tokens, embeddings, and how many tokens do not fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Encoding: TypeAlias = tuple[Tensor, ...]
"""Hidden states of prompts, (prompts, tokens, width), and for a base with two encoders the second one's summary of each
prompt, (prompts, width)."""


@dataclass(frozen=True)
class Conditioning:
    """What a UNet is told besides noisy latents and timesteps.

    ``hidden`` is (batch, tokens, width); ``added`` are further inputs by the names that the UNet's config gives them.
    """

    hidden: Tensor
    added: Mapping[str, Tensor] = field(default_factory=dict)


class TextSide:
    """The tokenizers and text encoders of a base, used as its pipeline does when it generates."""

    def __init__(self, pipe: Any) -> None:
        first = _Encoder(pipe.tokenizer, pipe.text_encoder)
        second = getattr(pipe, "text_encoder_2", None)
        self.sides = (first,) if second is None else (first, _Encoder(pipe.tokenizer_2, second))
        self.limit = min(side.limit for side in self.sides)

    @property
    def encoders(self) -> list[nn.Module]:
        """The text encoders, in the order of their hidden states."""
        return [side.encoder for side in self.sides]

    def tokens(self, prompt: str) -> int:
        """How many tokens a prompt has, with the two that mark start and end."""
        return max(len(side.ids(prompt)) for side in self.sides)

    def lost(self, prompt: str) -> str:
        """The words at the end of a prompt that do not fit; empty where all do."""
        return next((lost for side in self.sides if (lost := side.lost(prompt))), "")

    def encode(self, prompts: Sequence[str]) -> Encoding:
        """What the UNet is told of prompts, on the encoders' device; cut at the limit."""
        if len(self.sides) == 1:
            return (self.sides[0](prompts)[0],)
        # As SDXL was trained: the last layer but one of both, side by side, and the summary that the second one gives.
        answers = [side(prompts, output_hidden_states=True) for side in self.sides]
        return torch.cat([answer.hidden_states[-2] for answer in answers], -1), answers[-1][0]


@dataclass(frozen=True)
class _Encoder:
    """A text encoder with its tokenizer."""

    tokenizer: Any
    encoder: nn.Module

    @property
    def limit(self) -> int:
        return int(self.tokenizer.model_max_length)

    def ids(self, prompt: str) -> list[int]:
        found: list[int] = self.tokenizer(prompt, truncation=False, verbose=False).input_ids
        return found

    def lost(self, prompt: str) -> str:
        ids = self.ids(prompt)
        return str(self.tokenizer.decode(ids[self.limit - 1 : -1])) if len(ids) > self.limit else ""

    def __call__(self, prompts: Sequence[str], output_hidden_states: bool = False) -> Any:
        text = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.limit, truncation=True, return_tensors="pt"
        )
        device = next(self.encoder.parameters()).device
        uses_mask = bool(getattr(self.encoder.config, "use_attention_mask", False))
        mask = text.attention_mask.to(device) if uses_mask else None
        return self.encoder(text.input_ids.to(device), attention_mask=mask, output_hidden_states=output_hidden_states)


@torch.no_grad()
def encode_frozen(side: TextSide, prompts: list[str]) -> Encoding:
    """The same without gradients, for encoders that are not trained."""
    return side.encode(prompts)
