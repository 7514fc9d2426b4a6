"""Language models: the base, the sample, training, agreement with peft, generation, and the commands as people run them."""

import json
import math
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import DiffusionPipeline
from language import CONTEXT, make_lm, save_lm
from making import command
from rich.console import Console
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.nn import functional as F

import peft_diffusion as pd
from peft_diffusion import formats
from peft_diffusion.api import train_text
from peft_diffusion.bases import LanguageModel, checksum, components, describe, embedded, load_lm
from peft_diffusion.cli.console import TrainingConsole
from peft_diffusion.core import merge, site, targets
from peft_diffusion.core.errors import FoldError, Interrupted, UserError
from peft_diffusion.core.events import Event
from peft_diffusion.data.text_files import read_texts
from peft_diffusion.generation import Adapters, Schedule
from peft_diffusion.generation.text import choose, continued, generate_text
from peft_diffusion.generation.text_settings import TextGenerateConfig
from peft_diffusion.methods.lora import Lora
from peft_diffusion.training import TextTrainResult
from peft_diffusion.training.events import Step
from peft_diffusion.training.loop.trainer import Trainer, loss_at
from peft_diffusion.training.settings.derive import resolve_language
from peft_diffusion.training.settings.text import TextTrainConfig
from peft_diffusion.training.tasks.language import LanguageSettings, LanguageTask, tokens

pytestmark = pytest.mark.usefixtures("few_measurements", "no_plots")

torch.set_num_threads(1)
LINES = "".join(f"The {beast} of the field is {how}, and so is its house.\n" for beast in ("ox", "ass", "lion", "hen")
                for how in ("swift", "slow", "wise", "bold", "meek", "proud"))  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "beasts.txt"
    path.write_text(LINES, "utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lm(tmp_path_factory.mktemp("lm") / "tiny")


def small(text: Path, place: Path, **changes: Any) -> TextTrainConfig:
    """A training of seconds."""
    place.mkdir(exist_ok=True)
    settings = {
        "output": place / "a.safetensors", "run_dir": place / "run", "steps": 6, "batch_size": 2, "rank": 4, "lr": 1e-2,
        "save_every": 3, "log_every": 1, "held_out": 0.2, "seed": 3, **changes,
    }  # fmt: skip
    return TextTrainConfig((text,), **settings)


def metrics(result: TextTrainResult) -> list[dict[str, Any]]:
    lines = (result.run_dir / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in ("seconds", "crc32")} for line in lines]


# --- the base


def test_a_folder_is_loaded_frozen_and_described(folder: Path) -> None:
    base = load_lm(folder, device="cpu")
    info = describe(base)
    assert list(components(base)) == ["lm"]
    assert (info.name, info.architecture, info.vocabulary, info.context) == ("tiny", "LlamaForCausalLM", 257, CONTEXT)
    assert info.fingerprint == describe(make_lm()).fingerprint != describe(make_lm(seed=1)).fingerprint
    assert not base.lm.training
    assert not any(parameter.requires_grad for parameter in base.lm.parameters())
    assert base.start() == [0]
    assert base.tokenizer.decode(base.encode("a house")) == "a house"


def test_targets_of_a_llama_leave_the_head_alone() -> None:
    lm = make_lm().lm
    assert len(targets.match(lm, "attention")) == 8
    assert len(targets.match(lm, "attention+ff")) == len(targets.match(lm, "all-linear")) == 14
    assert targets.match(lm, "lm_head") == ["lm_head"]
    assert targets.blocks(lm).names == ("layers.0", "layers.1", "other")


