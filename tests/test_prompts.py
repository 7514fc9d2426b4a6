"""Prompts with weights, escapes and BREAK, and of any length: equal to what A1111 and ComfyUI compute, written out here."""

import math
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_pipe, make_xl_pipe
from safetensors import safe_open
from test_training import draw_pictures, small
from torch import Tensor

from peft_diffusion import formats
from peft_diffusion.api import train
from peft_diffusion.bases import denoiser_of
from peft_diffusion.bases.prompt_syntax import Part, escaped, is_plain, parse, words
from peft_diffusion.bases.prompts import Reading, alike
from peft_diffusion.bases.prompts import together as prompts_together
from peft_diffusion.bases.taught import learned
from peft_diffusion.bases.words import teach, with_initial_tokens
from peft_diffusion.core import site
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.events import Event, Noted, Warned
from peft_diffusion.data.wildcards import Wildcards
from peft_diffusion.generation import Adapters
from peft_diffusion.generation.generate import generate
from peft_diffusion.generation.sampler import Cell, paint
from peft_diffusion.generation.settings import GenerateConfig, Sampling
from peft_diffusion.generation.telling import tell_clip_skip
from peft_diffusion.generation.while_training import TrainingPictures
from peft_diffusion.methods import method
from peft_diffusion.methods.prompt import SoftPrompt
from peft_diffusion.methods.tokens import Tokens
from peft_diffusion.training.attachment import NAME
from peft_diffusion.training.events import PreviewsChosen
from peft_diffusion.training.machine.processes import Processes
from peft_diffusion.training.pictures import diffusion_task
from peft_diffusion.training.settings.placements import blocks
from peft_diffusion.training.tasks.diffusion import DiffusionTask
from peft_diffusion.training.tasks.preparation import prepare

pytestmark = pytest.mark.usefixtures("few_measurements", "no_signals", "no_plots")

torch.set_num_threads(1)
START, END = 0, 1

# What `parse_prompt_attention` of A1111's modules/prompt_parser.py answers, by its documentation and by running it.
READ: dict[str, list[tuple[str, float] | None]] = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
        ("sky", 1.4641), (".", 1.1),
    ],
    "a cat BREAK  a dog": [("a cat", 1.0), None, ("a dog", 1.0)],
    "16:9 :1.2) a": [("16:9 :1.2) a", 1.0)],
    "(a: 1.3), (b:0.5 ) (c : .5 )": [
        ("a", 1.3), (", ", 1.0), ("b", 0.5), (" ", 1.0), ("c ", 0.5),
    ],
    "": [("", 1.0)],
}  # fmt: skip


def pairs(found: list[Part | None]) -> list[Any]:
    return [None if part is None else (part.text, pytest.approx(part.weight)) for part in found]


@pytest.mark.parametrize("prompt", READ)
def test_prompts_are_read_as_a1111_reads_them(prompt: str) -> None:
    assert pairs(parse(prompt)) == READ[prompt]


def test_comfyui_replaces_weights_that_a1111_multiplies_and_knows_no_square_brackets() -> None:
    told = "a ((cat:1.3) dog:0.5) [bird] (x:y) \\(z\\)"
    assert pairs(parse(told, "comfyui")) == [
        ("a ", 1.0), ("cat", 1.3), (" dog", 0.5), (" [bird] ", 1.0), ("x:y", 1.1), (" (z)", 1.0),
    ]  # fmt: skip
    assert pairs(parse(r"a (b:2) BREAK \(c\)", "none")) == [("a (b:2) BREAK (c)", 1.0)]


def test_what_is_escaped_is_read_as_letters() -> None:
    text = r"a [V] (cat:1.2) \o/ BREAK"
    assert words(escaped(text)) == r"a [V] (cat:1.2) \o/ Break" and words("a (red:1.2) [cat] BREAK x") == "a red cat x"
    assert is_plain("a cat: 3, {x}") and not is_plain("a (cat") and is_plain("a (cat", "none")


