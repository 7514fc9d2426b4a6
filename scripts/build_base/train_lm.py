"""Train the embedded language model: a small Llama on the text of ``lm_text``, on a GPU in four minutes.

``python -m scripts.build_base.train_lm --output samples/text/base`` goes on from the last checkpoint in the cache and writes
an ordinary transformers folder in float16.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .lm_text import END, LM_CACHE
from .tokens import shorten

EDGE = "<|endoftext|>"  # before and after every entry, and before every prompt
VOCABULARY, CONTEXT = 4096, 256
WIDTH, FEED_FORWARD, LAYERS, HEADS = 128, 344, 4, 4
HELD_OUT_EVERY = 100  # entries; one is kept apart


@dataclass(frozen=True)
class Options:
    """How to train. Muon (Jordan 2024) moves the matrices inside the layers, AdamW the embedding and the norms."""

    steps: int
    batch: int
    matrix_rate: float
    other_rate: float
    warmup: int
    seed: int
    every: int


def learn_tokenizer(entries: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding (as GPT-2's) of the corpus."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=[EDGE], show_progress=False
    )
    model.train_from_iterator(entries, trainer)
    model.post_processor = processors.TemplateProcessing(single=f"{EDGE} $A", special_tokens=[(EDGE, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token=EDGE, eos_token=EDGE, pad_token=EDGE, model_max_length=CONTEXT
    )


def encode(tokenizer: PreTrainedTokenizerFast, entries: list[str]) -> Tensor:
    """Entries as one line of tokens, each closed by the edge."""
    rows = tokenizer(entries, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor([token for row in rows for token in (*row, tokenizer.eos_token_id)])


def make_model(seed: int) -> LlamaForCausalLM:
    """A small Llama, input and output embedding tied."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def windows(stream: Tensor, options: Options, step: int) -> Tensor:
    """The batch of a step, (batch, CONTEXT): an edge and the next piece; each pass cuts the text elsewhere."""
    length = CONTEXT - 1
    per_pass = len(stream) // length - 1
    rows = []
    for number in range(step * options.batch, (step + 1) * options.batch):
        chance = torch.Generator().manual_seed(options.seed * 1000 + number // per_pass)
        phase = int(torch.randint(length, (), generator=chance))
        start = phase + int(torch.randperm(per_pass, generator=chance)[number % per_pass]) * length
        rows.append(F.pad(stream[start : start + length], (1, 0)))
    return torch.stack(rows)


def loss_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats."""
    ids = ids.to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16):
        logits = model(input_ids=ids[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def held_out(model: LlamaForCausalLM, stream: Tensor) -> float:
    """The loss on the entries kept apart."""
    length = CONTEXT - 1
    rows = F.pad(stream[: len(stream) // length * length].view(-1, length), (1, 0))
    losses = [loss_of(model, part) * len(part) for part in rows.split(16)]
    return float(sum(losses) / len(rows))


def optimizers(model: LlamaForCausalLM, options: Options) -> list[torch.optim.Optimizer]:
    """Muon for what is a matrix inside a layer, AdamW for the rest."""
    inside = {name for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name}
    matrices = [p for name, p in model.named_parameters() if name in inside]
    others = [p for name, p in model.named_parameters() if name not in inside]
    return [
        torch.optim.Muon(matrices, options.matrix_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, options.other_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def train(model: LlamaForCausalLM, stream: Tensor, apart: Tensor, options: Options, checkpoint: Path) -> dict[str, Any]:
    """Train to the end, from the checkpoint where there is one; returns the figures."""
    chosen = optimizers(model, options)
    rates = [one.param_groups[0]["lr"] for one in chosen]
    first, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=model.device)
        first, spent = state["step"], state["seconds"]
        model.load_state_dict(state["model"])
        for one, kept in zip(chosen, state["optimizers"], strict=True):
            one.load_state_dict(kept)
    began = time.monotonic() - spent
    for step in range(first, options.steps):
        done = max(0, step - options.warmup) / (options.steps - options.warmup)
        factor = min(1.0, (step + 1) / options.warmup) * (1 + math.cos(math.pi * done)) / 2
        for one, rate in zip(chosen, rates, strict=True):
            one.param_groups[0]["lr"] = rate * factor
            one.zero_grad()
        loss = loss_of(model, windows(stream, options, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for one in chosen:
            one.step()
        if (step + 1) % 20 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True)
        if (step + 1) % options.every == 0:
            seconds = time.monotonic() - began
            states = [one.state_dict() for one in chosen]
            kept = {"step": step + 1, "seconds": seconds, "model": model.state_dict(), "optimizers": states}
            torch.save(kept, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            print(f"step {step + 1}: held-out loss {held_out(model, apart):.4f}", flush=True)
    final = held_out(model, apart)
    return {"held_out_loss": final, "held_out_perplexity": math.exp(final), "seconds": time.monotonic() - began}


def main() -> None:
    """Train and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=LM_CACHE, help="folder of corpus.txt and of the checkpoint")
    parser.add_argument("--output", type=Path, default=Path("samples/text/base"), help="folder to write")
    parser.add_argument("--steps", type=int, default=4400)
    parser.add_argument("--batch", type=int, default=32, help="windows a step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--matrix-rate", type=float, default=5e-3)
    parser.add_argument("--other-rate", type=float, default=4e-3)
    parser.add_argument("--warmup", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=200)
    told = parser.parse_args()
    options = Options(told.steps, told.batch, told.matrix_rate, told.other_rate, told.warmup, told.seed, told.save_every)
    torch.set_num_threads(1)
    entries = (told.cache / "corpus.txt").read_text("utf-8").split(END)
    kept = [entry for number, entry in enumerate(entries) if number % HELD_OUT_EVERY]
    tokenizer = learn_tokenizer(kept)
    stream, apart = encode(tokenizer, kept), encode(tokenizer, entries[::HELD_OUT_EVERY])
    model = make_model(told.seed).to(told.device)
    print(f"{len(stream):,} tokens to learn from, {len(apart):,} kept apart; {model.num_parameters():,} parameters")
    figures = train(model, stream, apart, options, told.cache / "lm.pt")
    model.half().cpu().save_pretrained(told.output)
    tokenizer.save_pretrained(told.output)
    shorten(told.output / "tokenizer.json")
    figures |= {"tokens": len(stream), "tokens_held_out": len(apart), "parameters": model.num_parameters()}
    print(json.dumps(figures | vars(options), indent=2))


if __name__ == "__main__":
    main()
