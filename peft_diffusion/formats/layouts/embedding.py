"""Embeddings of new words, as A1111, ComfyUI, kohya, OneTrainer and diffusers' scripts know them.

Alone, one word is ``emb_params`` (Stable Diffusion 1 and 2) or ``clip_l`` and ``clip_g`` (XL), as kohya's sd-scripts write
it and A1111 and ComfyUI read it; the latter two call it by the file's name. Beside other methods, and with several words,
it is ``bundle_emb.<word>.clip_l``, as OneTrainer writes and A1111 reads it. A word may also be the name itself, with angle
brackets or without, as diffusers' scripts and its library of concepts have it; and a file that ends in ``_emb``, which those
scripts write beside a LoRA, has a row for each of ``<s0>``, ``<s1>`` and so on. diffusers' own loader takes no file in which
anything stands beside LoRA keys, whatever its name; no layout would change that. What the words began as is in the metadata.

The method that such a file is of declares that itself: see ``Method.embedding``.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from ... import methods
from ...bases import family as families
from ...core.errors import UserError
from ...core.method import Method
from ...core.parsing import json_value, refusing
from .. import metadata
from ..container import Header
from ..layout import NO_LAYOUT, Content, Layout, Place, Reading, Written, WrittenOnly, register
from ..names import embeddings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...bases.base import AnyBase
    from ...core.adapter import Adapter

KEY = "peft_diffusion.words"
"""The metadata entry with the tokens that words began as, by component and word."""

_BUNDLE = "bundle_emb."
_WORD = re.compile(r"<\S+>")  # an embedding as diffusers' scripts write it, for the first text encoder
_BARE = re.compile(r"[^\s.]+")  # the same without brackets, where nothing else is in the file
_MOST = 75  # vectors of a word: as many tokens as a prompt has room for
_NARROWEST = 16  # numbers of a vector: what is less is no embedding
_BESIDE = "_emb"  # what the names of files end with that diffusers' scripts write beside a LoRA
_PARAMETERS = ("weight", "bias")  # what modules call their tensors
ALONE = "emb_params"
"""What a single word for the first text encoder is called."""

_DEFAULT = "*"  # which A1111 begins with
_DEFAULTS_ID = 265  # of that token in CLIP's vocabulary
_SITE = "embeddings.token_embedding"  # the token embedding, as CLIP calls it; `Embedding.sites` finds that of others


@dataclass(frozen=True)
class Learned:
    """A learned word and its vectors.

    Attributes:
        component: The component that reads it.
        word: The word.
        ids: The tokens that its vectors began as.
        vectors: (tokens, width).
    """

    component: str
    word: str
    ids: Sequence[int]
    vectors: "Tensor"


class Embedding(Layout):
    """Words alone, or beside other methods in a bundle."""

    name: ClassVar[str] = "embedding"

    def claims(self, name: str) -> int | None:
        """The names of embeddings, those of a bundle, words in angle brackets, and words that no other layout has."""
        if name in embeddings() or (name.startswith("<") and _WORD.fullmatch(name)):
            return len(name)
        if name.startswith(_BUNDLE):
            return len(_BUNDLE)
        return 0 if "." not in name and _BARE.fullmatch(name) else None

    def read(self, header: Header, names: Sequence[str]) -> Reading:
        """By the names, the metadata, and, for a word that none of these names, the file's name."""
        began, suffix, are_words = _began(header), _vectors_suffix(), _are_words(header)
        places: dict[str, Place] = {}
        leftovers: dict[str, str] = {}
        further: dict[str, tuple[Place, ...]] = {}
        for name in names:
            shape = header.tensors[name].shape
            if not _is_named(name) and not are_words:
                leftovers[name] = NO_LAYOUT
                continue
            word, component = _meaning(header, name, began)
            others = _others(component) if _names_none(name) else ()
            if not component or not word:
                leftovers[name] = "name no word and text encoder that are known here"
            elif len(shape) not in (1, 2) or 0 in shape:
                leftovers[name] = "have not the shape of an embedding"
            elif name in embeddings() and len(shape) == 2 and not began and header.path.stem.endswith(_BESIDE):
                every = [
                    Place(component, _SITE, suffix, f"<s{row}>", change=partial(_row, row), shape=(1, shape[1]))
                    for row in range(shape[0])
                ]
                places[name], further[name] = every[0], tuple(every[1:])
            else:
                places[name] = Place(component, _SITE, suffix, piece=word, others=others)
        return Reading(places, leftovers, further=further)

    def write(self, content: Content) -> Written:
        """Words and nothing else."""
        return _alone(self.name, content)

    def sites(self, component: str, module: "nn.Module") -> Mapping[str, str]:
        """The token embedding of a text encoder."""
        from ...core import targets

        method = _method()
        if method is None or families.role_of(component) != "text encoder":
            return {}
        try:
            return {_SITE: targets.match(module, method.target)[0]}
        except UserError:  # an architecture whose token embedding is not known
            return {}

    def joined(self, pieces: "Mapping[str, Tensor]", header: Header, base: "AnyBase", component: str) -> "dict[str, Tensor]":
        """The words in the order that the metadata tell, and what they began as."""
        import torch

        method = _method()
        if method is None or method.embedding is None:
            raise UserError(f"{header.path} holds words, and no method that learns words is known")
        told = _began(header).get(component, {})
        if len(told) == len(pieces) == 1:  # the word may be called otherwise than in the file
            told = dict(zip(pieces, told.values(), strict=True))
        order = sorted(pieces, key=lambda word: list(told).index(word) if word in told else len(told))
        vectors = {word: pieces[word].reshape(-1, pieces[word].shape[-1]) for word in order}
        words = {word: told.get(word) or _default(base, component, len(vectors[word])) for word in order}
        text = json.dumps(words, ensure_ascii=False).encode()
        tensors = torch.cat(list(vectors.values())), torch.tensor(list(text), dtype=torch.uint8)
        return dict(zip(method.embedding, tensors, strict=True))


