"""Embeddings of new words in the layouts of other programs.

Alone, one word is ``emb_params`` (Stable Diffusion 1 and 2) or ``clip_l`` and ``clip_g`` (XL), as kohya's sd-scripts write
it and A1111 and ComfyUI read it; the latter two call it by the file's name. Beside other methods, and with several words,
it is ``bundle_emb.<word>.clip_l``, as OneTrainer writes and A1111 reads it. diffusers' own loader takes no file in which
anything stands beside LoRA keys, whatever its name; no layout would change that. Here both are renamed to and from the
keys under which the ``tokens`` method knows its tensors; what it began as is in the metadata.
"""

import json
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ...bases import family as families
from ...bases.base import Base, text_encoders
from ...bases.words import plain_ids
from ...core import targets
from ...core.errors import UserError
from .names import BUNDLE, OWN, WORD, embeddings

KEY = "peft_diffusion.words"  # the metadata entry with the words as the method stores them, by component

_VECTORS, _WORDS = "tokens_vectors", "tokens_words"


def published(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file with those of new words under the names of other programs, and metadata to add."""
    fields = {component: one.embeddings[0] for component, one in families.components().items() if one.embeddings}
    own = {name: component for component in fields for name in tensors if _is_vectors(name, component)}
    words: dict[str, dict[str, list[int]]] = {}
    kept = dict(tensors)
    found: list[tuple[str, str, Tensor]] = []
    for name, component in own.items():
        key = name.removesuffix(_VECTORS) + _WORDS
        words[component] = json.loads(bytes(kept.pop(key).tolist()).decode())
        sizes = [len(ids) for ids in words[component].values()]
        pieces = torch.split(kept.pop(name).detach(), sizes)
        found += [(word, component, piece) for word, piece in zip(words[component], pieces, strict=True)]
    if not found or any("." in word for word, _, _ in found):
        return dict(tensors), {}  # a dot would end the word for those who read it
    if kept or len({word for word, _, _ in found}) > 1:
        kept |= {f"{BUNDLE}{word}.{fields[component]}": vectors for word, component, vectors in found}
    elif [component for _, component, _ in found] == list(fields)[:1]:
        kept["emb_params"] = found[0][2]
    else:
        kept |= {fields[component]: vectors for _, component, vectors in found}
    return kept, {KEY: json.dumps(words, ensure_ascii=False)}


def adopted(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], base: Base, parts: Mapping[str, nn.Module], stem: str
) -> dict[str, Tensor]:
    """The tensors of a file with those of new words under the names of the ``tokens`` method; others as they are.

    A word that the file does not name has the file's name, ``stem``. Raises UserError for metadata that is damaged.
    """
    began = _began(metadata)
    kept = dict(tensors)
    found: dict[str, dict[str, Tensor]] = {}
    for name, component, word in list(_embeddings(tensors, parts, stem)):
        # A word in our own file alone is named by its metadata, not by the file's name.
        known = list(began.get(component, ()))
        if not name.startswith(BUNDLE) and len(known) == 1:
            word = known[0]
        found.setdefault(component, {})[word] = kept.pop(name).reshape(-1, tensors[name].shape[-1])
    for component, vectors in found.items():
        told = began.get(component, {})
        order = sorted(vectors, key=lambda word: list(told).index(word) if word in told else len(told))
        words = {word: told.get(word) or _default(base, component, len(vectors[word])) for word in order}
        path = targets.resolve(parts[component], "tokens")[0]
        kept[f"{OWN}{component}.{path}.{_VECTORS}"] = torch.cat([vectors[word] for word in order])
        text = json.dumps(words, ensure_ascii=False).encode()
        kept[f"{OWN}{component}.{path}.{_WORDS}"] = torch.tensor(list(text), dtype=torch.uint8)
    return kept


def _is_vectors(name: str, component: str) -> bool:
    return name.startswith(f"{OWN}{component}.") and name.endswith(f".{_VECTORS}")


def _embeddings(tensors: Mapping[str, Tensor], parts: Mapping[str, nn.Module], stem: str) -> Iterator[tuple[str, str, str]]:
    """Name, component and word of every embedding that a file holds."""
    alone = re.sub(r"\s+", "_", stem)
    for name, tensor in tensors.items():
        if tensor.ndim not in (1, 2):
            continue
        word, which = alone, name
        if name.startswith(BUNDLE):
            word, _, which = name.removeprefix(BUNDLE).rpartition(".")
        elif len(tensors) == 1 and WORD.fullmatch(name):
            word, which = name, "emb_params"
        component = embeddings().get(which)
        if component is not None and component in parts and word:
            yield name, component, word


def _began(metadata: Mapping[str, str]) -> dict[str, dict[str, list[int]]]:
    """By component and word, the tokens that it began as."""
    try:
        found = json.loads(metadata.get(KEY, "{}"))
        return {part: {word: list(map(int, ids)) for word, ids in words.items()} for part, words in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"its {KEY!r} metadata is damaged") from None


def _default(base: Base, component: str, vectors: int) -> list[int]:
    """The token that stands in for a word whose beginning no file tells: the asterisk, which A1111 begins with."""
    tokenizer = getattr(base, text_encoders(base)[component])
    return plain_ids(tokenizer, "*")[:1] * vectors
