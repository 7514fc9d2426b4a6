"""The tokenizer: an ordinary CLIPTokenizer whose vocabulary is learned from the captions."""

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer

from .captions import varied_caption
from .render import drawings
from .sources import BASE_STYLES, CACHE

VOCABULARY = 4096
LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"


def _captions(cache: Path, each: int) -> Iterator[str]:
    rng = random.Random(0)
    for style in BASE_STYLES:
        for drawing in drawings(style, cache):
            for _ in range(each):
                yield varied_caption(drawing, rng)


def _merges(model: Tokenizer) -> list[tuple[str, str]]:
    merges = json.loads(model.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges]


def learn_tokenizer(cache: Path = CACHE, size: int = VOCABULARY, each: int = 6) -> CLIPTokenizer:
    """Byte-pair encoding of the captions, in the order of CLIP's own vocabulary: bytes, byte ends, merges, specials."""
    reference = CLIPTokenizer()._tokenizer
    model = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    model.normalizer, model.pre_tokenizer = reference.normalizer, reference.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = alphabet + [f"{letter}</w>" for letter in alphabet]
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    model.train_from_iterator(_captions(cache, each), trainer)
    merges = _merges(model)[: size - len(base) - 2]
    tokens = base + ["".join(pair) for pair in merges] + [START, END]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the tokenizer; `tokenizer.json` holds its vocabulary and merges."""
    tokenizer.save_pretrained(folder)
    shorten(folder / "tokenizer.json")


def shorten(path: Path) -> None:
    """Write a tokenizer without the spaces that nobody reads, and each merge as one text, which is read alike."""
    told = json.loads(path.read_text("utf-8"))
    told["model"]["merges"] = [one if isinstance(one, str) else " ".join(one) for one in told["model"]["merges"]]
    path.write_text(json.dumps(told, ensure_ascii=False, separators=(",", ":")), "utf-8")


def encode(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token numbers, padded to 77 with the end token, exactly as the pipeline makes them; repeats are encoded once."""
    unique = {text: number for number, text in enumerate(dict.fromkeys(captions))}
    rows = tokenizer(list(unique), padding=False, max_length=LENGTH, truncation=True).input_ids
    table = torch.full((len(rows), LENGTH), tokenizer.eos_token_id, dtype=torch.int16)
    for number, row in enumerate(rows):
        table[number, : len(row)] = torch.tensor(row, dtype=torch.int16)
    return table[[unique[text] for text in captions]]


def main() -> None:
    """Learn the tokenizer and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder the archives are kept in")
    parser.add_argument("--output", type=Path, default=CACHE / "tokenizer", help="folder to write")
    options = parser.parse_args()
    tokenizer = learn_tokenizer(options.cache)
    save_tokenizer(tokenizer, options.output)
    words = {word for style in BASE_STYLES for row in drawings(style, options.cache) for word in row.subject.split()}
    pieces = [len(tokenizer(word).input_ids) - 2 for word in words if re.fullmatch("[a-z]+", word)]
    print(f"{len(tokenizer)} tokens, {sum(pieces) / len(pieces):.2f} for a word of the subjects: {options.output}")


if __name__ == "__main__":
    main()
