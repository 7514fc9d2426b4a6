"""The scripts that compare ways of composing: volumes, judges, which ways there are, their data, and what is told."""

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from peft_diffusion.bases import embedded
from peft_diffusion.evaluation.drawings import pixels_of
from peft_diffusion.generation.compositions import COMPOSITIONS, LEARNED
from peft_diffusion.generation.compositions.switch import Switch
from peft_diffusion.tools.tool_settings import How
from peft_diffusion.training.settings.composing import Kind
from scripts import compare_beside, compare_blends
from scripts.blends import curves, judges, make_data, ways
from scripts.blends.trained import BESIDE, config_of
from scripts.build_base.make_samples import HELD_OUT
from scripts.compare_beside import BOTH, PLAIN, AtEqualStyle, Compared, Course, Job
from scripts.compare_blends import PAIRS, Found, points_of, report
from scripts.measuring import in_processes


def test_volume_is_that_of_the_boxes_below_the_points() -> None:
    assert curves.volume(np.array([[1.0, 1.0, 1.0]])) == 1.0
    # Above half of the prompt there is the first box alone, 1 x 0.5; below it both, 1 x 0.5 + 0.5 x 0.5.
    points = np.array([[1.0, 0.5, 1.0], [0.5, 1.0, 0.5]])
    assert curves.volume(points) == pytest.approx(0.5 * 0.5 + 0.5 * 0.75)
    more = np.vstack([points, [0.4, 0.9, 0.4], [1.0, 0.5, 0.9]])  # each has less of all than another one
    assert curves.volume(more[::-1]) == pytest.approx(curves.volume(points))


def scores(*points: tuple[float, float, float], seeds: int = 4) -> curves.Scores:
    """Points that vary a little from seed to seed, each of two prompts, after both ends."""
    means = np.array([(0.9, 0.1, 0.6), (0.2, 0.7, 0.6), *points])
    chance = np.random.default_rng(len(points))
    found: curves.Scores = means[:, None, None] + 0.01 * chance.standard_normal((len(means), seeds, 2, 3))
    return found


def test_likenesses_count_from_the_other_end_to_the_own_one() -> None:
    plain = scores((0.5, 0.5, 0.2))
    first, second, between = curves.scaled(plain, plain).mean((1, 2))
    assert first[:2] == pytest.approx([1, 0]) and second[:2] == pytest.approx([0, 1])
    means = plain.mean((1, 2))
    assert between[0] == pytest.approx((means[2, 0] - means[1, 0]) / (means[0, 0] - means[1, 0]))
    assert between[2] == pytest.approx((1 + means[2, 2]) / 2)


@pytest.mark.slow
def test_differences_are_of_the_same_seeds() -> None:
    plain, better = scores((0.5, 0.4, 0.6)), scores((0.8, 0.65, 0.6))
    counted = [curves.scaled(one, plain) for one in (plain, better)]
    same, more = curves.above(counted[0], counted[0]), curves.above(counted[1], counted[0])
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert 0 < more.low < more.value < more.high
    assert more.value == pytest.approx(curves.volumes(counted[1]).value - curves.volumes(counted[0]).value)
    both = curves.together([(counted[1], counted[0]), (counted[0], counted[0])])
    assert both.value == pytest.approx(more.value / 2)
    place, most = curves.balanced(counted[1])
    assert place == 2 and most.value == pytest.approx(curves.reached(counted[1], range(4))[2, :2].min())


def test_no_composition_and_no_merge_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ways.every()
    assert {way.compose for way in found.values()} == set(COMPOSITIONS) - {LEARNED}
    assert {way.kind for way in found.values()} == {None, *get_args(Kind)}
    assert {way.how for way in found.values() if isinstance(way, ways.Merged)} == {*get_args(How)} - {"linear"}
    monkeypatch.setitem(COMPOSITIONS, "new", Switch())
    assert set(ways.every()) - set(found) == {"new"}


