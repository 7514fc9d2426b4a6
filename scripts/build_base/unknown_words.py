"""Teach the text encoder to read past style words that it does not know.

People give a new style a name of its own, such as "openmoji emoji of a red apple", or put a made-up trigger before a
subject. A text encoder that saw eight styles alone loses the subject behind a ninth. So a copy of it learns, from itself, to
say after words it does not know what it says after none: its answer to "qwib emoji of a red apple" is pulled to the first
one's answer to "emoji of a red apple", token by token, and its answers to the captions of the training are held where they
are. Errors are weighed by what the UNet's cross-attention makes of them. The UNet stays. Half an hour on two CPU cores, or
two minutes on a GPU.
"""

import argparse
import copy
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from .captions import varied_caption, with_article
from .export import write_text_encoder
from .packed import Drawing, packed_rows
from .sources import BASE_STYLES, CACHE, STYLES
from .tokens import LENGTH

PLAIN = "emoji of "
FORMS = (
    ("{} emoji of ", 4.0), ("{} icon of ", 1.0), ("{} drawing of ", 1.0), ("{} style, ", 1.0), ("{} ", 2.0),
    ("a {} of ", 0.5), ("{} picture of ", 0.5), ("{} emoji, ", 0.5), ("in the style of {}, ", 0.5),
)  # fmt: skip
CHECKED = (
    "openmoji emoji of ", "twemoji emoji of ", "fluent flat emoji of ", "ink drawing of ", "watercolor painting of ",
    "pixel art of ", "sks ", "zwx style, ",
)  # fmt: skip
KNOWN_SHARE = 0.5
SUFFIX_SHARE = 0.1
PREFIX_WEIGHT = 0.3  # the unknown words themselves may keep some of their own meaning
WARM_UP, REPORT_EVERY = 50, 50  # steps
ISOTROPIC = 0.05  # so that nothing drifts where the UNet happens not to look
VOWELS, CONSONANTS = "aeiouy", "bcdfghjklmnpqrstvwxz"


@dataclass(frozen=True)
class Pair:
    """A prompt, the prompt whose meaning it should have, and for each of its 77 tokens the place of the one to follow."""

    prompt: Tensor
    model: Tensor
    places: Tensor
    weights: Tensor


class Prompts:
    """Draws pairs of prompts."""

    def __init__(self, tokenizer: CLIPTokenizer, drawings: list[Drawing], seed: int) -> None:
        self.tokenizer, self.drawings, self.rng = tokenizer, drawings, random.Random(seed)
        used = {word for style in BASE_STYLES for word in STYLES[style].template.split()}
        self.words = sorted({word for row in drawings for tag in row.tags for word in tag.split()} - used)
        self.used = sorted(used - {"of", "{}", "emoji", "icon"})

    def draw(self) -> Pair:
        """One pair: a caption that stays, or one with unknown words before or behind the subject."""
        drawing, chance = self.rng.choice(self.drawings), self.rng.random()
        if chance < KNOWN_SHARE:
            return self.same(varied_caption(drawing, self.rng))
        phrase = with_article(drawing.subject) if self.rng.random() < 0.5 else drawing.subject
        if chance < KNOWN_SHARE + SUFFIX_SHARE:
            return self.behind(phrase, f", {self.unknown()}" + self.rng.choice(["", " style", " emoji", " drawing"]))
        form = self.rng.choices([text for text, _ in FORMS], [weight for _, weight in FORMS])[0]
        return self.before(form.format(self.unknown()), phrase)

    def unknown(self) -> str:
        """One to three words that name no style: made up, of the vocabulary, or pieces of it; one may be a style's."""
        words = [self._unknown_word() for _ in range(self.rng.choice((1, 1, 1, 2, 2, 3)))]
        if len(words) > 1 and self.rng.random() < 0.3:
            words[self.rng.randrange(1, len(words))] = self.rng.choice(self.used)
        return " ".join(words)

    def _unknown_word(self) -> str:
        kind = self.rng.random()
        if kind < 0.25:
            return self.rng.choice(self.words)
        if kind < 0.5:
            pieces = self.rng.sample(self.words, 2)
            return pieces[0][: self.rng.randint(2, 5)] + pieces[1][-self.rng.randint(2, 4) :]
        length, first = self.rng.randint(2, 9), self.rng.randint(0, 1)
        letters = [(VOWELS, CONSONANTS)[(number + first + (self.rng.random() < 0.3)) % 2] for number in range(length)]
        return "".join(self.rng.choice(some) for some in letters)

    def tokens(self, prompt: str) -> list[int]:
        """The numbers of a prompt with start and end, without padding."""
        ids: list[int] = self.tokenizer(prompt, truncation=True, max_length=LENGTH).input_ids
        return ids

    def padded(self, ids: list[int]) -> Tensor:
        """Filled up to 77 with the end token, as the pipeline does."""
        return torch.tensor(ids + [self.tokenizer.pad_token_id] * (LENGTH - len(ids)))

    def same(self, prompt: str) -> Pair:
        """A prompt that keeps its meaning."""
        ids = self.padded(self.tokens(prompt))
        return Pair(ids, ids, torch.arange(LENGTH), torch.ones(LENGTH))

    def before(self, prefix: str, phrase: str) -> Pair:
        """Unknown words, then the subject: the subject follows that of the plain prompt, as does what comes behind it."""
        ids, model = self.tokens(prefix + phrase), self.tokens(PLAIN + phrase)
        places, weights = torch.arange(LENGTH), torch.ones(LENGTH)
        kept = len(self.tokens((PLAIN if prefix.endswith(PLAIN) else "") + phrase)) - 1  # with the end
        first = len(ids) - kept
        places[1:first], weights[1:first] = 1, PREFIX_WEIGHT
        places[first : len(ids)] = torch.arange(len(model) - kept, len(model))
        return Pair(self.padded(ids), self.padded(model), places, weights)

    def behind(self, phrase: str, suffix: str) -> Pair:
        """The subject, then unknown words: what they and the padding say follows the end of the plain prompt."""
        ids, model = self.tokens(phrase + suffix), self.tokens(phrase)
        places, weights = torch.arange(LENGTH), torch.ones(LENGTH)
        places[len(model) - 1 : len(ids)] = len(model) - 1
        weights[len(model) - 1 : len(ids) - 1] = PREFIX_WEIGHT
        return Pair(self.padded(ids), self.padded(model), places, weights)


