"""Evaluation: statistics against known values, judges on real drawings, losses and curves against what they are made of."""

import json
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import judges_of_transformers
import numpy as np
import pytest
import torch
from conftest import make_pipe, make_xl_pipe
from diffusers import DiffusionPipeline
from making import make_adapter
from PIL import Image
from safetensors.torch import save_file

from peft_diffusion import Adapters, PictureLosses, UserError
from peft_diffusion.bases import embedded, load_base
from peft_diffusion.cli.app import main
from peft_diffusion.core.events import Event, Noted, Warned
from peft_diffusion.data.folder import scan
from peft_diffusion.data.images import open_picture
from peft_diffusion.evaluation.bench import Bench
from peft_diffusion.evaluation.evaluate import _case, _together, evaluate
from peft_diffusion.evaluation.gallery import at_most, decoded, encoded, prompt_of, read_gallery
from peft_diffusion.evaluation.intervals import Estimate, below, estimate, estimate_share, quantile
from peft_diffusion.evaluation.judge import Judge
from peft_diffusion.evaluation.judges import judge_of
from peft_diffusion.evaluation.judging import BASE, Copies, Taught, Verdicts
from peft_diffusion.evaluation.measured import MEASURES, Evaluation, GoTogether, written
from peft_diffusion.evaluation.settings import EvaluateConfig
from peft_diffusion.evaluation.styles import Styles
from peft_diffusion.evaluation.subjects import KnownSubjects, key_of
from peft_diffusion.formats import Spec
from peft_diffusion.generation.settings import Sampling
from peft_diffusion.training.loop.seeds import generator
from peft_diffusion.training.record import charts
from peft_diffusion.training.tasks import diffusion
from peft_diffusion.training.tasks.diffusion import DiffusionSettings, DiffusionTask
from peft_diffusion.training.watch.strength import suggest

SAMPLES = ("openmoji", "twemoji", "fluent-flat")
DRAWS = 2


@pytest.fixture(scope="module")
def icons() -> Judge:
    return judge_of("icons")


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[Image.Image]]:
    """Twelve real drawings of each sample style, of the same subjects."""
    folders = {name: embedded(f"styles/{name}") for name in SAMPLES}
    return {name: [open_picture(one.path) for one in scan(folder).pictures[:12]] for name, folder in folders.items()}


# Statistics.


@pytest.mark.parametrize("lowest", [0.3, 0.6, 0.85, 1.1, 1.35])
def test_the_suggested_strength_is_where_the_loss_is_lowest(lowest: float) -> None:
    found = suggest(lambda strength: 1 + (strength - lowest) ** 2, 1 + lowest**2, 1 + (1 - lowest) ** 2)
    assert found.strength == pytest.approx(lowest, abs=0.026)


@pytest.mark.parametrize(
    ("freedom", "wanted"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (10, 2.2281), (30, 2.0423), (120, 1.9799)],
)
def test_quantiles_of_t_are_those_of_tables(freedom: int, wanted: float) -> None:
    assert quantile(0.975, freedom) == pytest.approx(wanted, abs=5e-5)
    assert below(wanted, freedom) == pytest.approx(0.975, abs=1e-5)


def test_an_interval_is_t_times_the_standard_error() -> None:
    """Student's sleep data (1908), whose interval R's ``t.test(extra, conf.level=0.95)`` gives for the second drug."""
    found = estimate([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])
    assert (found.mean, found.low, found.high) == pytest.approx((2.33, 0.8976775, 3.7623225), abs=1e-6)
    assert estimate([0.25]) == Estimate(0.25, None, 1)
    with pytest.raises(ValueError):
        estimate([])