def test_merges_are_those_that_are_not_there(tmp_path: Path) -> None:
    chosen, pair = [ways.every()["merge ties"], ways.every()["switch"]], PAIRS[0]
    jobs = ways.merges(chosen, [pair], tmp_path)
    assert [job[1:] for job in jobs] == [(pair, "ties", share) for share in ways.SHARES]
    made = ways.merged_file(*jobs[2])
    made.parent.mkdir()
    made.touch()
    assert ways.merges(chosen, [pair], tmp_path) == [*jobs[:2], *jobs[3:]]


def test_a_character_comes_before_its_style() -> None:
    styles, character = PAIRS[0], next(pair for pair in PAIRS if pair.character)
    assert styles.strengths(0.25, 2.0) == {styles.first: 0.5, styles.second: 1.5}
    assert list(character.strengths(0.25, 1.0).items()) == [(character.second, 0.75), (character.first, 0.25)]


def disc(behind: str, colour: str = "#303030") -> Image.Image:
    """A disc on a plain background."""
    image = Image.new("RGB", (128, 128), behind)
    ImageDraw.Draw(image).ellipse((30, 30, 98, 98), fill=colour)
    return image


def test_backgrounds_are_told_by_the_border_and_made_white() -> None:
    names = ["yellow", "blue", "grey"]
    pixels = pixels_of([disc(f"#{judges.COLOURS[name]}") for name in names])
    assert judges.before(pixels, names).tolist() == [True] * 3
    assert judges.before(pixels, ["blue", "blue", "white"]).tolist() == [False, True, False]
    on_white = judges.plain(pixels)
    assert torch.equal(on_white[0], on_white[1]) and on_white[0, :, 0, 0].tolist() == [255] * 3
    assert torch.equal(on_white[:, :, 64, 64], pixels[:, :, 64, 64])


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> judges.StyleJudge:
    """A judge that knows the sample styles by a few of their drawings; of two it holds others back."""
    data = tmp_path_factory.mktemp("judged")
    for name in make_data.SAMPLES:
        pictures = sorted(embedded(f"styles/{name}").glob("*.webp"))
        kinds = {"known": pictures[:8], "held": pictures[8:14]} if name != "twemoji" else {"known": pictures[:8]}
        for kind, several in kinds.items():
            (data / "styles" / name / kind).mkdir(parents=True)
            for path in several:
                (data / "styles" / name / kind / path.name).write_bytes(path.read_bytes())
    return judges.StyleJudge(data, torch.device("cpu"))


@pytest.mark.slow
def test_the_judge_tells_drawings_that_it_does_not_know(judge: judges.StyleJudge) -> None:
    own, other = judge.held["openmoji"], judge.held["fluent-flat"]
    assert judge.trust("openmoji", "fluent-flat") > 0.8
    assert judge.nearest(own).count("openmoji") >= 5 and judge.nearest(other).count("fluent-flat") >= 4
    assert judge.likeness(own, "openmoji").mean().item() == pytest.approx(1, abs=1e-4)
    assert judge.likeness(other, "openmoji").mean().item() < 0.5


def test_data_of_a_style_parts_what_is_learned_known_and_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [*HELD_OUT, *(f"thing-{letter}" for letter in "abcdefghi"), "thing-a-1"]  # the last is a variant
    monkeypatch.setattr(make_data, "drawings", lambda style: [SimpleNamespace(name=name) for name in names])
    monkeypatch.setattr(make_data, "render", lambda style, name, size: Image.new("RGB", (size, size)))
    for name, count in {"SIZE": 4, "TRAINED": 3, "KNOWN": 4, "HELD": 2}.items():
        monkeypatch.setattr(make_data, name, count)
    shared = [HELD_OUT[0].replace("-", " "), *(f"thing {letter}" for letter in "abcde")]
    make_data.make_style("emojione", "emojione", tmp_path, shared, trains=True)
    folder = tmp_path / "styles" / "emojione"
    told = {kind: judges.captions(folder / kind) for kind in ("train", "known", "held")}
    assert told["train"] == [f"emojione emoji of a thing {letter}" for letter in "abc"]  # and nothing that is asked for
    assert len(told["known"]) == 4 and len(told["held"]) == 2
    assert {*told["known"], *told["held"]} == {f"thing {letter}" for letter in "defghi"}
    assert Image.open(folder / "known" / "000.webp").size == (4, 4)
    made = (folder / "train" / "metadata.jsonl").stat().st_mtime_ns
    make_data.make_style("emojione", "emojione", tmp_path, shared, trains=True)  # is there
    assert (folder / "train" / "metadata.jsonl").stat().st_mtime_ns == made