def test_a_weight_that_another_module_has_too_is_not_merged_into() -> None:
    lm = make_lm().lm
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    site.attach(lm, "a", Lora(rank=2), r"lm_head|.*\.q_proj")
    for adapter in site.adapters(lm, "a").values():
        torch.nn.init.normal_(adapter.get_parameter("up"))
    with pytest.raises(FoldError, match=r"lm_head: its weight is shared with model\.embed_tokens, .* leave the adapters"):
        merge.merge(lm)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.state_dict().items())
    with pytest.raises(UserError, match="nothing is merged"):
        merge.unmerge(lm)
    lm.lm_head.weight = torch.nn.Parameter(lm.lm_head.weight.clone(), requires_grad=False)
    embedding = before["model.embed_tokens.weight"]
    merge.merge(lm)
    assert not torch.equal(lm.lm_head.weight, embedding) and torch.equal(lm.get_input_embeddings().weight, embedding)


def test_layers_that_are_no_linear_are_refused_in_words() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    with pytest.raises(UserError, match=r"method lora cannot serve what the target 'attention\+ff' names: Conv1D"):
        site.attach(model, "a", Lora())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "said"),
    [("nowhere", "there is no base 'nowhere': neither 'tiny-lm'"), ("empty", "holds no config.json"),
     ("broken", "cannot be read as a causal language model"), ("clip", "cannot be read as a causal language model")],
)  # fmt: skip
def test_a_base_that_cannot_be(
    source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "clip").symlink_to(tiny_base / "text_encoder")
    with pytest.raises(UserError, match=said):
        load_lm(source, device="cpu")


def test_the_embedded_model_knows_its_text() -> None:
    base = load_lm(device="cpu")
    info = describe(base)
    assert (info.name, info.family, info.context) == ("tiny-lm", "lm", 256)
    assert sum(path.stat().st_size for path in embedded("text/base").iterdir()) <= 6_000_000
    # Text of the kind it was trained on is far likelier than the same words in another order.
    plain = "apple tree (noun): a tree that bears fruit; a small tree with white flowers and edible fruit"
    mixed = " ".join(sorted(plain.split()))
    assert perplexity(base, plain) < 100
    assert perplexity(base, plain) < perplexity(base, mixed) / 2


@torch.no_grad()
def perplexity(base: LanguageModel, text: str) -> float:
    """Computed plainly: one window, all of the text."""
    ids = torch.tensor([base.start() + base.encode(text)])
    losses = F.cross_entropy(base.lm(ids).logits[0, :-1], ids[0, 1:])
    return math.exp(losses)


# --- the text


def test_texts_are_read_and_what_is_not_is_listed(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_bytes("\ufeffzwei\r\nZeilen".encode())
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "LICENSE.txt").write_text("law")
    (tmp_path / "picture.png").write_bytes(b"x")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"fine\nna\xefve")
    (tmp_path / "shell.txt").write_bytes("drei\r\n".encode("utf-16"))  # as PowerShell writes it
    os.mkfifo(tmp_path / "pipe.txt")
    found = read_texts([tmp_path])
    assert [document.name for document in found.documents] == ["b/two.txt", "one.txt", "shell.txt"]
    assert [document.text for document in found.documents] == ["zwei\nZeilen", "one", "drei\n"]
    assert len(found.left_out) == 5
    told = " ".join(found.describe())
    for words in (
        "5 files left out",
        "pipe.txt is no ordinary",
        "LICENSE.txt",
        "picture.png is no .txt",
        "empty.txt is empty",
        "latin.txt is no text",
    ):
        assert words in told


def test_the_sample_is_there_with_its_parts() -> None:
    sample = embedded("text/king-james")
    train, apart = read_texts([sample / "train"]), read_texts([sample / "held-out"])
    assert {document.name for document in train.documents} == {"proverbs.txt", "psalms.txt"}
    assert 200_000 < sum(len(document.text) for document in train.documents) < 600_000
    assert all(len(document.text) > 10_000 for document in apart.documents)
    assert (sample / "LICENSE").is_file()


# --- the loss


def task_of(base: LanguageModel, line: Tensor, apart: Tensor | None = None, **changes: Any) -> LanguageTask:
    settings: dict[str, Any] = {"seed": 1, "batch_size": 3, "accumulation": 2, "context": 16, **changes}
    return LanguageTask(base, LanguageSettings(**settings), line, apart)