def reading(unet: UNet2DConditionModel) -> Tensor:
    """What the cross-attention makes of a difference of hidden states: its keys' and values' mean square, as a matrix."""
    weights = [
        layer.weight.detach().float()
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear) and name.split(".")[-2:] in (["attn2", "to_k"], ["attn2", "to_v"])
    ]
    stacked = torch.cat(weights)
    metric = stacked.T @ stacked / len(stacked)
    return metric + ISOTROPIC * metric.diagonal().mean() * torch.eye(len(metric))


def errors(student: CLIPTextModel, teacher: CLIPTextModel, pairs: list[Pair], metric: Tensor) -> Tensor:
    """The mean error of each pair, 1 being that of an answer of nothing but zeros."""
    device = metric.device
    with torch.no_grad():
        wanted: Tensor = teacher(input_ids=torch.stack([pair.model for pair in pairs]).to(device))[0]
        wanted = torch.stack([row[pair.places] for row, pair in zip(wanted, pairs, strict=True)])
        scale = ((wanted @ metric) * wanted).sum(-1).mean()
    difference: Tensor = student(input_ids=torch.stack([pair.prompt for pair in pairs]).to(device))[0] - wanted
    weights = torch.stack([pair.weights for pair in pairs]).to(device)
    squares = ((difference @ metric) * difference).sum(-1) * weights
    return squares.sum(1) / weights.sum(1) / scale


def train(
    student: CLIPTextModel, teacher: CLIPTextModel, prompts: Prompts, metric: Tensor, options: argparse.Namespace
) -> None:
    """AdamW with a short warm-up and a cosine to nothing."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
    start = time.perf_counter()
    for step in range(options.steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / options.steps))
        optimizer.param_groups[0]["lr"] = options.rate * cosine * min(1.0, (step + 1) / WARM_UP)
        loss = errors(student, teacher, [prompts.draw() for _ in range(options.batch)], metric).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % REPORT_EVERY == 0:
            print(f"step {step + 1}  error {loss.item():.4f}  {time.perf_counter() - start:.0f} s", flush=True)


@torch.no_grad()
def check(student: CLIPTextModel, teacher: CLIPTextModel, prompts: Prompts, metric: Tensor, subjects: list[str]) -> Table:
    """The errors on captions of the training and behind words that were never drawn, of both text encoders."""
    table = Table("prompt", "error before", "error after")
    captions = [STYLES[style].template.format(subject) for style in BASE_STYLES for subject in subjects]
    groups = {"captions of the training": [prompts.same(text) for text in captions]}
    groups |= {f"{words}...": [prompts.before(words, subject) for subject in subjects] for words in CHECKED}
    for name, pairs in groups.items():
        before, after = (errors(model, teacher, pairs, metric).mean().item() for model in (teacher, student))
        table.add_row(name, f"{before:.3f}", f"{after:.3f}")
    return table


def main() -> None:
    """Teach, check, and write the text encoder in the place of the old one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("samples/base"), help="the diffusers folder, changed in place")
    parser.add_argument("--data", type=Path, default=CACHE / "drawings.zip", help="the packed drawings")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32, help="prompts a step")
    parser.add_argument("--go-on", type=Path, help="weights of a text encoder that has learned some of it already")
    parser.add_argument("--device", default="cpu", help="where to learn")
    parser.add_argument("--rate", type=float, default=4e-4, help="the highest learning rate")
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(options.base / "tokenizer")
    teacher = CLIPTextModel.from_pretrained(options.base / "text_encoder", dtype=torch.float32)
    teacher.to(options.device).requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    if options.go_on:
        student.load_state_dict(load_file(options.go_on))
    unet = UNet2DConditionModel.from_pretrained(options.base / "unet", torch_dtype=torch.float32)
    metric = reading(unet).to(options.device)
    rows = packed_rows(options.data, BASE_STYLES)
    prompts = Prompts(tokenizer, rows, seed=0)
    train(student, teacher, prompts, metric, options)
    subjects = [row.subject for row in random.Random(1).sample(rows, 64)]
    Console().print(check(student, teacher, prompts, metric, subjects))
    write_text_encoder(student.cpu(), options.base)


if __name__ == "__main__":
    main()