def with_means(pipe: Any) -> Any:
    """A pipeline whose text encoder's states have a mean, as trained ones have: A1111 divides by it."""
    torch.nn.init.normal_(pipe.text_encoder.final_layer_norm.bias, generator=torch.Generator().manual_seed(0))
    return pipe


def by_a1111(pipe: Any, prompt: str, number: int = 0, skip: int | None = None) -> tuple[Tensor, Tensor]:
    """Hidden states and summary of a prompt, token by token as modules/sd_hijack_clip.py makes them."""
    names = [("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")][number]
    tokenizer, encoder = (getattr(pipe, name) for name in names)
    parsed = READ.get(prompt) or [None if p is None else (p.text, p.weight) for p in parse(prompt)]
    comma = tokenizer(",", add_special_tokens=False).input_ids[0]
    chunks: list[list[tuple[int, float]]] = []
    chunk: list[tuple[int, float]] = []
    last = -1
    for part in parsed:
        if part is None:
            chunks, chunk, last = [*chunks, chunk], [], -1
            continue
        for token in tokenizer(part[0], add_special_tokens=False).input_ids:
            if token == comma:
                last = len(chunk)
            elif len(chunk) == 75 and last != -1 and 75 - last <= 20:
                chunks, chunk, last = [*chunks, chunk[: last + 1]], chunk[last + 1 :], -1
            if len(chunk) == 75:
                chunks, chunk, last = [*chunks, chunk], [], -1
            chunk.append((token, part[1]))
    chunks += [chunk] if chunk or not chunks else []
    states, summaries = [], []
    for chunk in chunks:
        fill = [(END, 1.0)] * (75 - len(chunk))
        row = [(START, 1.0), *chunk, *fill, (END, 1.0)]
        out = encoder(torch.tensor([[token for token, _ in row]]), output_hidden_states=True)
        if hasattr(pipe, "text_encoder_2"):
            z = out.hidden_states[-(skip or 2)]
        else:
            z = out[0] if skip in (None, 1) else encoder.final_layer_norm(out.hidden_states[-skip])
        mean = z.mean()
        z = z * torch.tensor([weight for _, weight in row]).reshape(1, 77, 1).expand(z.shape)
        states.append(z * (mean / z.mean()))
        summaries.append(out[0])
    return torch.hstack(states), summaries[0]


LONG = "a red (apple, blue:1.3) cat, [dog] of " * 12
PROMPTS = [
    "a (red:1.4) cat",
    r"a \(red\) [cat] ((dog))",
    LONG,
    "a cat BREAK (a dog:0.7), ink BREAK style",
    f"BREAK {LONG} BREAK",
    "apple, " * 30 + "red " * 18 + "cat dog, blue",
]


@torch.no_grad()
def test_a_mean_that_is_0_but_for_rounding_is_not_brought_back() -> None:
    """Nothing but rounding would say by what else; and the same words read alike however many are read at once."""
    pipe = make_pipe()
    text = denoiser_of(pipe).text
    (alone,) = text.encode(["a (red:1.3) cat"])
    (among,) = text.encode(["a (red:1.3) cat", "a (dog:0.7)", "a house"])
    (plain,) = text.encode(["a red cat"])
    assert abs(float(plain.mean())) < 1e-7 and (among[:1] - alone).abs().max() < 1e-5
    ratio = (alone / plain).median(-1).values[0]
    assert torch.allclose(ratio, torch.tensor([1.0, 1.0, 1.3, *[1.0] * 74]), atol=1e-4)
    assert torch.equal(text.encode(["a (red:1.3) cat"])[0], alone)
    for dtype in (torch.bfloat16, torch.float16):  # whose means are farther from 0 by their rounding
        pipe.to(dtype)
        (alone,), (plain,) = (text.encode([one]) for one in ("a (red:1.3) cat", "a red cat"))
        assert torch.equal(alone[:, :2], plain[:, :2]) and torch.equal(alone[:, 3:], plain[:, 3:])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("prompt", PROMPTS)