def test_every_pass_takes_each_window_once_and_cuts_elsewhere() -> None:
    line = torch.arange(1, 201)  # windows of 15 tokens after the one that begins every text
    task = task_of(make_lm(), line)
    assert task.windows == 12
    passes = [[tuple(task.window(number).tolist()) for number in range(12 * turn, 12 * turn + 12)] for turn in range(2)]
    for windows in passes:
        seen = sorted(token for window in windows for token in window)
        assert seen == list(range(seen[0], seen[0] + 180))
        assert windows != sorted(windows)
    assert passes[0] != passes[1]
    again = task_of(make_lm(), line)
    assert tuple(again.window(17).tolist()) == passes[1][5]  # whatever was asked before
    assert tuple(task_of(make_lm(), line, seed=2).window(17).tolist()) != passes[1][5]


@pytest.mark.parametrize("length", [2, 14, 15, 16, 29, 30, 31])
def test_short_texts_still_make_windows(length: int) -> None:
    task = task_of(make_lm(), torch.arange(length), torch.arange(length))
    windows = [task.window(number) for number in range(4)]
    assert all(len(window) == min(15, length) for window in windows)
    apart = task.held_out()
    assert apart is not None and math.isfinite(apart) and math.isfinite(float(loss_at(task, 0, 0, task.device)))


def test_the_held_out_loss_is_that_of_a_plain_computation() -> None:
    base = make_lm()
    line = tokens(base, [LINES[:200], LINES[200:350]])
    assert int((line == 0).sum()) == 2
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(line), 15):
            ids = torch.cat([torch.tensor([0]), line[start : start + 15]])
            logits = base.lm(ids[None]).logits[0]
            for place in range(1, len(ids)):
                total -= float(logits[place - 1].log_softmax(-1)[ids[place]])
                count += 1
    assert count == len(line)
    task = task_of(base, line, line, batch_size=4)
    assert task.held_out() == pytest.approx(total / count, rel=1e-5)


def test_a_tokenizer_that_puts_nothing_first_is_asked_from_the_second_token() -> None:
    base = make_lm()
    base.tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    assert base.start() == []
    line = torch.arange(1, 12)
    with torch.no_grad():
        expected = float(F.cross_entropy(base.lm(line[None]).logits[0, :-1], line[1:]))
    assert task_of(base, line, line).held_out() == pytest.approx(expected, rel=1e-5)


# --- training


@pytest.mark.slow
def test_training_lowers_the_loss_and_leaves_the_base(text: Path, tmp_path: Path) -> None:
    base = make_lm()
    before = checksum(components(base))
    console = Console(record=True, width=200)
    config = small(text, tmp_path / "x", steps=40, save_every=20, held_out=None, context=24)
    result = train_text(config, base=base, observers=[TrainingConsole(console)])
    lines = metrics(result)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert checksum(components(base)) == before == result.base_checksum
    assert not site.sites(base.lm)
    assert result.perplexities is not None
    was, now = result.perplexities
    assert now < 0.6 * was
    assert f"perplexity on text kept apart: {was:.2f} before, {now:.2f} after" in console.export_text()
    found = formats.inspect(result.output)
    assert found.methods == ("lora",) and dict(found.components) == {"lm": 14} and dict(found.ranks) == {4: 14}
    assert found.spec is not None
    assert found.spec.base["architecture"] == "LlamaForCausalLM" and found.spec.methods["lm"][0]["target"] == "attention+ff"
    assert found.spec.training["texts"] == ["beasts.txt"]
    assert found.metadata["modelspec.architecture"] == "LlamaForCausalLM/lora"
    assert "modelspec.resolution" not in found.metadata
    assert all(name.startswith("lora_lm_model_layers_") for name in load_file(result.output))


