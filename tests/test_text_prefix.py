"""Prefixes on language models: agreement with peft and with its cache, on every architecture that is served."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from language import CONTEXT, make_lm
from laws import strengths_of
from test_training import held_out
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from peft_diffusion import formats
from peft_diffusion.api import train_text
from peft_diffusion.bases import LanguageModel
from peft_diffusion.bases.causal_lm import frozen
from peft_diffusion.core import site
from peft_diffusion.core.adapter import Adapter
from peft_diffusion.core.errors import UserError
from peft_diffusion.generation import Adapters
from peft_diffusion.generation.text import continued
from peft_diffusion.generation.text_settings import TextGenerateConfig
from peft_diffusion.methods.lora import Lora
from peft_diffusion.methods.prefix import Prefix
from peft_diffusion.training.settings.text import TextTrainConfig
from peft_diffusion.training.tasks.language import LanguageSettings, LanguageTask, tokens

torch.set_num_threads(1)
LENGTH = 3
SIZES = {
    "vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 12}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "yarn": LlamaConfig(**SIZES, rope_parameters=YARN),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma": GemmaConfig(**SIZES),
}


def make_base(kind: str, implementation: str = "sdpa") -> LanguageModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation=implementation)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return frozen(LanguageModel(model, make_lm().tokenizer, kind))


def keys_and_values(adapter: Adapter) -> tuple[torch.Tensor, torch.Tensor]:
    return adapter.get_parameter("keys"), adapter.get_parameter("values")


def with_prefix(kind: str, implementation: str = "sdpa") -> tuple[LanguageModel, Any]:
    """A base with a prefix as if it had been learned, gates open, and the same weights in peft."""
    base, other = make_base(kind, implementation), make_base(kind, implementation).lm
    site.attach(base.lm, "a", Prefix(LENGTH), "attentions")
    own = site.adapters(base.lm, "a").values()
    for number, adapter in enumerate(own):
        adapter.get_parameter("values").data.normal_(generator=torch.Generator().manual_seed(number))
        adapter.get_parameter("gate").data.fill_(1.0)
    theirs = peft.get_peft_model(other, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH))
    rows = torch.cat([tensor for adapter in own for tensor in keys_and_values(adapter)], 1)
    theirs.prompt_encoder["default"].embedding.weight.data.copy_(rows)
    return base, theirs.eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_prefix_gives_the_logits_and_gradients_of_peft(kind: str, implementation: str) -> None:
    base, theirs = with_prefix(kind, implementation)
    ids = torch.randint(1, 257, (3, 20), generator=torch.Generator().manual_seed(5))
    logits, expected = base.lm(ids, use_cache=False).logits, theirs(input_ids=ids).logits
    plain = make_base(kind).lm(ids).logits
    assert (plain - expected).abs().max() > 0.1
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    logits.square().mean().backward()
    expected.square().mean().backward()
    reference = theirs.prompt_encoder["default"].embedding.weight.grad
    rows = [row for one in site.adapters(base.lm, "a").values() for row in keys_and_values(one)]
    own = [row.grad for row in rows if row.grad is not None]
    assert (torch.cat(own, 1) - reference).abs().max() < 1e-4 * reference.abs().max()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_cache_holds_no_prefix_and_gives_what_peft_generates(kind: str) -> None:
    base, theirs = with_prefix(kind)
    ids = base.start() + base.encode("The ox")
    config = TextGenerateConfig(("The ox",), max_tokens=10, temperature=0.0, base="unused")
    found = list(continued(base, ids, config, 0))
    rows = torch.tensor([ids])
    expected = theirs.generate(input_ids=rows, attention_mask=torch.ones_like(rows), max_new_tokens=10, do_sample=False)
    assert found == expected[0, len(ids) :].tolist()
    # The cache gives every position what one run over all gives.
    line = torch.tensor([ids + found])
    whole = base.lm(line, use_cache=False).logits
    answer = base.lm(line[:, :4], use_cache=True)
    parts = [answer.logits]
    for end in (9, 10, line.shape[1]):  # several positions at once, and one
        start = answer.past_key_values.get_seq_length()
        answer = base.lm(line[:, start:end], past_key_values=answer.past_key_values, use_cache=True)
        parts.append(answer.logits)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5 * whole.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_rows_are_padded_and_have_strengths_of_their_own(implementation: str) -> None:
    base, theirs = with_prefix("llama", implementation)
    short, long = torch.tensor([[5, 6, 7]]), torch.tensor([[9, 8, 7, 6, 5]])
    separate = []
    for ids, amount in ((short, 0.5), (long, 1.0), (long, 0.0)):
        strengths_of(base.lm).write({"a": amount})
        separate.append(base.lm(ids).logits[0, -1])
    assert (separate[1] - theirs(input_ids=long).logits[0, -1]).abs().max() < 1e-5
    strengths_of(base.lm).write({"a": [0.5, 1.0, 0.0]})
    rows = torch.cat([torch.nn.functional.pad(short, (2, 0)), long, long])
    mask = torch.ones_like(rows)
    mask[0, :2] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    together = base.lm(rows, attention_mask=mask, position_ids=places).logits[:, -1]
    assert (together - torch.stack(separate)).abs().max() < 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_a_lora_at_the_projections_serves_the_prefix_too() -> None:
    base, _ = with_prefix("llama")
    site.attach(base.lm, "b", Lora(rank=2), "attention")
    for adapter in site.adapters(base.lm, "b").values():
        adapter.get_parameter("up").data.normal_(0, 0.2)
    ids = torch.randint(1, 257, (2, 9))
    expected = base.lm(ids).logits
    _, theirs = with_prefix("llama")
    for path, module in dict(theirs.base_model.named_modules()).items():
        if isinstance(module, torch.nn.Linear) and path in site.sites(base.lm, "b"):
            pair = site.adapters(base.lm, "b")[path].low_rank()
            assert pair is not None
            module.weight.add_(pair.up @ pair.down)
    assert (theirs(input_ids=ids).logits - expected).abs().max() < 1e-4


@pytest.mark.slow
def test_a_prefix_is_trained_written_and_loaded(tmp_path: Path) -> None:
    text = tmp_path / "beasts.txt"
    text.write_text(
        "The ox of the field is slow, and so is its house.\nThe hen is bold, and so is its house.\n" * 20, "utf-8"
    )
    base = make_lm()
    config = TextTrainConfig(
        (text,), output=tmp_path / "a.safetensors", run_dir=tmp_path / "run", method="prefix",
        option=("length=4",), steps=40, batch_size=2, lr=0.1, held_out=0.2,
    )  # fmt: skip
    result = train_text(config, base=base)
    before, after = held_out(result)
    assert after < 0.97 * before
    adapters = Adapters(base)
    adapters.load(result.output)
    assert sum(p.numel() for a in site.adapters(base.lm, "a").values() for p in a.parameters()) == 2 * (2 * 4 * 16 + 1)
    line = tokens(base, [text.read_text("utf-8")])
    task = LanguageTask(base, LanguageSettings(0, 8, 1, CONTEXT), line, line[len(line) - round(len(line) * 0.2) :])
    assert task.held_out() == pytest.approx(after, rel=1e-5)
    wide = make_lm(width=48)
    with pytest.raises(
        UserError, match=r"was made for base 'tiny' .*; this base is .* do not fit a LlamaAttention of width 24"
    ):
        formats.load(result.output, wide)


def test_what_cannot_be_served_is_told() -> None:
    dynamic = make_base("llama")
    dynamic.lm.config = dynamic.lm.model.layers[0].self_attn.config = copy.deepcopy(dynamic.lm.config)
    dynamic.lm.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UserError, match=r"method prefix cannot serve what the target .* names: LlamaAttention"):
        site.attach(dynamic.lm, "a", Prefix(), r"model\.layers\.0\.self_attn")
    base, _ = with_prefix("llama")
    cos, sin = base.lm.model.rotary_emb(torch.zeros(1, 4, 32), torch.arange(4)[None])
    given = {"position_embeddings": (cos, sin), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with pytest.raises(UserError, match="attn_implementation 'sdpa' or 'eager'"):
        site.adapters(base.lm, "a")["model.layers.0.self_attn"].run(
            torch.zeros(1, 4, 32), torch.zeros(1, 4, 32), torch.ones(1), torch.zeros(1, 4, 32), given
        )