def test_embeddings_of_one_and_of_two_encoders_are_those_of_a1111(prompt: str) -> None:
    pipe, large = with_means(make_pipe()), make_xl_pipe()
    (hidden,) = denoiser_of(pipe).text.encode([prompt])
    assert (hidden - by_a1111(pipe, prompt)[0]).abs().max() < 1e-5
    hidden, summary = denoiser_of(large).text.encode([prompt])
    first, second = by_a1111(large, prompt), by_a1111(large, prompt, 1)
    assert (hidden - torch.cat([first[0], second[0]], -1)).abs().max() < 1e-5
    assert (summary - second[1]).abs().max() < 1e-5


@torch.no_grad()
def test_weights_of_comfyui_go_from_no_words_towards_the_words() -> None:
    pipe = make_pipe()
    text = denoiser_of(pipe).text.read_as(Reading("comfyui"))
    (found,) = text.encode(["a (red:1.5) cat"])
    plain, nothing = (text.encode([prompt])[0] for prompt in ("a red cat", ""))
    expected = plain.clone()
    expected[:, 2] = nothing[:, 2] + 1.5 * (plain[:, 2] - nothing[:, 2])  # behind the start and "a"
    assert (found - expected).abs().max() < 1e-6 and (found - plain).abs().max() > 1e-3
    # A word stays whole where a chunk is full, and is broken from eight tokens on.
    rows = (
        denoiser_of(pipe)
        .text.read_as(Reading("comfyui"))
        .sides[0]
        .rows(["a " * 73 + "xyz cat", "a " * 73 + "q" * 9], text.reading)
    )
    assert [[len(chunk.ids) for chunk in row] for row in rows] == [[73, 4], [75, 7]]


@pytest.mark.slow
@torch.no_grad()
def test_clip_skip_takes_the_layer_that_a1111_takes() -> None:
    for pipe, usual in ((make_pipe(), 1), (make_xl_pipe(), 2)):
        text = denoiser_of(pipe).text
        assert text.clip_skip == usual
        assert torch.equal(text.encode(["a cat"])[0], text.read_as(Reading(clip_skip=usual)).encode(["a cat"])[0])
    pipe = with_means(make_pipe())
    other = denoiser_of(pipe).text.read_as(Reading(clip_skip=2))
    assert (other.encode(["a cat"])[0] - by_a1111(pipe, "a cat", skip=2)[0]).abs().max() < 1e-5
    assert not torch.equal(other.encode(["a cat"])[0], denoiser_of(pipe).text.encode(["a cat"])[0])
    with pytest.raises(UserError, match="clip skip 3 is more than the 2 layers"):
        denoiser_of(pipe).text.read_as(Reading(clip_skip=3)).check()


@pytest.mark.slow
@torch.no_grad()
def test_prompts_of_several_lengths_are_told_to_the_network_as_if_alone() -> None:
    pipe: Any = make_pipe()
    text = denoiser_of(pipe).text
    prompts = ["a cat", LONG, "a dog BREAK a cat BREAK ink"]
    assert text.chunks(prompts) == [1, 2, 3]
    (together,) = text.encode([*prompts, "red BREAK blue"])
    assert together.shape[1] == 77 * math.lcm(1, 2, 3, 2)
    noise, steps = torch.randn(1, 4, 8, 8), torch.tensor([500])
    for row, prompt in enumerate(prompts):
        alone = pipe.unet(noise, steps, text.encode([prompt])[0])[0]
        assert (pipe.unet(noise, steps, together[row : row + 1])[0] - alone).abs().max() < 1e-5
    assert [one.shape[1] for one in alike([torch.zeros(1, 77, 2), torch.zeros(1, 231, 2)])] == [231, 231]


def with_words(pipe: Any, method: Any) -> None:
    site.attach(pipe.text_encoder, "w", with_initial_tokens(pipe, "text_encoder", method), "tokens")
    teach(pipe)


@pytest.mark.slow
def test_learned_words_and_soft_prompts_stay_whole_in_chunks() -> None:
    pipe: Any = make_pipe()
    with_words(pipe, Tokens("(ink*)", 6, "flat"))
    text = denoiser_of(pipe).text
    known = [number for name, number in learned(pipe.tokenizer).items() if name.startswith("(ink*)")]
    (row,) = text.sides[0].rows(["a " * 72 + "(ink*) cat"], Reading())
    assert len(known) == 6 and [len(chunk.ids) for chunk in row] == [72, 7] and list(row[1].ids[:6]) == known
    assert text.chunks(["a " * 69 + "(ink*)"]) == [1]
    (row,) = text.sides[0].rows(["a ((ink*):1.3)"], Reading())
    assert row[0].weights == (1.0, *[1.3] * 6)
    soft: Any = make_pipe()
    with_words(soft, SoftPrompt(10, "flat"))
    (row,) = denoiser_of(soft).text.sides[0].rows(["a " * 70 + "BREAK cat"], Reading())
    assert [len(chunk.ids) for chunk in row] == [75, 5, 1] and row[0].ids[:10] == tuple(learned(soft.tokenizer).values())
    plain = soft.tokenizer("a cat", padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(denoiser_of(soft).text.tokenized(["a cat"])["ids_0"], plain)
    with_words(long := make_pipe(), Tokens("ink*", 80, "flat"))
    with pytest.raises(UserError, match="a learned word of 80 tokens fits no prompt"):
        denoiser_of(long).text.chunks(["ink*"])


def difference(one: Any, other: Any) -> float:
    import numpy as np

    return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean())


def drawn(pipe: Any, *prompts: str, **told: Any) -> list[Any]:
    cells = [Cell(prompt, 3, None) for prompt in prompts]
    return list(paint(Adapters(pipe), cells, Sampling(**{"steps": 2, **told})))


@pytest.mark.slow
def test_plain_prompts_give_the_bytes_of_the_pipeline_and_others_do_not_depend_on_the_batch() -> None:
    pipe = with_means(make_pipe())
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    theirs = pipe("a red cat", negative_prompt="dog", num_inference_steps=2, guidance_scale=5.0, latents=noise).images[0]
    assert difference(drawn(pipe, "a red cat", negative="dog")[0], theirs) == 0
    prompts = ("a (red:1.6) cat", LONG, "a red cat", "a red cat BREAK dog")
    together = drawn(pipe, *prompts, negative="[dog]")
    assert all(difference(one, drawn(pipe, p, negative="[dog]")[0]) < 0.1 for one, p in zip(together, prompts, strict=True))
    assert min(difference(together[2], one) for one in (together[0], together[1], together[3])) > 0.1
    embeds = by_a1111(pipe, prompts[0])[0], by_a1111(pipe, "[dog]")[0]
    told = dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeds, strict=True))
    theirs = pipe(**told, num_inference_steps=2, guidance_scale=5.0, latents=noise).images[0]
    assert difference(together[0], theirs) < 0.1


@pytest.mark.slow
def test_an_empty_negative_prompt_of_xl_is_told_by_zeros_and_a_second_prompt_to_the_second_encoder() -> None:
    pipe: Any = make_xl_pipe()
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    common: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 5.0, "latents": noise, "width": 64, "height": 64}
    zeros = pipe("a cat", **common).images[0]
    empty = pipe("a cat", negative_prompt="", **common).images[0]
    assert difference(drawn(pipe, "a cat")[0], zeros) == 0 and difference(zeros, empty) > 0
    assert difference(drawn(pipe, "a cat", zero_negative=False)[0], empty) == 0
    assert difference(drawn(pipe, r"a \(cat\)")[0], pipe("a (cat)", **common).images[0]) < 0.1
    second = pipe("a cat", prompt_2="a dog", **common).images[0]
    assert difference(drawn(pipe, "a cat", prompt_2="a dog")[0], second) < 0.1 < difference(zeros, second)
    with pytest.raises(UserError, match="has one text encoder"):
        drawn(make_pipe(), "a cat", prompt_2="a dog")


