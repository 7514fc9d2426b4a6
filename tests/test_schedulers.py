"""Schedulers by the names of A1111, the noise levels that they step through, and adapters for few steps."""

import importlib
from collections.abc import Iterable
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import make_pipe
from diffusers import DDIMScheduler, DiffusionPipeline
from making import make_adapter
from PIL import Image

from peft_diffusion import Adapters, BlendConfig, GenerateConfig, UserError, blend, generate
from peft_diffusion.bases.schedulers import SCHEDULERS, canonical, label, label_of_class
from peft_diffusion.core.events import Event, Noted, Warned
from peft_diffusion.generation.distilled import KINDS
from peft_diffusion.generation.sampler import Cell, paint, scheduler_of
from peft_diffusion.generation.settings import Sampling

STEPS = 10


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("Euler a", "euler-a"), ("PLMS", "pndm"), ("DPM++ 2M Karras", "dpm++-karras"),
        ("DPM++ SDE Karras", "dpm++-sde-karras"),
        ("DPM++ 3M SDE Exponential", "dpm++-3m-sde-exponential"), ("DPM++ 2M SGM Uniform", "dpm++-trailing"),
        ("DPM2 a Karras", "dpm2-a-karras"), ("Euler Beta", "euler-beta"), ("dpmpp_2m_sde karras", "dpm++-2m-sde-karras"),
        ("euler_ancestral sgm_uniform", "euler-a-trailing"), ("uni_pc", "unipc"), ("LCM", "lcm"), ("dpm++-karras",) * 2,
        ("LMS Karras", "lms-karras"), ("euler simple", "euler-trailing"), ("heun normal", "heun-uniform"),
        ("LCM SGM Uniform", "lcm"), ("tcd-trailing", "tcd"),
    ],
)  # fmt: skip
def test_schedulers_have_the_names_of_other_programs(theirs: str, ours: str) -> None:
    assert Sampling(scheduler=theirs).scheduler == ours
    assert canonical(label(ours)) == ours


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("karras", "there is no scheduler 'karras'"), ("euler-a-karras-karras", "there is no scheduler"),
        ("", "there is no scheduler"), ("DPM++ 2S a Karras", "diffusers has no scheduler .* nearest here is dpm[+]{2}-sde"),
        ("DPM adaptive", "the nearest here is dpm"), ("dpmpp_2s_ancestral", "the nearest here is dpm"),
    ],
)  # fmt: skip
def test_a_scheduler_that_is_not_there_is_refused(wrong: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        Sampling(scheduler=wrong)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("PNDMScheduler", "PLMS"), ("DPMSolverMultistepScheduler", "DPM++ 2M"), ("LCMScheduler", "LCM"),
        ("LMSDiscreteScheduler", "LMS"), ("KDPM2AncestralDiscreteScheduler", "DPM2 a"), ("DDPMScheduler", "DDPM"),
        ("FlowMatchEulerDiscreteScheduler", "Euler"), ("DPMSolverSinglestepScheduler", "DPMSolverSinglestepScheduler"),
    ],
)  # fmt: skip
def test_a_base_of_its_own_scheduler_is_told_by_the_names_of_a1111(kind: str, told: str) -> None:
    assert label_of_class(kind) == told


@pytest.mark.parametrize("steps", [4, 7, 8, 25, 30])
def test_lcm_and_tcd_step_from_the_noisiest_by_themselves(steps: int, tiny_pipe: DiffusionPipeline) -> None:
    """So that "trailing" is no other name of theirs: its timesteps, to one share of their own 50 steps."""
    for name in ("lcm", "tcd"):
        found = scheduler_of(Adapters(tiny_pipe), [], Sampling(scheduler=f"{name}-trailing", steps=steps))
        found.set_timesteps(steps)
        wanted = np.round(np.arange(1000, 0, -1000 / steps)) - 1
        np.testing.assert_allclose(found.timesteps, wanted, atol=20)


def levels(pipe: DiffusionPipeline, name: str) -> Any:
    scheduler = scheduler_of(Adapters(pipe), [], Sampling(scheduler=name, steps=STEPS))
    scheduler.set_timesteps(STEPS)
    return scheduler


def ends(pipe: DiffusionPipeline) -> tuple[float, float]:
    """The largest noise level of Stable Diffusion and the smallest, as k-diffusion's wrapper has them."""
    config = pipe.scheduler.config
    betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000, dtype=torch.float64) ** 2
    powers = (1 - betas).cumprod(0)
    sigmas = ((1 - powers) / powers).sqrt()
    return float(sigmas[-1]), float(sigmas[0])


