"""Tiny models with random weights that describe pictures, of the true architectures, as folders that transformers reads."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

WORDS = ("a", "red", "cat", "on", "the", "blue", "mat", "what", "describe", "image")


def word_tokenizer(specials: dict[str, str], more: tuple[tuple[str, str], ...]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words with a start and an end."""
    names = [*specials.values(), *(name for _, name in more)]
    vocabulary = {word: number for number, word in enumerate([*names, *WORDS])}
    unknown = specials["unk_token"]
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    start, end = specials["bos_token"], specials["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, vocabulary[start]), (end, vocabulary[end])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=dict(more), **specials)


def blip(folder: Path) -> Path:
    """Write a BLIP of 12 thousand parameters.

    Args:
        folder: Where.

    Returns:
        The folder.
    """
    torch.manual_seed(0)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
    tokenizer = word_tokenizer(names, (("decoder_token", "[DEC]"),))
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": 4,
        "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 3,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 16,
    }  # fmt: skip
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16, image_text_hidden_size=16)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def florence(folder: Path) -> Path:
    """Write a Florence-2.

    Args:
        folder: Where.

    Returns:
        The folder.
    """
    torch.manual_seed(0)
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = word_tokenizer(names, (("image_token", "<image>"),))
    text = BartConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=128,
    )  # fmt: skip
    vision = {
        "depths": (1, 1), "embed_dim": (8, 16), "num_heads": (2, 2), "num_groups": (2, 2), "patch_size": (7, 3),
        "patch_stride": (4, 2), "patch_padding": (3, 1), "patch_prenorm": (False, True), "window_size": 4,
        "projection_dim": 16, "max_position_embeddings": 20, "max_temporal_embeddings": 4,
    }  # fmt: skip
    config = Florence2Config(text_config=text.to_dict(), vision_config=vision, image_token_id=4)
    model = Florence2ForConditionalGeneration(config)
    model.generation_config.suppress_tokens = [0, 1, 3, 4]  # what is no word
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})
    images.image_seq_length = 17
    Florence2Processor(images, tokenizer).save_pretrained(folder)
    return folder


def tagger(folder: Path, labels: dict[int, str], *, several: bool = True) -> Path:
    """Write a ViT that tells labels of pictures.

    Args:
        folder: Where.
        labels: By number.
        several: Whether a picture has any number of them, or one.

    Returns:
        The folder.
    """
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16,
        id2label=labels, label2id={label: number for number, label in labels.items()},
        problem_type="multi_label_classification" if several else "single_label_classification",
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