@pytest.mark.slow
def test_the_file_gives_back_what_was_measured(text: Path, tmp_path: Path) -> None:
    result = train_text(small(text, tmp_path / "x"), base=make_lm())
    base = make_lm()
    adapters = Adapters(base)
    name = adapters.load(result.output)
    whole = tokens(base, [LINES])
    apart = whole[len(whole) - round(len(whole) * 0.2) :]
    task = task_of(base, whole, apart, context=CONTEXT, batch_size=2)
    measured = task.held_out()
    assert measured == pytest.approx(result.held_out_after, rel=1e-5)
    adapters.merge()
    assert task.held_out() == pytest.approx(measured, rel=1e-5)
    adapters.unmerge()
    adapters.set(**{name: 0.0})
    assert task.held_out() == result.held_out_before
    adapters.remove(name)
    assert task.held_out() == result.held_out_before


@pytest.mark.slow
def test_text_to_measure_on_can_be_given(text: Path, tmp_path: Path) -> None:
    apart = tmp_path / "apart.txt"
    apart.write_text("The ox is slow.", "utf-8")
    base = make_lm()
    result = train_text(small(text, tmp_path / "x", held_out=None, held_out_text=(apart,)), base=base)
    assert result.tokens == len(tokens(base, [LINES]))
    line = tokens(base, ["The ox is slow."])
    assert result.held_out_before == task_of(base, line, line, context=CONTEXT).held_out()


# Everything at once that draws chance or carries state.
EVERYTHING = {"accumulation": 2, "ema": 0.9, "dropout": 0.2, "scheduler": "linear", "warmup": 2, "context": 20}


class StopAfter:
    """Sends a real SIGINT to this process after a step."""

    def __init__(self, step: int) -> None:
        self.at = step

    def __call__(self, event: Event) -> None:
        if isinstance(event, Step) and event.step == self.at:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    whole = train_text(small(text, tmp_path / "whole", **changes), base=make_lm())
    run = Trainer.run

    def stopped(self: Trainer, until: int | None = None, **stop: Any) -> bool:
        self.observers.append(StopAfter(4))
        return run(self, until, **stop)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "run", stopped)
        with pytest.raises(Interrupted, match=r"after step 4 of 6; go on with: peft-diffusion text train .* --resume"):
            train_text(small(text, tmp_path / "cut", **changes), base=make_lm())
    assert not (tmp_path / "cut" / "a.safetensors").exists()
    torch.manual_seed(99)
    resumed = train_text(small(text, tmp_path / "cut", resume=True, **changes), base=make_lm())
    one, two = load_file(whole.output), load_file(resumed.output)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert metrics(resumed) == metrics(whole)


def test_schedule_free_has_no_schedule_unless_told() -> None:
    def scheduler(**asked: Any) -> str:
        return resolve_language(TextTrainConfig((Path("a"),), **asked), parameters=9, context=64).scheduler

    assert scheduler() == "cosine" and scheduler(optimizer="schedule-free") == "constant"
    assert scheduler(optimizer="schedule-free", scheduler="linear") == "linear"


@pytest.mark.slow
def test_patience_without_text_kept_apart_is_warned_of(text: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=200, file=(tmp_path / "log").open("w"))
    config = small(text, tmp_path / "run", held_out=0.0, patience=2, steps=1)
    train_text(config, base=make_lm(), observers=[TrainingConsole(console)])
    assert "warning: --patience ends nothing where nothing is kept apart" in console.export_text()


@pytest.mark.slow
def test_a_run_does_not_go_on_with_another_text(text: Path, tmp_path: Path) -> None:
    train_text(small(text, tmp_path / "x", steps=1), base=make_lm())
    text.write_text(LINES + "More.", "utf-8")
    with pytest.raises(UserError, match=r"had other text: beasts.txt has another content"):
        train_text(small(text, tmp_path / "x", steps=9, resume=True), base=make_lm())
    with pytest.raises(UserError, match=r"holds a run already"):
        train_text(small(text, tmp_path / "x"), base=make_lm())