def test_what_is_no_number_is_neither_drawn_nor_written_as_one() -> None:
    points, ends = [(-1.0, 0.5), (0.0, math.nan), (1.0, 0.7)], [(0.4, 0.6), (math.nan, math.nan), (0.6, 0.8)]
    drawn = charts.lines([charts.Curve("loss", points, "second", dots=True, ends=ends)], "loss", over="strength")
    assert drawn.count("<circle") == 2 and "strength -1: 0.5" in drawn and "nan" not in drawn
    assert estimate([math.nan, 1.0]).plain() == {"mean": None, "half": None, "count": 2}


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "pictures"), [(4, 4), (4, 1), (3, 8), (10, 2)])
@pytest.mark.parametrize("truth", [0.6, 0.9, 0.97])
def test_intervals_of_shares_hold_the_truth_as_often_as_they_say(seeds: int, pictures: int, truth: float) -> None:
    shares = np.random.default_rng(0).binomial(pictures, truth, (400, seeds)) / pictures
    found = [estimate_share(row.tolist(), pictures) for row in shares]
    assert np.mean([one.low <= truth <= one.high for one in found]) > 0.93
    assert estimate_share([0.5, 1.0, 0.75, 0.75], 4) == estimate([0.5, 1.0, 0.75, 0.75])  # which differ more than by chance
    end = estimate_share([0.75] * 4, 4).low  # where the score of the share that was found is that of the confidence
    assert (0.75 - end) / math.sqrt(end * (1 - end) / 16) == pytest.approx(1.959964, abs=1e-5)
    assert estimate_share([1.0] * 4, 4).low == pytest.approx(0.794093, abs=1e-5)  # R's binom.test(16, 16)
    assert estimate_share([0.75], 4) == Estimate(0.75, None, 1)


def test_the_interval_of_a_share_is_one_of_a_share() -> None:
    half = estimate([1.0, 0.75])
    assert half.low < 0 and MEASURES["style"].ends(half) == (0.0, 1.0) and written(half, MEASURES["style"]) == "88% ±100"
    assert MEASURES["likeness"].ends(half) == (half.low, half.high)
    assert written(Estimate(0.123, 0.0456, 3), MEASURES["loss"]) == "0.123 ±0.046"


# Judges.


@pytest.mark.slow
def test_styles_are_told_by_drawings_that_the_judge_was_not_shown(icons: Judge, drawn: dict[str, list[Image.Image]]) -> None:
    known = Styles({name: icons.style(images[:6]) for name, images in drawn.items()})
    for name, images in drawn.items():
        assert known.told(icons.style(images[6:])) == [name] * 6
    assert set(known.trust().values()) == {1.0}
    names = icons.names(drawn["fluent-flat"])
    assert names == ["fluent-emoji-flat"] * 12


def test_a_judge_that_leaves_a_picture_out_never_saw_it() -> None:
    """Two styles that differ in nothing: whoever keeps the picture finds itself nearer to its own."""
    rows = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    known = Styles({"ink": rows[:3], "flat": rows[3:]})
    assert known.told(rows[:3]) == ["ink"] * 3
    others = Styles({"ink": rows[1:3], "flat": rows[3:]})
    assert known.left_out("ink")[0] == others.told(rows[:1])[0]
    assert known.trust()["ink"] < 1


def test_likeness_goes_along_the_line_between_two_styles() -> None:
    known = Styles({"base": torch.tensor([[0.0, 1.0], [0.0, 3.0]]), "ink": torch.tensor([[4.0, 1.0], [4.0, 3.0]])})
    given = torch.tensor([[0.0, 2.0], [4.0, 2.0], [1.0, 2.0], [6.0, 2.0]])
    assert known.likeness(given, "ink", "base").tolist() == pytest.approx([0.0, 1.0, 0.25, 1.5])


@pytest.mark.slow
def test_subjects_are_told_across_hands(icons: Judge, drawn: dict[str, list[Image.Image]]) -> None:
    words = [one.caption for one in scan(embedded("styles/openmoji")).pictures[:12]]
    subjects = [key_of(one.removeprefix("openmoji emoji of")) for one in words]
    assert key_of("An open  Book,") == "open book"
    known = KnownSubjects()
    known.add(subjects, icons.subject(drawn["openmoji"]))
    assert known.trust() is None and known.nearest == 1
    pictures = scan(embedded("styles/twemoji")).pictures[:12]
    other = [one.caption.removeprefix("twemoji emoji of") for one in pictures]
    assert sum(known.right(icons.subject(drawn["twemoji"]), other)) >= 10
    known.add(other, icons.subject(drawn["twemoji"]))
    trust = known.trust()
    assert trust is not None and trust[1] == 24 and trust[0] > 0.8


@pytest.mark.slow
def test_copies_are_found(icons: Judge, drawn: dict[str, list[Image.Image]]) -> None:
    copies = [one.resize((100, 100)) for one in drawn["openmoji"][:3]]
    marks = icons.marks(drawn["openmoji"])
    apart = icons.apart(icons.marks(copies), marks)
    assert apart.argmin(1).tolist() == [0, 1, 2]
    assert float(apart.amin(1).max()) < 0.3 * float(apart.median())
    assert icons.apart(marks[:1], marks[:1]).item() == 0


# Real pictures.


SUBJECTS = ("a cat", "a red house", "an old tree", "a fish", "a ship", "a key")


def _folder(path: Path, places: range, words: str = "ink drawing of", size: int = 64) -> Path:
    path.mkdir(parents=True)
    for number in places:
        subject = SUBJECTS[number % 6]
        noise = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(number)).byte().numpy()
        Image.fromarray(noise).resize((size, size)).save(path / f"{number}.png")
        (path / f"{number}.txt").write_text(f"{words} {subject}\n")
    return path


@pytest.fixture(scope="module")
def ink(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _folder(tmp_path_factory.mktemp("evaluation") / "ink", range(4))


@pytest.mark.slow
def test_words_that_call_an_adapter_are_taken_out(ink: Path, tiny_pipe: DiffusionPipeline) -> None:
    gallery = read_gallery(ink, "ink", tiny_pipe)
    assert gallery.words[0] == "ink drawing of"
    assert gallery.subjects == ["a cat", "a red house", "an old tree", "a fish"]
    called = read_gallery(ink, "ink", tiny_pipe, spec=Spec(triggers=("sks",)))
    assert called.captions[0] == "sks, ink drawing of a cat" or called.captions[0].startswith("sks")
    assert called.subjects == gallery.subjects
    assert replace(gallery, triggers=("red",)).without_words("Red pinkred ink, red") == "pinkred ink"
    assert at_most(gallery, 2).captions == (gallery.captions[0], gallery.captions[2])
    assert gallery.some(2) == [0, 2] and gallery.some(9) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("training", "triggers", "caption", "prompt"),
    [
        ({}, (), "a cat\na kitten", "a cat"),
        (
            {"caption_prefix": "ink drawing of", "caption_suffix": ", on paper"},
            (),
            "a cat",
            "ink drawing of a cat, on paper",
        ),
        ({"caption_prefix": "ink drawing of"}, (), "ink drawing of a cat", "ink drawing of a cat"),
        ({"trigger": "sks"}, ("sks",), "a cat", "sks, a cat"),
        ({"trigger": "sks"}, ("sks",), "a cat of sks", "a cat of sks"),
        ({"trigger": "ink"}, ("ink",), "a pink cat", "ink, a pink cat"),
        ({"trigger": "ink"}, ("ink",), "Ink cat", "Ink cat"),
        ({"caption_template": ["{caption} by {trigger}"], "trigger": "ink"}, ("ink",), "a sink", "a sink by ink"),
        ({"caption_template": ["{caption} by {trigger}"], "trigger": "sks"}, ("sks",), "a cat", "a cat by sks"),
        ({"caption_prefix": 3, "caption_template": "many", "wildcards": True}, (), "a {red|blue} cat", "a red cat"),
    ],
)
def test_captions_become_prompts_as_they_did_in_training(
    training: dict[str, Any], triggers: tuple[str, ...], caption: str, prompt: str
) -> None:
    assert prompt_of(caption, Spec(training=training, triggers=triggers)) == prompt


@pytest.mark.slow
def test_pictures_that_were_trained_on_are_left_out(ink: Path, tiny_pipe: DiffusionPipeline) -> None:
    digests = [one.digest for one in scan(ink).pictures]
    told: list[Event] = []
    gallery = read_gallery(ink, "ink", tiny_pipe, without=set(digests[:1]), tell=told.append)
    assert [one.digest for one in gallery.pictures] == digests[1:]
    assert isinstance(told[0], Warned) and "1 of 4 pictures were trained on" in told[0].message
    with pytest.raises(UserError, match="all 4 pictures were trained on"):
        read_gallery(ink, "ink", tiny_pipe, without=set(digests))


def test_what_is_left_out_of_a_folder_is_told(tiny_pipe: DiffusionPipeline, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "ink", range(3))
    (folder / "2.png").write_bytes((folder / "1.png").read_bytes())
    (folder / "3.png").write_bytes(b"no picture")
    told: list[Event] = []
    assert len(read_gallery(folder, "ink", tiny_pipe, tell=told.append).pictures) == 2
    warned = " ".join(one.message for one in told if isinstance(one, Warned))
    assert "the same content as" in warned and "3.png" in warned
    (folder / "0.txt").unlink()
    with pytest.raises(UserError, match=r"0\.png: .* Write one beside it: prompts are made of captions$"):  # by no option
        read_gallery(folder, "ink", tiny_pipe)


# The bench.


@pytest.fixture(scope="module")
def files(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("evaluated")
    return {
        name: make_adapter(folder / f"{name}.safetensors", tiny_base, seed, size=0.3)
        for seed, name in enumerate(("ink", "flat"), 1)
    }


@pytest.mark.slow
@torch.no_grad()
def test_a_loss_is_what_the_network_answers_to_fixed_noise(
    files: dict[str, Path], ink: Path, tiny_pipe: DiffusionPipeline
) -> None:
    adapters = Adapters(tiny_pipe)
    for name, file in files.items():
        adapters.load(file, name=name)
    gallery = read_gallery(ink, "ink", tiny_pipe)
    examples = encoded(gallery, tiny_pipe)
    found = Bench(adapters, Sampling(("a",), batch_size=3), (0,)).losses(examples, {"flat": 0.5})
    adapters.set(ink=0.0, flat=0.5)
    pipe: Any = tiny_pipe
    powers = pipe.scheduler.alphas_cumprod
    wanted = []
    for place, caption in enumerate(gallery.captions):
        hidden = pipe.encode_prompt(caption, pipe.device, 1, False)[0]
        latents = examples.latents.entries[place].mean[None] * pipe.vae.config.scaling_factor
        own = []
        for draw in range(8):
            chance = generator("held out", place, draw)
            noise = torch.randn(latents.shape, generator=chance)
            time = ((draw + torch.rand(1, generator=chance)) / 8 * len(powers)).long()
            noisy = powers[time].sqrt() * latents + (1 - powers[time]).sqrt() * noise
            own.append((pipe.unet(noisy, time, hidden).sample - noise).square().mean().item())
        wanted.append(sum(own) / 8)
    assert found == pytest.approx(wanted, rel=1e-4)
    back = decoded(examples.latents, tiny_pipe)
    assert [one.size for one in back] == [(64, 64)] * 4


# The whole command.


class _Paper(Judge):
    """Sees no more than mean colours, and reads the number of letters: what it says can be computed by hand."""

    name = "paper"

    def style(self, images: Any) -> torch.Tensor:
        return torch.tensor([[sum(image.convert("L").tobytes()) / (image.width * image.height)] for image in images])

    def subject(self, images: Any) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.cat([self.style(images), torch.ones(len(images), 1)], 1))

    def words(self, texts: Any) -> torch.Tensor:
        rows = torch.tensor([[float(len(text)), 1.0] for text in texts])
        return torch.nn.functional.normalize(rows)

    def names(self, images: Any) -> None:
        return None

    def marks(self, images: Any) -> torch.Tensor:
        return self.style(images)

    def apart(self, marks: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        return (marks - known.T).abs()


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of few noises: of how many, and of which, is compared by a test of its own."""
    monkeypatch.setattr(diffusion, "_DRAWS", DRAWS)


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _folder(tmp_path_factory.mktemp("evaluation") / "flat", range(10, 14), "flat drawing of")


@pytest.fixture(scope="module")
def evaluated(
    files: dict[str, Path], ink: Path, flat: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Evaluation, EvaluateConfig, list[Event]]:
    """Two adapters by the real judge, of which one's training pictures are known."""
    trained = _folder(tmp_path_factory.mktemp("trained") / "ink", range(2, 8))  # two of which are among the others
    config = EvaluateConfig(
        tuple(map(str, files.values())), data=(str(ink), f"flat={flat}"), trained=f"ink={trained}", against=str(flat),
        strengths="0,1", seeds=2, prompts=2, base=str(tiny_base), device="cpu", steps=2, guidance=1,
        output=tmp_path_factory.mktemp("out") / "found",
    )  # fmt: skip
    told: list[Event] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(diffusion, "_DRAWS", DRAWS)
        return evaluate(config, observers=[told.append]), config, told


@pytest.mark.slow
def test_everything_is_measured_and_written(evaluated: tuple[Evaluation, EvaluateConfig, list[Event]]) -> None:
    found, config, told = evaluated
    ink, flat = found.alone
    usual = {"loss", "fall", "style", "likeness", "subject", "leak", "moved"}
    assert set(ink.values) - {"named"} == usual | {"nearness", "copies"} and set(flat.values) - {"named"} == usual
    assert all(list(one) == [0.0, 1.0] for own in found.alone for one in own.values.values())
    assert ink.unseen == 2 and ink.values["loss"][1.0].count == 2 and ink.values["style"][1.0].count == 2
    assert ink.values["fall"][0.0] == Estimate(0.0, 0.0, 2) and ink.values["moved"][0.0].mean == 0.0
    assert ink.values["loss"][0.0] != ink.values["loss"][1.0] and ink.values["moved"][1.0].mean > 0
    assert ink.prompts[0] == "ink drawing of a cat" and ink.leak_prompts[0] == "a cat"
    assert [(one.own, one.other) for one in found.interference] == [("ink", "flat"), ("flat", "ink")]
    assert set(found.trust.styles) == {"ink", "flat", "flat 2", BASE} and found.trust.styles[BASE][1] == 8
    messages = [one.message for one in told if isinstance(one, (Warned, Noted))]
    assert any("2 of 4 pictures were trained on" in one for one in messages)
    assert any("flat: what it was trained on is not known" in one for one in messages)
    plain = json.loads((config.output / "figures.json").read_text())
    assert plain["adapters"][0]["measures"]["loss"][1] == {"strength": 1.0, **ink.values["loss"][1.0].plain()}
    (pair,) = found.together
    assert list(pair.strengths) == ["ink", "flat"] and all(0 <= share <= 1 for share in pair.strengths.values())
    assert plain["together"] == [pair.plain()] and pair.rise <= pair.rise_whole
    assert plain["interference"][1]["own"] == "flat" and plain["trust"]["styles"]["ink"]["count"] == 2
    assert Image.open(config.output / "ink.png").width > 128
    page = found.report.read_text()
    assert page.count("data:image/webp") == 2 and 'src="http' not in page
    assert "Distance to training pictures" in page and "flat on" in page
    assert "Strengths at which two go together" in page and pair.words() in page


@pytest.mark.slow
def test_copies_are_looked_for_among_all_that_was_trained_on(
    evaluated: tuple[Evaluation, EvaluateConfig, list[Event]], icons: Judge, tiny_base: Path, tmp_path: Path
) -> None:
    _, config, _ = evaluated
    tiny_pipe = load_base(str(tiny_base), device="cpu")
    adapters, choice = Adapters(tiny_pipe), config.choices()[0]
    name = adapters.load(make_adapter(tmp_path / "ink.safetensors", tiny_base, 1, ("sks",)), name="ink")
    told: list[Event] = []
    case = _case(replace(config, pictures=2, leak_prompts=("a Sks cat",)), choice, name, adapters, icons, told.append)
    assert [one for one in told if isinstance(one, Warned) and '"a Sks cat" calls ink by "sks"' in one.message]
    assert case.copies is not None and len(case.copies.trained) == 6 and len(case.images) == len(case.copies.unseen) == 2
    of_all = decoded(encoded(read_gallery(config.folders("trained")["ink"], "all", tiny_pipe), tiny_pipe).latents, tiny_pipe)
    assert case.copies(of_all)["nearness"] == 0.0


@pytest.mark.slow
@pytest.mark.usefixtures("few_draws")
def test_interference_is_the_loss_with_both_on_over_that_alone(
    evaluated: tuple[Evaluation, EvaluateConfig, list[Event]], files: dict[str, Path], flat: Path
) -> None:
    found, config, _ = evaluated
    adapters = Adapters(load_base(config.base, device="cpu"))
    for name, file in files.items():
        adapters.load(file, name=name)
    bench = Bench(adapters, config.sampling(), (0, 1))
    examples = encoded(read_gallery(flat, "flat", adapters.pipe), adapters.pipe)
    alone, both = bench.losses(examples, {"flat": 1.0}), bench.losses(examples, {"flat": 1.0, "ink": 1.0})
    wanted = estimate([after / before - 1 for after, before in zip(both, alone, strict=True)])
    told = found.interference[1].loss
    assert told is not None and told.mean == pytest.approx(wanted.mean, rel=1e-4)
    assert told.half == pytest.approx(wanted.half, rel=1e-3)
    assert found.alone[1].values["loss"][1.0].mean == pytest.approx(sum(alone) / 4, rel=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("few_draws")
def test_strengths_that_go_together_are_measured_by_the_losses_of_both(
    evaluated: tuple[Evaluation, EvaluateConfig, list[Event]], files: dict[str, Path], ink: Path, flat: Path
) -> None:
    """By losses that are measured here: what the evaluation told, and what a report suggests of the same pictures."""
    found, config, _ = evaluated
    adapters = Adapters(load_base(config.base, device="cpu"))
    for name, file in files.items():
        adapters.load(file, name=name, strength=0.5)
    bench = Bench(adapters, config.sampling(), ())
    seen = {one.digest for one in scan(config.folders("trained")["ink"]).pictures}
    galleries = {
        "flat": read_gallery(flat, "flat", adapters.pipe),
        "ink": read_gallery(ink, "ink", adapters.pipe, without=seen),
    }
    examples = {name: encoded(one, adapters.pipe) for name, one in galleries.items()}

    alone = {name: sum(bench.losses(own, {name: 1.0})) for name, own in examples.items()}
    base = {name: sum(bench.losses(own, {})) for name, own in examples.items()}

    def rise(amounts: dict[str, float]) -> float:
        return sum((sum(bench.losses(own, amounts)) - alone[name]) / base[name] for name, own in examples.items())

    (pair,) = found.together
    assert pair.rise_whole == pytest.approx(rise({"ink": 1.0, "flat": 1.0}), rel=1e-4, abs=1e-6)
    assert pair.rise == pytest.approx(rise(dict(pair.strengths)), rel=1e-4, abs=1e-6)
    adapters.set(ink=0.5, flat=0.5)
    before = adapters._registry.states()["unet"].strengths.values.clone()
    losses = PictureLosses.of(bench, galleries)
    told = adapters.report(losses=losses, names=["ink", "flat"], sampling=config.sampling())
    assert told.suggested == pair.strengths and told.excess == pytest.approx(pair.rise, rel=1e-4, abs=1e-6)
    assert torch.equal(adapters._registry.states()["unet"].strengths.values, before)
    stopped, few = threading.Event(), PictureLosses.of(bench, {"ink": galleries["ink"]})
    stopped.set()  # so that anything drawn ends as interrupted
    for prompts in ((), ["a cat"]):
        with pytest.raises(UserError, match="no pictures of flat; name a folder"):
            adapters.report(prompts, losses=few, sampling=config.sampling(), stop=stopped)
    with pytest.raises(UserError, match="pictures must be 1 or more"):
        PictureLosses.read(adapters, {"ink": ink}, pictures=0)


def test_two_adapters_whose_losses_are_no_numbers_cost_no_other_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Losses:
        def loss(self, name: str, amounts: dict[str, float]) -> float:
            return math.nan if {"a", "c"} <= amounts.keys() else 1 + sum((one - 0.8) ** 2 for one in amounts.values())

    monkeypatch.setattr(PictureLosses, "of", lambda *_: Losses())
    told: list[Event] = []
    base: Any = None
    bench = Bench(base, Sampling(), (), told.append)
    cases: list[Any] = [SimpleNamespace(name=one, gallery=None, at=lambda by, one=one: {one: by}) for one in "abc"]
    found = _together(cases, bench)
    assert [one.strengths for one in found] == [{"a": 0.8, "b": 0.8}, {"b": 0.8, "c": 0.8}]
    assert all(one.rise < one.rise_whole for one in found)
    (warned,) = (one.message for one in told if isinstance(one, Warned))
    assert warned.startswith("there are no strengths at which a and c go together: the loss of the pictures of a is nan")


def test_two_that_go_together_are_told_by_what_is_gained() -> None:
    strengths = {"ink": 0.75, "flat": 1.0}
    better = GoTogether(strengths, 0.014, 0.16).words()
    assert better == "ink and flat: ink at 0.75, flat at 1.00: 1.4% in place of 16.0%"
    assert GoTogether(dict.fromkeys(strengths, 1.0), 0.02, 0.02).words().endswith("better than whole ones, at 2.0%")


def test_folders_are_those_of_the_longest_name(tmp_path: Path) -> None:
    files = [str(tmp_path / f"{name}.safetensors") for name in ("a", "a=b")]
    for file in files:
        save_file({"lora_unet_conv_in.lora_up.weight": torch.zeros(1)}, file)
    for several in (files, files[::-1]):
        config = EvaluateConfig(tuple(several), data=("a=one", "a=b=two"))
        assert config.folders("data") == {"a": Path("one"), "a=b": Path("two")}


@pytest.mark.slow
def test_verdicts_are_what_a_judge_says_of_each_seed(ink: Path, tiny_pipe: DiffusionPipeline) -> None:
    """By a judge that sees mean colours alone, so that every figure is known."""

    def grey(*values: int) -> list[Image.Image]:
        return [Image.new("RGB", (8, 8), (value,) * 3) for value in values]

    judge = _Paper()
    gallery = read_gallery(ink, "ink", tiny_pipe)
    taught = Taught.of(judge, {"ink": (gallery, grey(200, 210, 190, 200))}, {})
    styles = Styles({**taught.features, BASE: judge.style(grey(100, 110, 90))})
    words = gallery.subjects[:2]
    found = Verdicts(taught, styles, "ink", words, gallery.subjects).of(grey(180, 120))
    assert found["style"] == 0.5 and found["likeness"] == pytest.approx((0.8 + 0.2) / 2)
    assert found["agreement"] > 0.9 and found["prompt"] in (0.0, 0.5) and "named" not in found
    met = Verdicts(taught, styles, "ink", words, gallery.subjects).met(grey(180, 180, 120), BASE)
    assert list(met) == pytest.approx([2 / 3, 1 / 3, 0.6])  # its own first, then the other's
    leak = Verdicts(taught, styles, "ink", words, gallery.subjects).leak(grey(200, 100), grey(100, 100))
    assert leak == {"leak": 0.5, "moved": pytest.approx(100 / 255 / 2)}
    copies = Copies.of(judge, judge.marks(grey(50, 60)), grey(70, 80))
    assert copies(grey(60, 90)) == {"nearness": pytest.approx(1.0), "copies": 0.5}
    assert copies(grey(60, 75))["copies"] == 0.5  # the second is farther than the nearest real picture, and no copy
    trust = taught.trust(styles)
    assert trust.styles == {"ink": (1.0, 4), BASE: (1.0, 3)} and trust.subjects is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"strengths": "0,much"}, "'much' is no number"),
        ({"judge_model": "a/b"}, "comes with the package"),
        ({"compose": "switch", "alone": True}, "adapters that meet"),
        ({"data": ()}, "real pictures to judge by"),
        ({"data": ("one",)}, "no folder for flat"),
        ({"data": ("one", "two", "three")}, "this is folder 3"),
        ({"data": ("flat=one", "two")}, "--data two is a second folder for flat"),
        ({"trained": ("ink=one", "ink=two")}, "--trained ink=two is a second folder for ink"),
        ({"judge": "clip", "judge_model": "nowhere"}, "no judge 'nowhere'"),
    ],
)
def test_what_cannot_be_evaluated_is_told_before_the_base_is_loaded(
    given: dict[str, Any], complaint: str, files: dict[str, Path], ink: Path, flat: Path, tmp_path: Path
) -> None:
    told = {"data": (str(ink), str(flat)), "output": tmp_path, "base": "nowhere", **given}
    with pytest.raises(UserError, match=complaint):
        evaluate(EvaluateConfig(tuple(map(str, files.values())), **told))


