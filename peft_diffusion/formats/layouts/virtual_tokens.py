"""Prompt learning of peft: one tensor of virtual tokens, ``prompt_embeddings``, and a configuration for their kind.

Prompt tuning and P-tuning keep what stands before the text at the token embedding; prefix tuning the keys and values of
every attention side by side. What methods make of that they declare: see ``Method.from_virtual_tokens``.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from ... import methods
from ...bases import family as families
from ...core.errors import UserError
from ...core.method import VirtualRows
from ..container import Header
from ..layout import Place, Reading, ReadOnly, register
from .dotted import configuration

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...bases.base import Base

_NAME = "prompt_embeddings"
_OTHERS = ("prefix_task_cols", "prefix_task_rows")  # of multitask prompt tuning
_TOKENS, _LAYER = "virtual.tokens", "virtual.layers."
_LANGUAGE = "lm"
_DEFAULT = "*"  # what tokens began as of which nobody says it, as with learned words


class VirtualTokens(ReadOnly):
    """Virtual tokens of one model."""

    name: ClassVar[str] = "virtual_tokens"

    def claims(self, name: str) -> int | None:
        """The only names that peft has for it."""
        return len(name) if name in (_NAME, *_OTHERS) else None

    def read(self, header: Header, names: Sequence[str]) -> Reading:
        """By ``adapter_config.json`` beside the file."""
        config, shape = configuration(header), header.tensors[names[0]].shape
        found, why = _rows(config, shape, names)
        if why:
            return Reading({}, dict.fromkeys(names, why))
        places: list[Place] = []
        constants: dict[Place, float] = {}
        for one in found:
            site = _TOKENS if one.layer is None else f"{_LAYER}{one.layer}"
            first, last = one.columns
            change = partial(_columns, first, last)
            own = (shape[0], last - first)
            places.append(Place(_LANGUAGE, site, one.suffix, one.words, change=change, shape=own))
            constants |= {Place(_LANGUAGE, site, suffix): value for suffix, value in one.constants.items()}
        return Reading({_NAME: places[0]}, {}, constants, (), {_NAME: tuple(places[1:])})

    def sites(self, component: str, module: "nn.Module") -> Mapping[str, str]:
        """The token embedding, and the attentions by the number of their layer."""
        from ...core import targets

        if families.role_of(component) != "language model":
            return {}
        try:
            tokens, attentions = targets.match(module, "tokens"), targets.match(module, "attentions")
        except UserError:  # an architecture of which these are not known
            return {}
        numbers = {path: getattr(module.get_submodule(path), "layer_idx", None) for path in attentions}
        return {_TOKENS: tokens[0], **{f"{_LAYER}{number}": path for path, number in numbers.items() if number is not None}}

    def joined(self, pieces: "Mapping[str, Tensor]", header: Header, base: "Base", component: str) -> "dict[str, Tensor]":
        """The vectors, and the tokens of the words that the configuration says they began as, in turn."""
        import json

        import torch

        from ...bases.base import text_encoders
        from ...bases.taught import plain_ids

        ((words, vectors),) = pieces.items()
        config = configuration(header) or {}
        (one,) = _rows(config, tuple(vectors.shape), (_NAME,))[0]
        tokenizer = getattr(base, text_encoders(base)[component])
        ids = plain_ids(tokenizer, str(config.get("prompt_tuning_init_text") or _DEFAULT)) or plain_ids(tokenizer, _DEFAULT)
        began = [ids[index % len(ids)] for index in range(len(vectors))]
        text = json.dumps({"": began}).encode()
        return {one.suffix: vectors, words: torch.tensor(list(text), dtype=torch.uint8)}


def _rows(
    config: Mapping[str, Any] | None, shape: tuple[int, ...], names: Sequence[str]
) -> tuple[Sequence[VirtualRows], str]:
    """What methods make of virtual tokens, or why none can."""
    if config is None:
        return (), "are virtual tokens, and no adapter_config.json is beside the file to tell of which kind"
    kind = str(config.get("peft_type"))
    if any(name != _NAME for name in names):
        return (
            (),
            f"are of peft's {kind}, which has a prompt for each task, and here is one prompt for all texts",
        )
    if config.get("num_transformer_submodules") not in (None, 1):
        return (), f"are of peft's {kind} on an encoder and a decoder, and here language models have no encoder"
    if len(shape) != 2 or 0 in shape:
        return (), "have not the shape of virtual tokens"
    layers = config.get("num_layers")
    number = layers if isinstance(layers, int) else 0
    every = (one.from_virtual_tokens(kind, shape[1], number) for one in methods.known().values())
    found = next((one for one in every if one), ())
    if found:
        return found, ""
    if kind == "CPT":
        return (), "are of peft's CPT, which holds its tokens near words of the base while it runs"
    return (), f"are of peft's {kind} with {shape[1]} numbers a token and {layers} layers, which no method here says"


def _columns(first: int, last: int, tensor: "Tensor") -> "Tensor":
    return tensor[:, first:last].clone()


register(VirtualTokens())
