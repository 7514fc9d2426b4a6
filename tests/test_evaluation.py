"""Evaluation: statistics against known values, judges on real drawings, losses and curves against what they are made of."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from making import make_adapter
from PIL import Image

from peft_diffusion import Adapters, UserError
from peft_diffusion.bases import embedded
from peft_diffusion.core.events import Event, Warned
from peft_diffusion.data.folder import scan
from peft_diffusion.data.images import open_picture
from peft_diffusion.evaluation.bench import Bench
from peft_diffusion.evaluation.gallery import at_most, decoded, encoded, read_gallery
from peft_diffusion.evaluation.intervals import Estimate, below, estimate, quantile
from peft_diffusion.evaluation.judge import Judge
from peft_diffusion.evaluation.judges import judge_of
from peft_diffusion.evaluation.styles import Styles
from peft_diffusion.evaluation.subjects import KnownSubjects, key_of
from peft_diffusion.generation.settings import Sampling
from peft_diffusion.training.loop.seeds import generator

SAMPLES = ("openmoji", "twemoji", "fluent-flat")


@pytest.fixture(scope="module")
def icons() -> Judge:
    return judge_of("icons")


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[Image.Image]]:
    """Twelve real drawings of each sample style, of the same subjects."""
    folders = {name: embedded(f"styles/{name}") for name in SAMPLES}
    return {name: [open_picture(one.path) for one in scan(folder).pictures[:12]] for name, folder in folders.items()}


# Statistics.


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


# Judges.


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


def test_copies_are_found(icons: Judge, drawn: dict[str, list[Image.Image]]) -> None:
    copies = [one.resize((100, 100)) for one in drawn["openmoji"][:3]]
    apart = icons.apart(copies, drawn["openmoji"])
    assert apart.argmin(1).tolist() == [0, 1, 2]
    assert float(apart.amin(1).max()) < 0.3 * float(apart.median())
    assert icons.apart(drawn["openmoji"][:1], drawn["openmoji"][:1]).item() == 0


# Real pictures.


def _folder(path: Path, count: int, size: int = 64) -> Path:
    path.mkdir(parents=True)
    for number, subject in enumerate(("a cat", "a red house", "an old tree", "a fish", "a ship", "a key")[:count]):
        noise = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(number)).byte().numpy()
        Image.fromarray(noise).resize((size, size)).save(path / f"{number}.png")
        (path / f"{number}.txt").write_text(f"ink drawing of {subject}\n")
    return path


@pytest.fixture(scope="module")
def ink(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _folder(tmp_path_factory.mktemp("evaluation") / "ink", 4)


def test_words_that_call_an_adapter_are_taken_out(ink: Path, tiny_pipe: DiffusionPipeline) -> None:
    gallery = read_gallery(ink, "ink", tiny_pipe)
    assert gallery.words[0] == "ink drawing of"
    assert gallery.subjects == ["a cat", "a red house", "an old tree", "a fish"]
    called = read_gallery(ink, "ink", tiny_pipe, triggers=("sks",))
    assert called.captions[0] == "sks, ink drawing of a cat" or called.captions[0].startswith("sks")
    assert called.subjects == gallery.subjects
    assert at_most(gallery, 2).captions == (gallery.captions[0], gallery.captions[2])
    assert gallery.some(2) == [0, 2] and gallery.some(9) == [0, 1, 2, 3]


def test_pictures_that_were_trained_on_are_left_out(ink: Path, tiny_pipe: DiffusionPipeline) -> None:
    digests = [one.digest for one in scan(ink).pictures]
    told: list[Event] = []
    gallery = read_gallery(ink, "ink", tiny_pipe, without=set(digests[:1]), tell=told.append)
    assert [one.digest for one in gallery.pictures] == digests[1:]
    assert isinstance(told[0], Warned) and "1 of 4 pictures were trained on" in told[0].message
    with pytest.raises(UserError, match="all 4 pictures were trained on"):
        read_gallery(ink, "ink", tiny_pipe, without=set(digests))


# The bench.


@pytest.fixture(scope="module")
def files(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("evaluated")
    return {
        name: make_adapter(folder / f"{name}.safetensors", tiny_base, seed, size=0.3)
        for seed, name in enumerate(("ink", "flat"), 1)
    }


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