@pytest.mark.slow
def test_a_trigger_with_brackets_is_read_as_it_was_learned(tmp_path: Path) -> None:
    pipe: Any = make_pipe()
    learner: Any = make_pipe()
    with_words(learner, Tokens("ink*", 1, "flat"))
    spec = formats.Spec(triggers=("[V]",))
    formats.save(tmp_path / "w.safetensors", {"text_encoder": learner.text_encoder}, "w", spec)
    before = drawn(pipe, "[V] cat")[0]
    adapters = Adapters(pipe)
    adapters.load(tmp_path / "w.safetensors")
    letters = drawn(pipe, r"\[V\] cat")[0]
    assert difference(drawn(pipe, "[V] cat")[0], letters) == 0 < difference(before, letters)


@pytest.mark.slow
def test_captions_with_brackets_are_drawn_as_they_are_learned(tmp_path: Path) -> None:
    """By the previews and by the command that a run ends with: letters, also those that boorus escape."""
    folder = draw_pictures(tmp_path / "pictures", 2)
    captions = {"blue cat b": r"miku \(vocaloid\), (red:1.3) [x]", "red apple a": r"{fox|owl} :\) a\b"}
    for name, caption in captions.items():
        (folder / f"{name}.txt").write_text(caption, "utf-8")
    told: list[Event] = []
    done = train(small(folder, tmp_path, steps=1, preview_steps=1, held_out=0), pipe=make_pipe(), observers=[told.append])
    (chosen,) = [event for event in told if isinstance(event, PreviewsChosen)]
    wanted = ["miku (vocaloid), (red:1.3) [x]", r"{fox|owl} :) a\b"]
    assert [pairs(parse(prompt)) for prompt in chosen.shown] == [[(text, 1.0)] for text in wanted]
    prompt = shlex.split(done.next_command)[2]
    assert pairs(parse(Wildcards().draw(prompt, 0))) in [[(text, 1.0)] for text in wanted]


LONG_CAPTION = "a red apple, a blue cat " * 14