class OfA1111(WrittenOnly):
    """One word in a file, which A1111, Forge and ComfyUI call by the file's name; as ``.pt`` what A1111 itself writes."""

    name: ClassVar[str] = "embedding-a1111"

    def write(self, content: Content) -> Written:
        """One word."""
        found = _alone(self.name, content)
        word = _only_word(self.name, content)
        first, *others = found.tensors.values()
        told: dict[str, object] = {"name": word, "step": content.spec.training.get("steps_done")}
        checkpoint = {"sd_checkpoint": None, "sd_checkpoint_name": content.spec.base.get("name")}
        pickled = {"string_to_token": {_DEFAULT: _DEFAULTS_ID}, "string_to_param": {_DEFAULT: first}, **told, **checkpoint}
        return replace(found, pickled=dict(found.tensors) if others else pickled)


class OfDiffusers(WrittenOnly):
    """One word for one text encoder, under its own name, as diffusers' scripts write it."""

    name: ClassVar[str] = "embedding-diffusers"

    def write(self, content: Content) -> Written:
        """One word of one text encoder."""
        found = _alone(self.name, content)
        word = _only_word(self.name, content)
        if len(found.tensors) > 1:
            raise UserError(
                f"diffusers reads a word for one text encoder from a file, and {word!r} is for {len(found.tensors)}; convert"
                " it twice, with --component text_encoder and --component text_encoder_2, or take the layout 'embedding'"
            )
        tensors = dict.fromkeys([word], *found.tensors.values())
        return replace(found, tensors=tensors, pickled=tensors)


def _alone(layout: str, content: Content) -> Written:
    """Words and nothing else. Raises UserError for anything else."""
    from ...core.adapter import method_of

    rest, words = parted(content)
    if rest:
        component, path, part = rest[0]
        raise UserError(
            f"the layout {layout!r} holds new words alone, without a dot in them, for text encoders that have such"
            f" files; {method_of(part)} at {component}.{path} is none: take the layout 'kohya'"
        )
    found = written(words, alone=True)
    return replace(found, metadata=metadata.of_any(content.spec) | dict(found.metadata))


def _only_word(layout: str, content: Content) -> str:
    words = list(dict.fromkeys(one.word for one in parted(content)[1]))
    if len(words) != 1:
        raise UserError(
            f"the layout {layout!r} holds one word in a file, and there are {', '.join(words)}; take the layout"
            " 'embedding', which holds all of them"
        )
    return words[0]


def parted(content: Content) -> "tuple[list[tuple[str, str, Adapter]], list[Learned]]":
    """Part the new words of an adapter, as far as other programs know such, from all else.

    Args:
        content: What a file is to hold.

    Returns:
        Component, path and part of all else; and the words, in the order of the text encoders.
    """
    import torch

    from ...core.adapter import parts_of

    method = _method()
    readers = {name: one for name, one in families.components().items() if one.embeddings}
    rest: list[tuple[str, str, Adapter]] = []
    words: dict[str, list[Learned]] = {}
    for component, built in content.adapters.items():
        for path, adapter in built.items():
            for part in parts_of(adapter):
                learned = part.learned_words()
                publishable = component in readers and learned and not any("." in word for word in learned)
                state = part.state() if publishable else {}
                if method is None or method.embedding is None or method.embedding[0] not in state:
                    rest.append((component, path, part))
                    continue
                pieces = torch.split(state[method.embedding[0]].detach(), [len(ids) for ids in learned.values()])
                named = zip(learned.items(), pieces, strict=True)
                words.setdefault(component, []).extend(Learned(component, word, ids, one) for (word, ids), one in named)
    return rest, [one for component in readers for one in words.get(component, [])]


