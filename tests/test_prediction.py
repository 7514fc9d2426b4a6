"""What a base predicts: told by files, said by a person, and tested on the first pictures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pipe
from safetensors.torch import save_file
from test_export import spec_of
from test_training import draw_pictures, small

import peft_diffusion as pd
from peft_diffusion.api import train
from peft_diffusion.bases import single_file
from peft_diffusion.bases.noise import Prediction, noisy
from peft_diffusion.bases.unet import UNetDenoiser
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.events import Event, Warned
from peft_diffusion.training.tasks.prediction import Answers, fitting

pytestmark = pytest.mark.usefixtures("few_measurements", "no_plots")


@pytest.mark.parametrize("predicted", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("deviation", [0.3, 1.0, 1.7])
def test_the_best_answer_of_each_kind_is_known(predicted: Prediction, deviation: float) -> None:
    """Pictures are a known one and Gaussian noise, of which the best answer is a formula."""
    for trial in range(20):
        told, nothing = ask_the_best(predicted, deviation, torch.Generator().manual_seed(trial))
        assert told == predicted and nothing is None


def ask_the_best(
    predicted: Prediction, deviation: float, chance: torch.Generator
) -> tuple[Prediction | None, Prediction | None]:
    """What is made of the best answers, and of answers that are chance."""
    known = torch.randn(1, 4, 8, 8, generator=chance)
    answers = []
    for power in (0.03, 0.1):
        latents = known + deviation * torch.randn(1, 4, 8, 8, generator=chance)
        noise = torch.randn(1, 4, 8, 8, generator=chance)
        p = torch.tensor(power)
        given = noisy(latents, noise, p.view(1))
        gain = p.sqrt() * deviation**2 / (p * deviation**2 + 1 - p)
        best = known + gain * (given - p.sqrt() * known)  # the mean of the pictures that can be behind it
        answer = (given - p.sqrt() * best) if predicted == "epsilon" else (p.sqrt() * given - best)
        answers.append(Answers(answer / (1 - p).sqrt(), latents, noise, p))
    nothing = [Answers(torch.randn(1, 4, 8, 8, generator=chance), one.latents, one.noise, one.power) for one in answers]
    return fitting(answers), fitting(nothing)


@pytest.mark.parametrize(
    ("told", "marks", "expected"),
    [
        (None, (), "epsilon"), ("v", (), "v_prediction"), ("v_prediction", (), "v_prediction"), ("epsilon", (), "epsilon"),
        ("epsilon", ("v_pred", "ztsnr"), "v_prediction"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["sdxl", "sd2"])
def test_a_single_file_says_it_in_its_metadata_or_by_marks(
    tmp_path: Path, kind: str, told: str | None, marks: tuple[str, ...], expected: str
) -> None:
    tensors = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, 1024),
        # Of a norm that ComfyUI takes for that of a network which predicts v, where nothing is told.
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.tensor([0.2, -0.2] * 160),
        **{mark: torch.zeros(0) for mark in marks},
    }
    if kind == "sdxl":
        tensors["conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"] = torch.zeros(1280)
    file = tmp_path / "base.safetensors"
    save_file(tensors, file, {} if told is None else {"modelspec.prediction_type": told})
    schedule = single_file.architecture(file).configs()["scheduler"]
    guessed = "v_prediction" if kind == "sd2" and told is None else expected
    assert schedule.get("prediction_type", "epsilon") == guessed
    assert bool(schedule.get("rescale_betas_zero_snr")) == ("ztsnr" in marks)


@pytest.mark.slow
def test_what_a_person_says_goes_before_what_files_say(tmp_path: Path, tiny_base: Path) -> None:
    done = train(small(draw_pictures(tmp_path / "p"), tmp_path, base=str(tiny_base), prediction="v", steps=1))
    assert spec_of(done.output).base["prediction_type"] == "v_prediction"
    exported = pd.export(pd.ExportConfig(done.run_dir, output=tmp_path / "x.safetensors"))
    assert spec_of(exported).base == spec_of(done.output).base
    pipe: Any = pd.load_base(str(tiny_base), device="cpu", prediction="v")
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    told: list[str] = []
    pd.Adapters(pipe).load(done.output, warn=told.append)
    assert not told
    pd.Adapters(pd.load_base(str(tiny_base), device="cpu")).load(done.output, warn=told.append)
    assert any("predicts v_prediction, and this one says epsilon; --prediction" in line for line in told)
    with pytest.raises(UserError, match="loaded already, and its scheduler says that it predicts v_prediction"):
        pd.load_base(pipe, prediction="epsilon")


@pytest.mark.slow
@pytest.mark.parametrize("said", ["epsilon", "v_prediction"])
def test_a_base_that_answers_otherwise_than_it_says_is_warned_of_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    # With much noise the input is nearly the noise, which this network gives back.
    predict = UNetDenoiser.predict
    monkeypatch.setattr(UNetDenoiser, "predict", lambda *given: given[1] + 0 * predict(*given))
    told: list[Event] = []
    config = small(draw_pictures(tmp_path / "p"), tmp_path, steps=1)
    train(config, pipe=make_pipe(prediction_type=said), observers=[told.append])
    lines = [event.message for event in told if isinstance(event, Warned)]
    warned = [line for line in lines if "answers to noisy pictures as one that predicts epsilon" in line]
    assert len(warned) == (said == "v_prediction") and all("--prediction epsilon" in line for line in warned)