@pytest.mark.slow
def test_epochs_become_steps(text: Path, tmp_path: Path) -> None:
    asked = small(text, tmp_path / "x", steps=None, epochs=2, held_out=0.0, context=32, save_every=1000)
    result = train_text(asked, base=make_lm())
    windows = (len(tokens(make_lm(), [LINES])) - 31 + 1) // 31
    assert result.steps == math.ceil(2 * windows / 2)
    assert result.held_out_after is None and result.perplexities is None


# --- agreement with peft


def test_a_lora_gives_what_peft_gives(tmp_path: Path) -> None:
    base = make_lm()
    site.attach(base.lm, "a", Lora(rank=4, alpha=6.0), "attention+ff")
    own = site.adapters(base.lm, "a")
    generator = torch.Generator().manual_seed(5)
    for adapter in own.values():
        adapter.get_parameter("up").data.normal_(0, 0.2, generator=generator)
    ids = torch.randint(1, 257, (3, 20), generator=generator)
    logits = base.lm(ids).logits
    logits.square().mean().backward()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=r".*\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")
    theirs = peft.get_peft_model(make_lm().lm, config)
    layers = {path: theirs.get_submodule(f"base_model.model.{path}") for path in own}
    for path, adapter in own.items():
        layers[path].lora_A["default"].weight.data.copy_(adapter.get_parameter("down"))
        layers[path].lora_B["default"].weight.data.copy_(adapter.get_parameter("up"))
    expected = theirs(input_ids=ids).logits
    expected.square().mean().backward()
    assert (logits - expected).abs().max() < 1e-5
    for path, adapter in own.items():
        for name, other in (("down", layers[path].lora_A), ("up", layers[path].lora_B)):
            own_gradient = adapter.get_parameter(name).grad
            assert own_gradient is not None
            assert torch.allclose(own_gradient, other["default"].weight.grad, rtol=1e-4, atol=1e-6)


# --- generation


def test_the_cache_changes_no_token() -> None:
    base = make_lm()
    config = TextGenerateConfig(("The ox",), max_tokens=12, temperature=0.0, base="unused")
    ids = base.start() + base.encode("The ox")
    found = list(continued(base, ids, config, 0))
    with torch.no_grad():
        for token in found:
            assert token == int(base.lm(torch.tensor([ids])).logits[0, -1].argmax())
            ids = [*ids, token]
    assert len(found) == 12


@pytest.mark.slow
def test_choice_follows_temperature_and_top_p() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, -4.0])
    chance = torch.Generator().manual_seed(0)
    assert {choose(logits, 0.0, 1.0, chance) for _ in range(20)} == {1}
    assert {choose(logits, 1.0, 0.5, chance) for _ in range(50)} == {1}
    assert {choose(logits, 1.0, 0.9, chance) for _ in range(300)} == {1, 2}
    drawn = torch.bincount(torch.tensor([choose(logits, 1.0, 1.0, chance) for _ in range(4000)]), minlength=4) / 4000
    assert (drawn - logits.softmax(-1)).abs().max() < 0.03