def written(words: Sequence[Learned], *, alone: bool) -> Written:
    """Name the vectors of words as other programs do.

    Args:
        words: As ``parted`` gives them.
        alone: Whether nothing else is in the file.

    Returns:
        The tensors, and the metadata that tell what the words began as.
    """
    if not words:
        return Written({}, {})
    fields = {component: one.embeddings[0] for component, one in families.components().items() if one.embeddings}
    if not alone or len({one.word for one in words}) > 1:
        tensors = {f"{_BUNDLE}{one.word}.{fields[one.component]}": one.vectors for one in words}
    elif [one.component for one in words] == list(fields)[:1]:
        tensors = {ALONE: words[0].vectors}
    else:
        tensors = {fields[one.component]: one.vectors for one in words}
    began: dict[str, dict[str, list[int]]] = {}
    for one in words:
        began.setdefault(one.component, {})[one.word] = list(one.ids)
    return Written(tensors, {KEY: json.dumps(began, ensure_ascii=False)}, needed=frozenset({KEY}))


def _method() -> type[Method] | None:
    """The method whose files other programs know as embeddings."""
    return next((one for one in methods.known().values() if one.embedding is not None), None)


def _vectors_suffix() -> str:
    method = _method()
    return method.embedding[0] if method is not None and method.embedding is not None else "vectors"


def _meaning(header: Header, name: str, began: Mapping[str, Mapping[str, Sequence[int]]]) -> tuple[str, str]:
    """The word and the component of an embedding; "" for what its name does not tell."""
    if name.startswith(_BUNDLE):
        word, _, field = name.removeprefix(_BUNDLE).rpartition(".")
        return word, embeddings().get(field, "")
    if name not in embeddings():
        return name, embeddings()[ALONE]
    component = embeddings()[name]
    # A word in our own file alone is named by its metadata, not by the file's name.
    known = list(began.get(component, ()))
    return known[0] if len(known) == 1 else re.sub(r"\s+", "_", header.path.stem), component


def _is_named(name: str) -> bool:
    """Whether a name is that of an embedding, whatever else is in the file."""
    return name in embeddings() or name.startswith(_BUNDLE) or _WORD.fullmatch(name) is not None


def _are_words(header: Header) -> bool:
    """Whether a file looks like one of words whose names are the words themselves."""
    shapes = [entry.shape for entry in header.tensors.values()]
    few = all(len(shape) in (1, 2) and (len(shape) == 1 or 0 < shape[0] <= min(_MOST, shape[1])) for shape in shapes)
    widths = {shape[-1] for shape in shapes} if few else set()
    named = all(_BARE.fullmatch(name) and name not in _PARAMETERS for name in header.tensors)
    return named and len(widths) == 1 and min(widths) >= _NARROWEST


def _names_none(name: str) -> bool:
    """Whether a name tells no text encoder: programs that know one alone wrote it."""
    first = embeddings()[ALONE]
    return name not in embeddings() or (embeddings()[name] == first and name.startswith("em"))


def _others(component: str) -> tuple[str, ...]:
    """The other text encoders that have embeddings."""
    return tuple(one for one in dict.fromkeys(embeddings().values()) if one != component)


def _row(row: int, tensor: "Tensor") -> "Tensor":
    return tensor[row : row + 1].clone()


def _began(header: Header) -> dict[str, dict[str, list[int]]]:
    """By component and word, the tokens that it began as."""
    with refusing(f"{header.path}: its {KEY!r} metadata is damaged"):
        found = json_value(header.metadata.get(KEY, "{}"))
        return {part: {word: list(map(int, ids)) for word, ids in words.items()} for part, words in found.items()}


def _default(base: "AnyBase", component: str, vectors: int) -> list[int]:
    """The token that stands in for a word whose beginning no file tells."""
    from ...bases.base import text_encoders
    from ...bases.taught import plain_ids

    tokenizer = getattr(base, text_encoders(base)[component])
    return plain_ids(tokenizer, _DEFAULT)[:1] * vectors


register(Embedding())
register(OfA1111())
register(OfDiffusers())