@pytest.mark.parametrize("name", ["euler", "lms", "dpm++", "dpm++-sde", "dpm++-2m-sde", "dpm++-3m-sde"])
def test_noise_levels_are_spaced_as_k_diffusion_spaces_them(name: str, tiny_pipe: DiffusionPipeline) -> None:
    """Its ``get_sigmas_karras`` and ``get_sigmas_exponential``, and A1111's beta, over the whole range of the model."""
    largest, smallest = ends(tiny_pipe)
    if name == "lms" and find_spec("scipy") is None:
        with pytest.raises(UserError, match="lms-karras needs scipy: pip install scipy"):
            levels(tiny_pipe, "lms-karras")
        return
    assert largest == pytest.approx(14.6146, abs=1e-3) and smallest == pytest.approx(0.0292, abs=1e-4)
    ramp, rho = np.linspace(0, 1, STEPS), 7.0
    karras = (largest ** (1 / rho) + ramp * (smallest ** (1 / rho) - largest ** (1 / rho))) ** rho
    exponential = np.exp(np.linspace(np.log(largest), np.log(smallest), STEPS))
    for spacing, wanted in (("karras", karras), ("exponential", exponential)):
        np.testing.assert_allclose(levels(tiny_pipe, f"{name}-{spacing}").sigmas, [*wanted, 0], rtol=1e-4, atol=1e-6)
    if find_spec("scipy") is None:
        with pytest.raises(UserError, match="beta needs scipy: pip install scipy"):
            levels(tiny_pipe, f"{name}-beta")
    else:
        beta = importlib.import_module("scipy.stats").beta
        wanted = smallest + beta.ppf(1 - ramp, 0.6, 0.6) * (largest - smallest)
        np.testing.assert_allclose(levels(tiny_pipe, f"{name}-beta").sigmas, [*wanted, 0], rtol=1e-4, atol=1e-6)


def parted(names: Iterable[str]) -> list[Any]:
    """The names as parameters; those are slow whose scheduler in diffusers goes through all thousand timesteps in Python."""
    return [pytest.param(name, marks=pytest.mark.slow) if name.startswith("dpm2") else name for name in names]


@pytest.mark.parametrize("name", parted(one for one in SCHEDULERS if one != "lms" or find_spec("scipy") is not None))
def test_uniform_is_that_of_k_diffusion_or_refused(name: str, tiny_pipe: DiffusionPipeline) -> None:
    """Its ``get_sigmas``: timesteps from the noisiest to the cleanest, both among them; PLMS takes the second twice."""
    if name in ("dpm++", "dpm++-sde", "dpm++-2m-sde", "dpm++-3m-sde", "unipc", "lcm", "tcd"):
        with pytest.raises(UserError, match="cannot space its noise levels so: uniform"):
            levels(tiny_pipe, f"{name}-uniform")
    else:
        found = [float(one) for one in levels(tiny_pipe, f"{name}-uniform").timesteps]
        if name.startswith("dpm2"):  # between two of them it takes another
            found = found[::2]
        elif name in ("heun", "pndm"):
            found = list(dict.fromkeys(found))
        np.testing.assert_allclose(found, np.linspace(999, 0, len(found)), atol=0.6)
        assert len(found) == STEPS


@pytest.mark.parametrize("name", ["ddim", "euler", "euler-a", "dpm++", "dpm++-2m-sde", "ddpm"])
def test_trailing_steps_begin_at_the_noisiest(name: str, tiny_pipe: DiffusionPipeline) -> None:
    wanted = np.round(np.arange(1000, 0, -1000 / STEPS)) - 1
    np.testing.assert_array_equal(levels(tiny_pipe, f"{name}-trailing").timesteps, wanted)
    assert levels(tiny_pipe, f"{name}-trailing").timesteps[0] == 999 > levels(tiny_pipe, "ddim").timesteps[0]


def test_what_a_scheduler_cannot_do_is_told(tiny_pipe: DiffusionPipeline) -> None:
    for name in ("ddim", "euler-a", "lcm", "pndm"):
        with pytest.raises(UserError, match=f"{name} cannot space its noise levels so: karras"):
            levels(tiny_pipe, f"{name}-karras")
    with pytest.raises(UserError, match="lcm cannot take 200 steps"):
        scheduler_of(Adapters(tiny_pipe), [], Sampling(scheduler="lcm", steps=200))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "lms" or find_spec("scipy")])