@pytest.mark.slow
@pytest.mark.usefixtures("few_draws")
def test_the_command_prints_tables(
    files: dict[str, Path], ink: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a way of composing that takes just two adapters, and makes no sum of which there were a loss."""
    told = ["--strengths", "1", "--seeds", "1", "--prompts", "1", "--steps", "2", "-o", str(tmp_path / "out")]
    plain = _folder(tmp_path / "plain", range(20, 23))
    for words in plain.glob("*.txt"):
        words.unlink()  # a style is told without
    given = ["--data", str(ink), str(ink), "--against", str(plain), "--base", str(tiny_base), "--device", "cpu"]
    code = main(["evaluate", *map(str, files.values()), *given, *told, "--compose", "k-lora"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert "style: told right without itself: ink" in shown.out and "falls by" in shown.out
    assert "style of the other: " in shown.out and "loss: by how much" not in shown.out
    assert (tmp_path / "out" / "report.html").is_file() and "pictures are drawn" in shown.err


# CLIP and DINOv2.


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "dino"])
def test_models_of_transformers_judge(kind: Any, tmp_path: Path, drawn: dict[str, list[Image.Image]]) -> None:
    folder = judges_of_transformers.clip(tmp_path) if kind == "clip" else judges_of_transformers.dino(tmp_path)
    judge = judge_of(kind, str(folder))
    images = drawn["openmoji"][:3]
    style, subject = judge.style(images), judge.subject(images)
    assert all(map(torch.equal, judge.both(images), (style, subject)))
    assert style.shape == (3, 32) and style.dtype == torch.float32
    assert subject.norm(dim=1).tolist() == pytest.approx([1.0] * 3)
    marks = judge.marks(images)
    assert judge.apart(marks, marks).diagonal().tolist() == pytest.approx([0.0] * 3, abs=1e-5)
    words = judge.words(["a cat", "a red house on the blue mat " * 40])
    if kind == "dino":
        assert words is None and judge.names(images) is None
    else:
        assert words is not None and words.shape == (2, subject.shape[1])
        assert words.norm(dim=1).tolist() == pytest.approx([1.0] * 2)
    other: Any = "dino" if kind == "clip" else "clip"
    with pytest.raises(UserError, match=f"--judge {other} takes a"):
        judge_of(other, str(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        judge_of(kind, str(folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [make_xl_pipe, lambda: make_pipe(in_channels=9), lambda: make_pipe(prediction_type="v_prediction")]
)
def test_losses_of_other_bases_are_those_of_training(make: Callable[[], DiffusionPipeline], ink: Path) -> None:
    """Of one that is told sizes, of one that is told masks, and of one that predicts v."""
    pipe = make()
    gallery = at_most(read_gallery(ink, "ink", pipe), 2)
    examples = encoded(gallery, pipe)
    found = Bench(Adapters(pipe), Sampling((), batch_size=4), (0,)).losses(examples, {})
    task = DiffusionTask(pipe, "", DiffusionSettings(batch_size=4), examples, examples)
    assert len(found) == 2 and sum(found) / 2 == pytest.approx(task.held_out(), rel=1e-5)