@pytest.mark.slow
def test_captions_of_any_length_are_learned_as_they_are_drawn(tmp_path: Path) -> None:
    folder = draw_pictures(tmp_path / "pictures")
    captions = [LONG_CAPTION, r"a (red) cat \(ink\)", "a dog", LONG_CAPTION * 2, "a [flat:2) style", ""]
    for picture, caption in zip(sorted(folder.glob("*.png")), captions, strict=True):
        picture.with_suffix(".txt").write_text(caption, "utf-8")
    told: list[Event] = []

    def task(**changes: Any) -> DiffusionTask:
        pipe = with_means(make_pipe())
        config = small(folder, tmp_path, missing_captions="empty", **changes)
        prepared = prepare(config, pipe, told.append, TrainingPictures())
        parts = {"unet": pipe.unet, **({"text_encoder": pipe.text_encoder} if len(config.components) > 1 else {})}
        for part in parts.values():
            site.attach(part, NAME, method("lora", rank=2))
        return diffusion_task(prepared, blocks(prepared.config), Processes())

    whole = task()
    assert whole.embeddings is not None
    lengths = {prompt: whole.embeddings[prompt][0].shape[0] // 77 for prompt in whole.embeddings}
    assert [lengths[one.strip()] for one in captions] == [2, 1, 1, 3, 1, 1]
    literal = denoiser_of(whole.pipe).text.read_as(Reading("none"))
    with torch.no_grad():
        (expected,) = literal.encode([LONG_CAPTION.strip()])
    assert torch.equal(whole.embeddings[LONG_CAPTION.strip()][0], expected[0])
    together = whole.embeddings.stack([captions[2], LONG_CAPTION.strip()])[0]
    assert together.shape == (2, 154, 32) and torch.equal(together[0, :77], together[0, 77:])
    # Both ways of telling a batch of several lengths give the same loss: cached, and encoded at each step.
    trained = task(components="unet,text_encoder")
    assert trained.embeddings is None
    for step in range(3):
        losses = [one.loss(one.inputs(step, 0)).item() for one in (whole, trained)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    # Brackets are letters unless they are asked for; an escaped one is a bracket in any case.
    bracket = make_pipe().tokenizer("a (red) cat (ink)", padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(trained.text.tokenized([captions[1]])["ids_0"], bracket)
    weighted = task(weighted_captions=True)
    assert weighted.embeddings is not None
    assert (weighted.embeddings[captions[1]][0] - by_a1111(weighted.pipe, captions[1])[0][0]).abs().max() < 1e-5
    assert not [event for event in told if isinstance(event, Warned) and "of which the rest is not seen" in event.message]
    cut = task(max_tokens="150")
    assert cut.embeddings is not None and cut.embeddings[(LONG_CAPTION * 2).strip()][0].shape[0] == 154
    (warned,) = [event for event in told if isinstance(event, Warned) and "of which the rest is not seen" in event.message]
    assert "1 prompt over 150 tokens" in warned.message


def test_pictures_of_the_class_stand_beside_captions_of_other_lengths(tmp_path: Path) -> None:
    one = {"hidden": torch.ones(1, 154, 2), "ids_0": torch.ones(1, 77), "emphasis_0": torch.full((1, 77), 2.0)}
    other = {"hidden": torch.zeros(2, 231, 2), "ids_0": torch.zeros(2, 154)}
    found = prompts_together(one, other)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "hidden": (3, 462, 2), "ids_0": (3, 154), "emphasis_0": (3, 154)
    }  # fmt: skip
    assert found["emphasis_0"].tolist() == [[2.0] * 154, *[[1.0] * 154] * 2]


@pytest.mark.parametrize(
    ("make", "own", "of_kohya", "told"),
    [
        (make_pipe, None, "2", 1), (make_pipe, None, "1", 0), (make_pipe, 2, "2", 1), (make_pipe, None, "None", 0),
        (make_xl_pipe, None, "1", 0), (make_xl_pipe, None, "2", 0), (make_xl_pipe, 1, "1", 1), (make_xl_pipe, 2, "2", 0),
    ],
)  # fmt: skip
def test_a_clip_skip_of_kohya_counts_where_it_had_an_effect(make: Any, own: int | None, of_kohya: str, told: int) -> None:
    """sd-scripts writes down what its window has by default, and warns that it does nothing for Stable Diffusion XL."""
    header = SimpleNamespace(metadata={"ss_clip_skip": of_kohya})
    spec = None if own is None else SimpleNamespace(training={"clip_skip": own})
    notes: list[Event] = []
    plan: Any = SimpleNamespace(path=Path("a.safetensors"), header=header, spec=spec)
    tell_clip_skip(make(), [plan], GenerateConfig("a"), notes.append)
    assert len(notes) == told


@pytest.mark.slow
def test_clip_skip_of_a_run_is_in_its_file_and_told_where_another_layer_draws(tmp_path: Path) -> None:
    folder = draw_pictures(tmp_path / "pictures")
    asked = {"missing_captions": "name", "steps": 1, "clip_skip": 2, "max_tokens": "225", "preview_steps": 1}
    pipe: Any = make_pipe()
    result = train(small(folder, tmp_path, **asked), pipe=pipe)
    with safe_open(result.output, "pt") as file:
        told = file.metadata()
    assert (told["ss_clip_skip"], told["ss_max_token_length"]) == ("2", "225")
    notes: list[Event] = []
    drawn = {}
    for skip in (None, 2):
        config = GenerateConfig(
            ("a cat",), adapter=(str(result.output),), clip_skip=skip, steps=2, output=tmp_path / f"{skip}.png", device="cpu"
        )
        (drawn[skip],) = generate(config, pipe=make_pipe(), observers=[notes.append])
    said = [event.message for event in notes if isinstance(event, Noted) and "clip skip" in event.message]
    assert len(said) == 1 and "was trained with clip skip 2, and 1 draws; --clip-skip 2 draws as it was" in said[0]
    assert difference(drawn[None].image, drawn[2].image) > 0
    assert drawn[2].recipe.clip_skip == 2 and "Clip skip: 2" in drawn[2].recipe.parameters()
    (again,) = generate(
        GenerateConfig(recipe=tmp_path / "2.png", output=tmp_path / "again.png", device="cpu"), pipe=make_pipe()
    )
    assert difference(again.image, drawn[2].image) == 0
