"""A small random language model of a true architecture, made at once, and text for it."""

from functools import cache, partial
from pathlib import Path

import torch
from copies import Copies
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_diffusion.bases import LanguageModel
from peft_diffusion.bases.causal_lm import frozen

EDGE = "<|endoftext|>"
CONTEXT = 48


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and one that begins every text and ends it."""
    vocabulary = {token: number for number, token in enumerate([EDGE, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    model.add_special_tokens([EDGE])
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.post_processor = processors.TemplateProcessing(single=f"{EDGE} $A", special_tokens=[(EDGE, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token=EDGE, eos_token=EDGE, model_max_length=CONTEXT)


def make_lm(seed: int = 0, width: int = 32) -> LanguageModel:
    """A Llama of two layers with random weights and a head tied to its embedding."""
    return LanguageModel(_copies(seed, width).copy(), byte_tokenizer(), "tiny")


@cache
def _copies(seed: int, width: int) -> Copies[LlamaForCausalLM]:
    return Copies(partial(_build_lm, seed, width))


def _build_lm(seed: int, width: int) -> LlamaForCausalLM:
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257, hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim > 1 else None
    torch.set_rng_state(state)
    return frozen(LanguageModel(model, byte_tokenizer(), "tiny")).lm


def save_lm(folder: Path, seed: int = 0, width: int = 32) -> Path:
    """The small model as a folder in the format of transformers."""
    base = make_lm(seed, width)
    base.lm.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder
