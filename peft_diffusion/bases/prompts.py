"""Prompts as what a network that denoises is told: tokens in chunks, their weights, and embeddings."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from .prompt_syntax import Chunk, Part, Unit, Weights, chunked, parse
from .taught import ends, learned, plain_ids, soft_prompt, units

Encoding: TypeAlias = tuple[Tensor, ...]
"""Hidden states of prompts, (prompts, tokens, width), and for a base with two encoders the second one's summary of each
prompt, (prompts, width). The tokens are those of one chunk, or of several, one after the other."""


CHUNK = 75
"""Tokens of a chunk of CLIP, without those that mark start and end."""
_ROUNDING = 1e-6  # of a mean in float32, as a share of the mean size of its numbers: eight times what each is rounded by
_OF_PROMPTS = ("ids_", "mask_", "emphasis_", "hidden")  # what names of tensors of prompts begin with


@dataclass(frozen=True)
class Reading:
    """How prompts are read.

    Attributes:
        weights: Whose arithmetic brackets follow, or "none".
        chunks: The most chunks that a prompt may have; None for as many as it takes.
        clip_skip: Which hidden states are taken, counted from the last layer, which is 1, as A1111 and kohya's trainer
            count; None takes those that the base was trained with: the last, or for two encoders (SDXL) the last but one.
        letters: Words that are read as they stand, whatever brackets they have, as triggers that were learned so.
    """

    weights: Weights = "a1111"
    chunks: int | None = None
    clip_skip: int | None = None
    letters: tuple[str, ...] = ()


class TextSide:
    """The tokenizers and text encoders of a base.

    A prompt of more tokens than an encoder reads at once is read in chunks, each with a start and an end of its own, whose
    hidden states follow one another, as in A1111 and ComfyUI. Where prompts of several lengths are read together, the
    shorter ones are repeated, which changes nothing of what attention makes of them.

    Args:
        pairs: Each tokenizer with its encoder, in the order of their hidden states.
        reading: How prompts are read.
    """

    def __init__(self, pairs: Sequence[tuple[Any, Any]], reading: Reading = Reading()) -> None:
        self.pairs = tuple(pairs)
        self.reading = reading
        self.sides = tuple(_Encoder(tokenizer, encoder) for tokenizer, encoder in pairs)
        self.limit = min(side.limit for side in self.sides)

    def read_as(self, reading: Reading) -> "TextSide":
        """The same tokenizers and encoders, for prompts that are read in another way.

        Args:
            reading: How they are.

        Returns:
            Another text side.
        """
        return TextSide(self.pairs, reading)

    @property
    def encoders(self) -> list[nn.Module]:
        """The text encoders, in the order of their hidden states."""
        return [side.encoder for side in self.sides]

    @property
    def clip_skip(self) -> int:
        """Which hidden states are taken, counted from the last layer, which is 1."""
        return self.reading.clip_skip or self.usual_clip_skip

    @property
    def usual_clip_skip(self) -> int:
        """Which hidden states the base was trained with: the last, or of two encoders (SDXL) the last but one."""
        return 1 if len(self.sides) == 1 else 2

    def check(self) -> None:
        """See that the encoders have the layer that shall be taken.

        Raises:
            UserError: They have fewer.
        """
        layers = min(int(side.encoder.config.num_hidden_layers) for side in self.sides) if self.reading.clip_skip else 0
        if self.reading.clip_skip and self.reading.clip_skip > layers:
            raise UserError(
                f"clip skip {self.reading.clip_skip} is more than the {layers} layers of the base's text encoder"
            )

    def chunks(self, prompts: Sequence[str]) -> list[int]:
        """Count the chunks of prompts, whatever the most is.

        Args:
            prompts: The prompts, which are read together.

        Returns:
            For each the number, of several encoders the largest.
        """
        counts = [[len(row) for row in side.rows(prompts, self.reading)] for side in self.sides]
        return [max(each) for each in zip(*counts, strict=True)]

    def lost(self, prompt: str) -> str:
        """Find the words at the end of a prompt that do not fit.

        Args:
            prompt: The prompt.

        Returns:
            The words; "" where all fit.
        """
        return next((lost for side in self.sides if (lost := side.lost(prompt, self.reading))), "")

    def tokenized(self, prompts: Sequence[str], second: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Turn prompts into tokens for each encoder, cut at the most chunks.

        Args:
            prompts: The prompts.
            second: What the second encoder reads in their place; None for the same.

        Returns:
            ``ids`` and perhaps ``mask`` and ``emphasis`` (the weight of each token, where any has one) of each encoder,
            (prompts, tokens) each, the chunks of a prompt one after the other.
        """
        read = [prompts, *([second or prompts] * (len(self.sides) - 1))]
        rows = [
            [row[: self.reading.chunks] for row in side.rows(given, self.reading)]
            for side, given in zip(self.sides, read, strict=True)
        ]
        counts = [max(map(len, each)) for each in zip(*rows, strict=True)]
        common = math.lcm(*counts)
        found: dict[str, Tensor] = {}
        for number, (side, own) in enumerate(zip(self.sides, rows, strict=True)):
            filled = [row + [Chunk((), ())] * (count - len(row)) for row, count in zip(own, counts, strict=True)]
            found |= {
                f"{name}_{number}": one for name, one in side.tensors([r * (common // len(r)) for r in filled]).items()
            }
        return found

    def run(self, tokens: Mapping[str, Tensor]) -> Encoding:
        """Encode tokens into what the denoiser is told of a prompt.

        Args:
            tokens: The answer of `tokenized`, on the device of the encoders.

        Returns:
            The hidden states, (prompts, tokens, width); for two encoders (SDXL) also the summary, (prompts, width).
        """
        answers = []
        for number, side in enumerate(self.sides):
            given = {
                name: tokens[f"{name}_{number}"] for name in ("ids", "mask", "emphasis") if f"{name}_{number}" in tokens
            }
            answers.append(side.run(given, self.clip_skip, self.reading.weights, normed=len(self.sides) == 1))
        hidden = [states for states, _ in answers]
        # As SDXL was trained: a layer of both, side by side, and the summary that the second one gives.
        return (hidden[0],) if len(hidden) == 1 else (torch.cat(hidden, -1), answers[-1][1])

    def encode(
        self, prompts: Sequence[str], second: Sequence[str] | None = None, device: torch.device | None = None
    ) -> Encoding:
        """Encode prompts, cut at the most chunks.

        Args:
            prompts: The prompts.
            second: What the second encoder reads in their place; None for the same.
            device: Where the encoders compute; None for where they are.

        Returns:
            What the network is told of them.
        """
        where = next(self.encoders[0].parameters()).device if device is None else device
        return self.run({name: tensor.to(where) for name, tensor in self.tokenized(prompts, second).items()})


def alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Bring prompts of several lengths to one, by repeating the shorter ones.

    Attention over what is repeated gives what it gives over it once: each key has its copies, and so has the sum that the
    weights are divided by.

    Args:
        tensors: Hidden states, tokens or weights of chunks, (prompts, tokens, ...) each.

    Returns:
        All of them with the least common number of tokens.
    """
    common = math.lcm(*(tensor.shape[1] for tensor in tensors))
    return [one.repeat(1, common // one.shape[1], *[1] * (one.ndim - 2)) for one in tensors]


@dataclass(frozen=True)
class _Encoder:
    """A text encoder with its tokenizer."""

    tokenizer: Any
    encoder: Any

    @property
    def limit(self) -> int:
        return int(self.tokenizer.model_max_length)

    @cached_property
    def ends(self) -> tuple[list[int], list[int]]:
        """The tokens before a text, and those after it."""
        return ends(self.tokenizer)

    @cached_property
    def comma(self) -> int | None:
        """The token of a comma; None for a base without."""
        found = plain_ids(self.tokenizer, ",")
        return found[0] if len(found) == 1 else None

    def rows(self, prompts: Sequence[str], reading: Reading) -> list[list[Chunk]]:
        """The chunks of each prompt. Raises UserError for a learned word that fits none."""
        words = [*reading.letters, *(name for name in learned(self.tokenizer) if "|" not in name)]
        parts = [list(_parts(prompt, reading, words)) for prompt in prompts]
        found = iter(units(self.tokenizer, [part.text for prompt in parts for part in prompt if part is not None]))
        start, end = self.ends
        room = self.limit - len(start) - len(end)
        rows = []
        for index, prompt in enumerate(parts):
            front = soft_prompt(self.tokenizer, index, len(parts))
            read = itertools.chain([Unit(front)] if front else (), _units(prompt, found, reading.weights))
            rows.append(chunked(read, room, self.comma, reading.weights))
        return rows

    def lost(self, prompt: str, reading: Reading) -> str:
        (row,) = self.rows([prompt], reading)
        ids = [one for chunk in row[reading.chunks :] for one in chunk.ids] if reading.chunks is not None else []
        return str(self.tokenizer.decode(ids)).strip() if ids else ""

    def tensors(self, rows: Sequence[Sequence[Chunk]]) -> dict[str, Tensor]:
        """Tokens of prompts with as many chunks each, filled up."""
        start, end = self.ends
        pad = self.tokenizer.pad_token_id
        ids, masks, emphasis = [], [], []
        for row in rows:
            lengths = [len(start) + len(chunk.ids) + len(end) for chunk in row]
            fills = [self.limit - length for length in lengths]
            ids.append([one for chunk, f in zip(row, fills, strict=True) for one in (*start, *chunk.ids, *end, *[pad] * f)])
            masks.append([one for length, f in zip(lengths, fills, strict=True) for one in [1] * length + [0] * f])
            ones = [1.0] * len(start), [1.0] * len(end)
            pairs = zip(row, fills, strict=True)
            emphasis.append([one for chunk, f in pairs for one in (*ones[0], *chunk.weights, *ones[1], *[1.0] * f)])
        found = {"ids": torch.tensor(ids)}
        if getattr(self.encoder.config, "use_attention_mask", False):
            found["mask"] = torch.tensor(masks)
        if any(one != 1.0 for row in emphasis for one in row):
            found["emphasis"] = torch.tensor(emphasis)
        return found

    def run(self, given: Mapping[str, Tensor], clip_skip: int, weights: Weights, *, normed: bool) -> tuple[Tensor, Any]:
        """Hidden states of all chunks, and the summary of the first; each chunk in a call of its own, in which every row is
        a prompt: strengths for each image follow the rows."""
        parts = {name: tensor.split(self.limit, 1) for name, tensor in given.items()}
        empty = self._empty(given["ids"], clip_skip, normed) if weights == "comfyui" and "emphasis" in given else None
        states, summaries = [], []
        for number, ids in enumerate(parts["ids"]):
            mask = parts["mask"][number] if "mask" in parts else None
            hidden, summary = self._answer(ids, mask, clip_skip, normed)
            if "emphasis" in parts:
                hidden = _weighed(hidden, parts["emphasis"][number], empty)
            states.append(hidden)
            summaries.append(summary)
        return (states[0] if len(states) == 1 else torch.cat(states, 1)), summaries[0]

    def _answer(self, ids: Tensor, mask: Tensor | None, clip_skip: int, normed: bool) -> tuple[Tensor, Any]:
        if normed and clip_skip == 1:
            return self.encoder(ids, attention_mask=mask)[0], None
        answer = self.encoder(ids, attention_mask=mask, output_hidden_states=True)
        hidden = answer.hidden_states[-clip_skip]
        if not normed:
            return hidden, answer[0]
        return getattr(self.encoder, "text_model", self.encoder).final_layer_norm(hidden), None

    def _empty(self, ids: Tensor, clip_skip: int, normed: bool) -> Tensor:
        """Hidden states of no words, once for each prompt."""
        nothing = self.tensors([[Chunk((), ())]])
        told = {name: tensor.to(ids.device).expand(len(ids), -1) for name, tensor in nothing.items()}
        return self._answer(told["ids"], told.get("mask"), clip_skip, normed)[0]


def _parts(prompt: str, reading: Reading, words: Sequence[str]) -> Iterator[Part | None]:
    """The parts of a prompt; for ComfyUI word by word, which it keeps whole."""
    for part in parse(prompt, reading.weights, words):
        if part is None or reading.weights != "comfyui":
            yield part
        else:
            yield from (Part(word, part.weight) for word in part.text.replace("\n", " ").split(" ") if word)


def _units(parts: Sequence[Part | None], found: Iterator[list[tuple[int, ...]]], weights: Weights) -> Iterator[Unit | None]:
    """The tokens of parts, with their weights."""
    for part in parts:
        if part is None:
            yield None
        elif weights != "comfyui":
            yield from (Unit(ids, part.weight) for ids in next(found))
        else:
            of_word = next(found)
            learned_word = len(of_word) == 1 and len(of_word[0]) > 1
            yield Unit(tuple(one for ids in of_word for one in ids), part.weight, whole=learned_word)


def _weighed(hidden: Tensor, emphasis: Tensor, empty: Tensor | None) -> Tensor:
    """Hidden states of a chunk with the weights of its tokens.

    A1111 multiplies them, and then all by what brings the mean of the chunk back; ComfyUI goes from those of no words, which
    are ``empty``, towards them or past them. A mean that is 0 but for rounding is not brought back, where A1111 divides all
    the same (`EmphasisOriginal` of its modules/sd_emphasis.py): an encoder whose last norm was never trained has such
    means, and their ratio is any number, another one in each size of batch.
    """
    factors = emphasis[..., None].to(hidden.dtype)
    if empty is not None:
        return torch.where(factors == 1, hidden, (hidden - empty) * factors + empty)
    weighed = hidden * factors
    before, after = (one.float().mean((1, 2), keepdim=True) for one in (hidden, weighed))
    rounding = max(_ROUNDING, torch.finfo(hidden.dtype).eps / math.sqrt(hidden[0].numel()))  # each number's own, in the mean
    least = rounding * hidden.float().abs().mean((1, 2), keepdim=True)
    known = (before.abs() > least) & (after.abs() > least)
    return weighed * torch.where(known, before / after, 1).to(hidden.dtype)


def together(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the inputs of two batches into one.

    Args:
        one: Tensors by name, (batch, ...) each; prompts as tokens or hidden states.
        other: The same names; weights of tokens may be in one alone.

    Returns:
        The rows of the first, then those of the second, prompts of the least common number of tokens.
    """
    names = [*one, *(name for name in other if name not in one)]
    found = {}
    for name in names:
        pair = [batch[name] if name in batch else _plain(name, batch) for batch in (one, other)]
        found[name] = torch.cat(alike(pair) if name.startswith(_OF_PROMPTS) else pair)
    return found


def _plain(name: str, batch: Mapping[str, Tensor]) -> Tensor:
    """The weights of tokens of which none has one."""
    return torch.ones_like(batch[name.replace("emphasis", "ids")], dtype=torch.float32)


def with_prompts(batch: Mapping[str, Tensor], tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give a batch other prompts.

    Args:
        batch: Tensors by name, (batch, ...) each.
        tokens: The prompts, as `TextSide.tokenized` gives them.

    Returns:
        The same with these in the place of what it told.
    """
    return {name: one for name, one in batch.items() if not name.startswith(_OF_PROMPTS)} | dict(tokens)


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