def test_adapters_are_trained_by_the_defaults_but_for_what_is_given(tmp_path: Path) -> None:
    options = argparse.Namespace(data=tmp_path, output=tmp_path, device="cpu", train_steps=7)
    made = config_of("openmoji", tmp_path / "a.safetensors", options, {"seed": 3, **BESIDE, "beside": ("b.safetensors",)})
    assert (made.steps, made.seed, made.beside_keep, made.run_dir) == (7, 3, 1.0, tmp_path / "runs" / "a")
    assert made.folder == (embedded("styles/openmoji"),)
    (own := tmp_path / "styles" / "openmoji" / "train").mkdir(parents=True)
    options.train_steps = None
    again = config_of("openmoji", tmp_path / "a.safetensors", options, {})
    assert again.folder == (own,) and (again.steps, again.beside) == (None, ())


@pytest.mark.slow
def test_what_processes_say_of_their_jobs_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    in_processes(str.strip, ["one", " ", "two"], 2, time.monotonic(), minutes=10)
    in_processes(str.strip, ["too late"], 1, time.monotonic() - 61, minutes=1)
    told = [line.split(" s  ") for line in capfd.readouterr().out.splitlines()]
    assert sorted(words for _, words in told) == ["one", "two"] and all(float(seconds) >= 0 for seconds, _ in told)


def options(output: Path, *others: Path) -> argparse.Namespace:
    """Those of a comparison of one point between both ends."""
    output.mkdir(exist_ok=True)
    return argparse.Namespace(output=output, others=list(others), points=1)


@pytest.mark.slow
def test_scores_of_runs_are_taken_and_told_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_blends, "_plot", lambda found, pair: None)
    pairs = [PAIRS[0], next(pair for pair in PAIRS if pair.character)]
    for pair, better in zip(pairs, (0.8, 0.3), strict=True):
        found = Found(options=options(tmp_path / pair.stem), began=0.0)
        found.scores[pair.name] = {
            "plain": torch.tensor(scores((0.5, 0.4, 0.6))),
            "switch": torch.tensor(scores((better, better, 0.6))),
        }
        found.keep()
    both = Found(options=options(tmp_path / "both", *(tmp_path / pair.stem for pair in pairs)), began=0.0)
    compare_blends._take(both)
    switch = ways.every()["switch"]
    assert all(both.measured(pair, switch) for pair in pairs) and not both.measured(PAIRS[1], switch)
    assert both.points[pairs[0].name]["switch"] == points_of(switch, both.options) == [*ways.ENDS, switch.points[0]]
    report(both, PAIRS)
    told = json.loads((tmp_path / "both" / "figures.json").read_text("utf-8"))
    of_styles, of_characters = (told["together"][kind]["switch"] for kind in ("pairs of styles", "with a character"))
    assert of_styles["low"] > 0 > of_characters["high"] and of_styles["pairs"] == 1
    (row,) = [line for line in (tmp_path / "both" / "table.md").read_text("utf-8").splitlines()[:4] if "switch" in line]
    assert "above, 1 pairs" in row and "below, 1 pairs" in row