def test_a_base_of_zero_terminal_snr_is_drawn_from_pure_noise_by_every_scheduler(name: str) -> None:
    """Lin et al. 2023: no signal is left where it begins. One that knows no such schedule gives way to DDIM, as is told."""
    pipe, told = make_pipe(prediction_type="v_prediction"), list[Event]()
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **changes)
    scheduler = levels(pipe, name)
    assert float(scheduler.alphas_cumprod[-1]) < 1e-6 and scheduler.timesteps[0] == 999
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    again = levels(pipe, name)  # as a recipe has it, which says that ddim drew
    assert isinstance(again, getattr(diffusers, SCHEDULERS[name][0])) or again.config == levels(pipe, "ddim").config
    list(paint(Adapters(pipe), [Cell("a cat", 1, None)], Sampling(scheduler=name, steps=2), tell=told.append))
    gave_way = type(scheduler).__name__ != SCHEDULERS[name][0]
    assert any("which the base was trained for" in line for one in told for line in one.lines()) == gave_way
    known = signature(getattr(diffusers, SCHEDULERS[name][0]).__init__).parameters
    assert gave_way == ("rescale_betas_zero_snr" not in known)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("lcm-lora-sdv1-5", (4, 1.0, "lcm")), ("Hyper-SD15-8steps-lora", (8, 1.0, "ddim-trailing")),
        ("Hyper-SDXL-12steps-CFG-lora", (12, 5.0, "ddim-trailing")), ("Hyper-SDXL-1step-lora", (1, 1.0, "tcd")),
        ("sdxl_lightning_2step_lora", (2, 1.0, "euler-trailing")), ("sd_xl_turbo_lora_v1", (4, 1.0, "euler-a-trailing")),
        ("dmd2_sdxl_4step_lora", (4, 1.0, "lcm")), ("TCD-SDXL-LoRA", (4, 1.0, "tcd")),
        ("lightning_bolts", (25, 5.0, None)), ("hyperrealism", (25, 5.0, None)), ("turbo_cars", (25, 5.0, None)),
        ("lightning_2000steps", (25, 5.0, None)), ("lightning_v10-step00001500", (25, 5.0, None)),
    ],
)  # fmt: skip
def test_adapters_for_few_steps_are_known_by_their_names(
    name: str, wanted: tuple[Any, ...], tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_diffusion.generation import distilled, settings

    choice = settings.Choice(tmp_path / f"{name}.safetensors", plan=_Plan())  # type: ignore[arg-type]
    taken = distilled.for_few_steps(Sampling(), [choice], lambda _: None)
    assert (taken.taken_steps, taken.guided_by, taken.scheduler) == wanted
    titled = settings.Choice(tmp_path / "a.safetensors", plan=_Plan({"ss_output_name": name}))  # type: ignore[arg-type]
    assert distilled.for_few_steps(Sampling(), [titled], lambda _: None) == taken
    given = Sampling(steps=30, guidance=3.0, scheduler="heun")
    assert distilled.for_few_steps(given, [choice], lambda _: None) == given


class _Plan:
    """As much of a plan as tells names."""

    def __init__(self, metadata: dict[str, str] | None = None) -> None:
        self.header = self
        self.metadata = metadata or {}


@pytest.mark.slow
def test_a_picture_in_few_steps_is_told_and_kept(tiny_base: Path, tmp_path: Path) -> None:
    file = make_adapter(tmp_path / "lcm-lora.safetensors", tiny_base, 1, size=0.1)
    told: list[Event] = []
    common: dict[str, Any] = {"base": str(tiny_base), "device": "cpu", "adapter": str(file)}
    (first,) = generate(
        GenerateConfig("a cat", negative="dull", output=tmp_path / "a.png", **common), observers=[told.append]
    )
    assert (first.recipe.steps, first.recipe.guidance, first.recipe.scheduler) == (4, 1.0, "lcm")
    assert any(isinstance(one, Noted) and "--steps 4 --guidance 1 --scheduler lcm" in one.message for one in told)
    assert any(isinstance(one, Warned) and "negative prompt has no effect" in one.message for one in told)
    with Image.open(tmp_path / "a.png") as image:
        assert "Sampler: LCM" in image.info["parameters"]
    (again,) = generate(
        GenerateConfig(recipe=tmp_path / "a.png", output=tmp_path / "b.png", base=str(tiny_base), device="cpu")
    )
    assert again.image.tobytes() == first.image.tobytes()
    (own,) = generate(GenerateConfig("a cat", steps=2, scheduler="Euler a", output=tmp_path / "c.png", **common))
    assert (own.recipe.steps, own.recipe.guidance, own.recipe.scheduler) == (2, 1.0, "euler-a")
    other = make_adapter(tmp_path / "flat.safetensors", tiny_base, 2)
    common["adapter"] = (str(other), str(file))
    drawn = blend(BlendConfig("a cat", columns=2, output=tmp_path / "sheet.png", **common))
    assert {one.steps for one in drawn.recipes[0]} == {4}
    assert len({kind.title for kind in KINDS}) == len(KINDS) and all(canonical(kind.scheduler) for kind in KINDS)
    assert set(SCHEDULERS) >= {"lcm", "tcd"}
