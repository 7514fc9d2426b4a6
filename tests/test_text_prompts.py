"""Soft prompts and new words on language models: agreement with peft, rows with strengths of their own, training, files."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from language import CONTEXT, make_lm
from laws import strengths_of
from making import spec_of
from test_training import held_out
from torch.nn import functional as F

from peft_diffusion import formats
from peft_diffusion.api import train_text
from peft_diffusion.bases import LanguageModel, checksum, components
from peft_diffusion.bases.taught import learned
from peft_diffusion.bases.words import teach, with_initial_tokens
from peft_diffusion.core import site
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.strength import Strength
from peft_diffusion.generation import Adapters
from peft_diffusion.generation.text import continued
from peft_diffusion.generation.text_settings import TextGenerateConfig
from peft_diffusion.methods.lora import Lora
from peft_diffusion.methods.prompt import SoftPrompt
from peft_diffusion.methods.tokens import Tokens
from peft_diffusion.training.attachment import NAME
from peft_diffusion.training.loop.trainer import loss_at
from peft_diffusion.training.settings.text import TextTrainConfig
from peft_diffusion.training.tasks.language import LanguageSettings, LanguageTask, tokens

pytestmark = pytest.mark.usefixtures("few_measurements", "no_signals", "no_plots")

torch.set_num_threads(1)
LINES = "".join(f"The {beast} of the field is {how}, and so is its house.\n" for beast in ("ox", "ass", "lion", "hen")
                for how in ("swift", "slow", "wise", "bold", "meek", "proud"))  # fmt: skip
VECTORS = 5
EDGE = 0  # the token that begins every text


def with_prompt(method: SoftPrompt | None = None, name: str = "a") -> LanguageModel:
    """The small model with a soft prompt as if it had been learned."""
    base = make_lm()
    site.attach(base.lm, name, with_initial_tokens(base, "lm", method or SoftPrompt(VECTORS, "ox")), "tokens")
    for adapter in site.adapters(base.lm, name).values():
        adapter.get_parameter("vectors").data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    teach(base)
    return base


def vectors(base: LanguageModel, name: str = "a") -> torch.nn.Parameter:
    return next(iter(site.adapters(base.lm, name).values())).get_parameter("vectors")


def in_peft(base: LanguageModel) -> Any:
    """The same weights in peft."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VECTORS)
    model = peft.get_peft_model(make_lm().lm, config).eval()
    model.prompt_encoder["default"].embedding.weight.data.copy_(vectors(base))
    return model


def strength(base: LanguageModel, **values: Strength) -> None:
    strengths_of(base.lm).write(values)