def measured(first: float, second: float, alone: float = 1.0, told: float = 0.5) -> dict[str, Any]:
    """What was measured of two, three drawings each, whose losses rise by these shares; of the second alone too."""
    spread = (0.99, 1.0, 1.01)
    return {
        "first alone": {"losses": [1.0, 2.0, 3.0], "told": [0.5, 0.5]},
        "first both": {
            "losses": [(1 + first * one) * loss for one, loss in zip(spread, (1, 2, 3), strict=True)],
            "told": [told] * 2,
        },
        "second alone": {"losses": [alone, 2 * alone], "told": [0.5, 0.5]},
        "second both": {"losses": [alone * (1 + second * 0.99), 2 * alone * (1 + second * 1.01)], "told": [told] * 2},
    }


def test_rises_are_shares_and_the_answer_is_whether_a_third_is_gone() -> None:
    plain, own = measured(0.3, 0.06), measured(0.1, 0.05, alone=1.02, told=0.75)
    compared = Compared([plain, plain], [own, own])
    assert compared.rises([plain], "first") == pytest.approx([0.297, 0.3, 0.303])
    assert compared.less("first").mean == pytest.approx(0.3 * 2 / 3 - 0.1)
    assert compared.alone().mean == pytest.approx(0.02)
    assert compared.told("first", "both").mean == 0.25 and compared.told("second", "alone").mean == 0
    words = compared.words()
    assert words[:4] == ["+30.0% to +10.0%", "67%, yes", "+6.0% to +5.0%", "17%, no"]
    assert words[-2:] == ["50% to 75%", "50% to 75%"]


def at(strength: float, first: float, second: float, alone: float, told: float) -> dict[str, Any]:
    """What was measured of the same two with the second at another strength."""
    found = measured(first, second, alone)
    if strength != 1:
        del found["first alone"]  # which is measured once
    return {"strength": strength, **found, "second alone": {**found["second alone"], "told": [told] * 2}}


def test_at_equal_style_both_seconds_are_as_strong_as_that_takes() -> None:
    plain = measured(0.3, 0.06) | {"others": [at(0.8, 0.2, 0.1, 1.04, 0.4), at(0.4, 0.1, 0.3, 1.2, 0.2)]}  # in any order
    own = at(1.0, 0.1, 0.07, 1.02, 0.25) | {"others": [at(1.5, 0.2, 0.05, 1.1, 0.75)]}
    courses = Course.of([plain, plain]), Course.of([own, own])
    # By the loss: in the middle between 0.8 and 1, as its loss is. What is left is less than two thirds of 0.25.
    found = AtEqualStyle(*courses, "loss")
    assert found.words()[:3] == ["0.90, 1.00", "45%, 25%", "+0.0%"]
    assert found.rises("first")[0] == pytest.approx([0.2475, 0.25, 0.2525])
    assert found.rises("second")[0][0] == pytest.approx((1.04 * 1.099 + 1.0594) / 2 / 1.02 - 1)
    assert found.words()[3:5] == ["+25.0% to +10.0%", "60%, yes"]
    # By the judge: as many as of the one that was alone at 1, which is half of the way from 1 to 1.5.
    found = AtEqualStyle(*courses, "told")
    assert found.words()[:2] == ["1.00, 1.25", "50%, 50%"] and found.rises("first")[1][1] == pytest.approx(0.15)
    assert found.words()[3:5] == ["+30.0% to +15.0%", "50%, yes"]
    # Where it is never told as often, the one that was alone is weaker too.
    found = AtEqualStyle(courses[0], Course.of([own | {"others": [at(1.5, 0.2, 0.05, 1.1, 0.3)]}]), "told")
    assert found.words()[:2] == ["0.60, 1.50", "30%, 30%"]
    # Where it does better than the other one ever does, and where worse than that at the lowest strength that was measured.
    best = AtEqualStyle(courses[0], Course.of([at(1.0, 0.1, 0.07, 0.9, 0.9) | {"others": []}]), "loss")
    worst = AtEqualStyle(courses[0], Course.of([at(1.0, 0.1, 0.07, 1.5, 0.9) | {"others": []}]), "loss")
    assert (best.words()[0], worst.words()[0]) == ("1.00, 1.00", "0.40, 1.00")