@pytest.mark.slow
def test_seeds_and_adapters_decide_the_text(folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "a.safetensors"
    base = make_lm()
    site.attach(base.lm, "a", Lora(rank=2), "attention")
    for adapter in site.adapters(base.lm, "a").values():
        torch.nn.init.normal_(adapter.get_parameter("up"), generator=torch.Generator().manual_seed(1))
    formats.save(made, components(base), "a", formats.Spec(base=asdict(describe(base))))

    def written(**changes: Any) -> list[str]:
        told = TextGenerateConfig(("The ox",), base=str(folder), max_tokens=10, device="cpu", temperature=1.0, **changes)
        return [one.continuation for one in generate_text(told)]

    three = written(count=3)
    assert len(set(three)) == 3
    assert written(seed=1) == three[1:2]
    assert written(adapter=(f"{made}=0",)) == three[:1]
    assert written(adapter=(str(made),)) != three[:1]


def test_a_schedule_is_refused_for_text(folder: Path, tmp_path: Path) -> None:
    base = make_lm()
    site.attach(base.lm, "a", Lora(rank=2))
    formats.save(tmp_path / "a.safetensors", components(base), "a", formats.Spec())
    adapters = Adapters(make_lm())
    with pytest.raises(UserError, match="a schedule runs over denoising steps"):
        adapters.load(tmp_path / "a.safetensors", strength=Schedule([0.0, 1.0]))
    assert adapters.names == () and not site.sites(adapters.pipe.lm)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, tiny_pipe: DiffusionPipeline) -> None:
    other = make_lm(width=48)
    site.attach(other.lm, "a", Lora(rank=2))
    spec = formats.Spec(base=asdict(describe(other)))
    formats.save(tmp_path / "a.safetensors", components(other), "a", spec)
    with pytest.raises(UserError, match=r"was made for base 'tiny' \(lm\)"):
        formats.load(tmp_path / "a.safetensors", make_lm())
    with pytest.raises(UserError, match=r"was made for base 'tiny' \(lm\); this base is .*none of its"):
        pd.Adapters(tiny_pipe).load(tmp_path / "a.safetensors")


# --- the commands


@pytest.mark.slow
def test_the_commands_teach_and_write(folder: Path, text: Path, tmp_path: Path) -> None:
    told = ("text", "train", text, "--base", folder, "--output", "a.safetensors", "--steps", 4, "--rank", 2)
    done = command(*told, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "perplexity on text kept apart" in done.stdout
    assert (tmp_path / "runs" / "a" / "config.toml").read_text().startswith("# peft-diffusion text train --config")
    again = command("text", "train", "--config", "runs/a/config.toml", "--overwrite", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    write = ("text", "generate", "The ox", "--adapter", "a.safetensors", "--base", folder, "--max-tokens", 8)
    written = command(*write, cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    assert written.stdout.startswith("The ox")
    listed = command("inspect", "a.safetensors", cwd=tmp_path)
    assert "lm 14" in listed.stdout and "LlamaForCausalLM" in listed.stdout


BAD = {
    "text train": (2, "--texts requires an argument"),
    "text train missing.txt": (1, "there is no file or folder missing.txt"),
    "text train empty.txt": (1, "empty.txt is empty"),
    "text train latin.txt": (1, "latin.txt is no text in UTF-8: byte 8, in line 2"),
    "text train nothing": (1, "there is no text to learn from in nothing"),
    "text train good.txt --base nowhere": (1, "there is no base 'nowhere'"),
    "text train good.txt --output a.bin": (1, "the adapter is a .safetensors file"),
    "text train good.txt --context 1": (1, "--context must be 2 or more"),
    "text train good.txt --method magic": (1, "there is no method 'magic'"),
    "text train good.txt --lr 0": (1, "--lr must be above 0"),
    "text generate": (1, "there is no prompt"),
    "text generate a --temperature nan": (1, "temperature must be a finite number"),
    "text generate a --top-p 0": (1, "--top-p must be above 0, at most 1, not 0.0"),
    "text generate a --adapter missing.safetensors": (1, "there is no adapter file missing.safetensors"),
    "text write": (2, "write"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("line", "code", "said"), [(line, *more) for line, more in BAD.items()], ids=list(BAD))
def test_bad_input_is_told_in_one_line(line: str, code: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"fine\nna\xefve")
    (tmp_path / "good.txt").write_text(LINES)
    (tmp_path / "nothing").mkdir()
    before = sorted(tmp_path.rglob("*"))
    done = command(*line.split(), cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert said in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_base_cannot_hold_is_told(folder: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--context 99 is more than the base takes, which is 48 tokens"):
        train_text(small(text, tmp_path / "x", context=99), base=make_lm())
    told = TextGenerateConfig(("The ox",), base=str(folder), max_tokens=48, device="cpu")
    with pytest.raises(UserError, match="the prompt has 7 tokens and --max-tokens asks for 48, but the base takes 48"):
        next(generate_text(told))