def test_a_soft_prompt_gives_the_logits_the_loss_and_the_gradients_of_peft() -> None:
    base = with_prompt()
    theirs = in_peft(base)
    plain = make_lm().tokenizer
    texts = ["The ox is meek.", "The hen is bold."]
    ids = torch.tensor([base.tokenizer(text).input_ids[VECTORS:] for text in ("The ox is slow.", "The ox is meek.")])
    assert ids.tolist() == plain(["The ox is slow.", "The ox is meek."]).input_ids
    led = torch.tensor(base.tokenizer(["The ox is slow.", "The ox is meek."]).input_ids)
    logits, expected = base.lm(led).logits, theirs(input_ids=ids).logits
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() < 1e-5
    line = tokens(base, texts)
    task = LanguageTask(base, LanguageSettings(0, 2, 1, VECTORS + 1 + 12), line)
    assert task.start.tolist() == [*learned(base.tokenizer).values(), EDGE] and task.length == 12
    rows = torch.stack([task.window(number) for number in range(2)])
    assert int(rows.max()) < 257  # the virtual positions are before the text, never in it
    loss = loss_at(task, 0, 0, task.device)
    loss.backward()
    ids = F.pad(rows, (1, 0), value=EDGE)
    labels = ids.clone()
    labels[:, 0] = -100  # what begins every text is told, not asked
    reference = theirs(input_ids=ids, labels=labels).loss
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), abs=1e-5)
    own = vectors(base).grad
    assert own is not None
    assert torch.allclose(own, theirs.prompt_encoder["default"].embedding.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@torch.no_grad()
def test_generation_with_the_cache_goes_on_as_in_peft() -> None:
    base = with_prompt()
    theirs = in_peft(base)
    plain = torch.tensor([make_lm().tokenizer("The ox").input_ids])
    config = TextGenerateConfig(("The ox",), max_tokens=12, temperature=0.0, base="unused")
    ids = base.start() + base.encode("The ox")
    assert ids == base.tokenizer("The ox").input_ids and len(ids) == VECTORS + plain.shape[1]
    found = list(continued(base, ids, config, 0))
    expected = theirs.generate(input_ids=plain, attention_mask=torch.ones_like(plain), max_new_tokens=12, do_sample=False)
    assert found == expected[0, plain.shape[1] :].tolist()
    own = base.lm.generate(**base.tokenizer("The ox", return_tensors="pt"), max_new_tokens=12, do_sample=False)
    assert found == own[0, len(ids) :].tolist()
    strength(base, a=0.0)
    assert base.tokenizer("The ox").input_ids == plain[0].tolist()


@torch.no_grad()
def test_rows_have_soft_prompts_and_strengths_of_their_own() -> None:
    base = with_prompt()
    texts = ["The ox is", "The hen of the", "The lion", "The ass"]
    amounts = [1.0, 0.0, 0.5, 0.0]
    separate = []
    for text, amount in zip(texts, amounts, strict=True):
        strength(base, a=amount)
        separate.append(base.lm(**base.tokenizer(text, return_tensors="pt")).logits[0, -1])
    base.tokenizer.pad_token_id = EDGE
    strength(base, a=amounts)
    batch = base.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    lengths = batch.attention_mask.sum(1).tolist()
    assert lengths == [1 + len(text) + (VECTORS if amount else 0) for text, amount in zip(texts, amounts, strict=True)]
    together = base.lm(**batch).logits[:, -1]
    assert (together - torch.stack(separate)).abs().max() < 1e-5
    assert [len(row) for row in base.tokenizer(texts).input_ids] == lengths
    full = base.tokenizer(texts, padding="max_length", max_length=30, return_tensors="pt").input_ids
    assert full.shape == (4, 30)
    assert [len(row) for row in base.tokenizer(texts, truncation=True, max_length=8).input_ids] == [8] * 4
    with pytest.raises(UserError, match="pairs of texts"):
        base.tokenizer(texts, text_pair=texts)


def test_a_taught_tokenizer_is_plain_again_without_the_prompt() -> None:
    plain = make_lm().tokenizer
    base = with_prompt()
    site.attach(base.lm, "b", with_initial_tokens(base, "lm", SoftPrompt(2)), "tokens")
    teach(base)
    assert len(base.start()) == 1 + VECTORS + 2
    assert base.encode("The ox") == plain("The ox", add_special_tokens=False).input_ids
    for name in "ab":
        site.detach(base.lm, name)
        teach(base)
    assert type(base.tokenizer) is type(plain)
    assert base.tokenizer._tokenizer.to_str() == plain._tokenizer.to_str()
    assert checksum(components(base)) == checksum(components(make_lm()))


@pytest.mark.parametrize("kind", [None, "ByteLevel", "Sequence", "Bert"])
def test_soft_prompts_lead_whatever_the_tokenizer_puts_first(kind: str | None) -> None:
    from tokenizers import processors

    base = make_lm()
    template, levels = base.tokenizer._tokenizer.post_processor, processors.ByteLevel()
    if kind == "Bert":
        base.tokenizer._tokenizer.post_processor = processors.BertProcessing(("e", 5), ("s", 6))
    else:
        chosen: dict[str | None, Any] = {"ByteLevel": levels, "Sequence": processors.Sequence([levels, template])}
        base.tokenizer._tokenizer.post_processor = chosen.get(kind, processors.TemplateProcessing("$A", "$A $B", []))
    first = base.start()
    site.attach(base.lm, "a", with_initial_tokens(base, "lm", SoftPrompt(2)), "tokens")
    if kind == "Bert":
        with pytest.raises(UserError, match="no soft prompt can precede what a tokenizer with BertProcessing puts first"):
            teach(base)
        assert base.start() == first
    else:
        teach(base)
        assert base.start() == [*learned(base.tokenizer).values(), *first] and len(base.start()) == 2 + len(first)


def small(text: Path, place: Path, **changes: Any) -> TextTrainConfig:
    """A training of seconds."""
    settings = {
        "output": place / "a.safetensors", "run_dir": place / "run", "steps": 6, "batch_size": 2, "lr": 3e-2,
        "log_every": 1, "held_out": 0.2, "seed": 3, **changes,
    }  # fmt: skip
    return TextTrainConfig((text,), **settings)


def test_what_a_soft_prompt_changes_elsewhere_is_measured_from_the_base_without_its_first_words() -> None:
    line, embedding = tokens(make_lm(), [LINES]), make_lm().lm.get_input_embeddings()
    for begun in (True, False):  # vectors of words of the base, and others
        base = with_prompt(name=NAME)
        if begun:
            vectors(base, NAME).data.copy_(embedding(torch.tensor(base.encode("ox ox")[:VECTORS])))
        task = LanguageTask(base, LanguageSettings(0, 2, 1, CONTEXT), line)
        expected = []
        for row in task.others:
            with torch.no_grad():
                plain = torch.cat([torch.tensor([EDGE]), row])[None]
                was = make_lm().lm(input_ids=plain).logits[0].double().log_softmax(-1)
                given = torch.cat([vectors(base, NAME), embedding(plain[0])])[None]
                now = make_lm().lm(inputs_embeds=given).logits[0, VECTORS:].double().log_softmax(-1)
            expected.append((was.exp() * (was - now)).sum(-1))
        found = task.leakage()
        assert found == pytest.approx(float(torch.cat(expected).mean()), rel=1e-4) and found > 1e-4
        assert len(base.start()) == VECTORS + 1  # as before


@pytest.mark.slow
def test_a_soft_prompt_is_trained_written_and_loaded(tmp_path: Path) -> None:
    text = tmp_path / "beasts.txt"
    text.write_text(LINES, "utf-8")
    base = make_lm()
    plain = LanguageTask(base, LanguageSettings(0, 2, 1, CONTEXT), tokens(base, [LINES]), tokens(base, [LINES])).held_out()
    config = small(text, tmp_path, method="prompt", option=("vectors=4", "initial=The"), steps=40)
    result = train_text(config, base=base)
    _, after = held_out(result)
    assert plain is not None and after < 0.97 * plain
    assert base.start() == [EDGE] and not site.sites(base.lm)
    found = formats.inspect(result.output)
    assert found.methods == ("prompt",) and dict(found.components) == {"lm": 1}
    adapters = Adapters(base)
    name = adapters.load(result.output)
    line = tokens(base, [LINES])
    task = LanguageTask(base, LanguageSettings(0, 2, 1, CONTEXT), line, line[len(line) - round(len(line) * 0.2) :])
    assert task.held_out() == pytest.approx(after, rel=1e-5)
    adapters.remove(name)
    assert base.start() == [EDGE]
    # At strength 0 the words that it began as are not before the text: that is the loss of the base.
    assert result.outcome is not None and result.outcome.suggestion is not None
    assert task.held_out() == pytest.approx(result.outcome.suggestion.losses[0], rel=1e-6)
    with pytest.raises(UserError, match="--context 6 leaves no room for text: 9 tokens stand before every window"):
        train_text(small(text, tmp_path / "x", method="prompt", target="tokens", context=6), base=base)
    with pytest.raises(UserError, match="soft prompts of 46 tokens leave no room for a prompt: the base reads 46"):
        train_text(small(text, tmp_path / "y", method="prompt", target="tokens", option=("vectors=46",)), base=base)
    assert base.start() == [EDGE] and not site.sites(base.lm)


@pytest.mark.slow
def test_a_new_word_is_learned_beside_a_lora_and_read_where_it_stands(tmp_path: Path) -> None:
    text = tmp_path / "beasts.txt"
    text.write_text(LINES.replace("ox", "<kine>"), "utf-8")
    base = make_lm()
    block = ("lm tokens tokens placeholders=<kine> vectors=2 initial=ox lr=0.05", "lm attention lora rank=2")
    result = train_text(small(text, tmp_path, block=block, lr=1e-2, steps=10), base=base)
    before, after = held_out(result)
    assert after < before
    assert spec_of(result.output).triggers == ("<kine>",)
    adapters = Adapters(base)
    adapters.load(result.output)
    first, second = learned(base.tokenizer).values()
    assert base.encode("The <kine> ox<kine>,s<kine>s") == [
        *base.encode("The"), first, second, *base.encode(" ox"), first, second, *base.encode(",s"), first, second,
        *base.encode("s"),
    ]  # fmt: skip
    assert base.encode("<KINE>") == make_lm().encode("<KINE>")
    config = TextGenerateConfig(("The <kine>",), max_tokens=5, base="unused")
    assert len(list(continued(base, base.start() + base.encode("The <kine>"), config, 0))) == 5
    adapters.remove("a")
    assert base.encode("<kine>") == make_lm().encode("<kine>")
    text.write_text(LINES, "utf-8")
    with pytest.raises(UserError, match="the text never says '<kine>', so its meaning cannot be learned"):
        train_text(small(text, tmp_path / "x", block=block[:1]), base=base)


def test_new_words_are_read_and_never_asked_for() -> None:
    base = make_lm()
    site.attach(base.lm, "a", with_initial_tokens(base, "lm", Tokens("<kine>", 2, "ox")), "tokens")
    site.attach(base.lm, "b", Lora(rank=2), "attention")
    teach(base)
    line = tokens(base, ["a <kine> b"])
    assert len(line) == 6  # the word takes the space before it, and the text its end token
    with torch.no_grad():
        task = LanguageTask(base, LanguageSettings(0, 1, 1, 7), line)
        losses, said = task._losses(line[None], task.start)
        logits = base.lm(F.pad(line[None], (1, 0), value=EDGE)).logits[0]
    asked = [0, 3, 4, 5]
    assert said.nonzero().flatten().tolist() == asked and not losses[~said].any()
    assert torch.allclose(losses[said], F.cross_entropy(logits[asked], line[asked], reduction="none"))