def test_a_strength_at_which_as_many_are_told_is_not_missed_by_rounding() -> None:
    shares = {0.3: 1 / 2, 0.5: 1 / 2, 0.7: 1 / 2, 0.85: 0.8}
    plain = at(1.0, 0.3, 0.06, 1.0, 0.8) | {"others": [at(s, 0.2, 0.1, 1.0, told) for s, told in shares.items()]}
    own = at(1.0, 0.1, 0.07, 1.0, 0.1) | {"others": [at(1.25, 0.2, 0.05, 1.1, 1.0)]}
    found = AtEqualStyle(Course.of([plain] * 3), Course.of([own] * 3), "told")
    assert found.own.told(found.places[1]) > 0.8  # by the last digit, as it lies between two strengths
    assert found.plain.strength(found.places[0]) == pytest.approx(0.85)
    assert found.own.strength(found.places[1]) == pytest.approx(1 + 0.25 * 7 / 9)


def test_seeds_are_put_together_by_their_strengths() -> None:
    def of(seed: float, *strengths: float) -> dict[str, Any]:
        others = [at(s, 0.1, 0.1, seed + s, s) for s in strengths]
        return at(1.0, 0.1, 0.1, seed + 1.0, 1.0) | {"others": others}

    course = Course.of([of(0.0, 0.3, 0.5, 0.7), of(2.0, 0.7, 0.3, 1.0, 0.7)])  # --weaker was another with the second
    assert course.strengths == [0.3, 0.7, 1.0]
    for place, strength in enumerate(course.strengths):
        assert course.told(float(place)) == pytest.approx(strength)
        assert course.losses(float(place), "second alone")[0] == pytest.approx(1.0 + strength)
    assert all("first alone" in one for one in course.measured[2])


def test_every_variant_has_files_of_its_own_and_comes_after_what_it_needs() -> None:
    jobs = [Job(0, "a", "b", name) for name in compare_beside.VARIANTS]
    assert len({job.stem for job in jobs}) == len(jobs)
    given = {name: variant for name, variant in compare_beside.VARIANTS.items() if variant.given}
    assert all(variant.beside for variant in given.values())
    assert not compare_beside.VARIANTS[PLAIN].beside
    assert {variant.onto for variant in compare_beside.VARIANTS.values()} == {None, BOTH}


@pytest.mark.slow
def test_the_first_is_trained_anew_beside_the_file_of_another_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[str, str, Any]] = []

    def train(seed: int, style: str, file: Path, given: argparse.Namespace, more: Any) -> float:
        trained.append((style, file.name, more))
        return 0.0

    monkeypatch.setattr(compare_beside, "_train", train)
    given = argparse.Namespace(output=tmp_path, data=tmp_path)
    names = {
        variant: compare_beside._files(Job(3, "openmoji", "twemoji", variant), given) for variant in compare_beside.VARIANTS
    }
    assert [path.name for path in names[PLAIN]] == ["3_openmoji.safetensors", "3_twemoji.safetensors"]
    then = names["keep, dropout, then the first"]
    assert then[1] == names[BOTH][1] and then[0] not in {files[0] for name, files in names.items() if files is not then}
    ((style, _, more),) = [one for one in trained if one[1] == then[0].name]
    assert style == "openmoji" and more["beside"] == (str(then[1]),)
    assert all(prompt.startswith("twemoji emoji of ") for prompt in more["beside_prompt"])
    basis = [more["option"] for *_, more in trained if "option" in more]
    assert basis == [("init=orthogonal", "basis_part=0"), ("init=orthogonal", "basis_part=1")]
    # The second of both is the file of the other variant: it was trained once, for that, beside the first that was alone.
    ((style, _, more),) = [one for one in trained if one[1] == then[1].name]
    assert style == "twemoji" and more["beside"] == (str(names[PLAIN][0]),)
