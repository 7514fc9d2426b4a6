"""Prompts as what a network that denoises is told: tokens, embeddings, and how many tokens do not fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Encoding: TypeAlias = tuple[Tensor, ...]
"""Hidden states of prompts, (prompts, tokens, width), and for a base with two encoders the second one's summary of each
prompt, (prompts, width)."""


class TextSide:
    """The tokenizers and text encoders of a base, used as its pipeline does when it generates.

    Args:
        pairs: Each tokenizer with its encoder, in the order of their hidden states.
    """

    def __init__(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        self.sides = tuple(_Encoder(tokenizer, encoder) for tokenizer, encoder in pairs)
        self.limit = min(side.limit for side in self.sides)

    @property
    def encoders(self) -> list[nn.Module]:
        """The text encoders, in the order of their hidden states."""
        return [side.encoder for side in self.sides]

    def tokens(self, prompt: str) -> int:
        """Count the tokens of a prompt, with the two that mark start and end.

        Args:
            prompt: The prompt.

        Returns:
            The number, of several encoders the largest.
        """
        return max(len(side.ids(prompt)) for side in self.sides)

    def lost(self, prompt: str) -> str:
        """Find the words at the end of a prompt that do not fit.

        Args:
            prompt: The prompt.

        Returns:
            The words; "" where all fit.
        """
        return next((lost for side in self.sides if (lost := side.lost(prompt))), "")

    def tokenized(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Turn prompts into tokens for each encoder, cut at the limit.

        Args:
            prompts: The prompts.

        Returns:
            ``ids`` and perhaps ``mask`` of each encoder, (prompts, tokens) each.
        """
        pairs = [(number, side.tokenized(prompts)) for number, side in enumerate(self.sides)]
        return {f"{name}_{number}": tensor for number, found in pairs for name, tensor in found.items()}

    def run(self, tokens: Mapping[str, Tensor]) -> Encoding:
        """Encode tokens into what the denoiser is told of a prompt.

        Args:
            tokens: The answer of `tokenized`, on the device of the encoders.

        Returns:
            The hidden states, (prompts, tokens, width); for two encoders (SDXL) also the summary, (prompts, width).
        """
        given = [(tokens[f"ids_{number}"], tokens.get(f"mask_{number}")) for number in range(len(self.sides))]
        if len(self.sides) == 1:
            return (self.sides[0].encoder(given[0][0], attention_mask=given[0][1])[0],)
        # As SDXL was trained: the last layer but one of both, side by side, and the summary that the second one gives.
        answers = [
            side.encoder(ids, attention_mask=mask, output_hidden_states=True)
            for side, (ids, mask) in zip(self.sides, given, strict=True)
        ]
        return torch.cat([answer.hidden_states[-2] for answer in answers], -1), answers[-1][0]

    def encode(self, prompts: Sequence[str]) -> Encoding:
        """Encode prompts on the encoders' device, cut at the limit.

        Args:
            prompts: The prompts.

        Returns:
            What the network is told of them.
        """
        device = next(self.encoders[0].parameters()).device
        return self.run({name: tensor.to(device) for name, tensor in self.tokenized(prompts).items()})


@dataclass(frozen=True)
class _Encoder:
    """A text encoder with its tokenizer."""

    tokenizer: Any
    encoder: Any

    @property
    def limit(self) -> int:
        return int(self.tokenizer.model_max_length)

    def ids(self, prompt: str) -> list[int]:
        found: list[int] = self.tokenizer(prompt, truncation=False, verbose=False).input_ids
        return found

    def lost(self, prompt: str) -> str:
        ids = self.ids(prompt)
        return str(self.tokenizer.decode(ids[self.limit - 1 : -1])) if len(ids) > self.limit else ""

    def tokenized(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        text = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.limit, truncation=True, return_tensors="pt"
        )
        uses_mask = bool(getattr(self.encoder.config, "use_attention_mask", False))
        return {"ids": text.input_ids, **({"mask": text.attention_mask} if uses_mask else {})}


@torch.no_grad()
def encode_frozen(side: TextSide, prompts: list[str]) -> Encoding:
    """Encode prompts without gradients, for encoders that are not trained.

    Args:
        side: The encoders.
        prompts: The prompts.

    Returns:
        What the network is told of them.
    """
    return side.encode(prompts)
