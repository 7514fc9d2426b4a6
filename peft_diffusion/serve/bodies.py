"""The bodies of requests, by the names of A1111 (its modules/api/models.py). Imports pydantic."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..core.errors import UserError
from ..generation.region_settings import FEATHER

OWN = "peft_diffusion"
"""The script of ``alwayson_scripts`` that says what A1111 has no name for."""
_MOST_REGIONS = 16


class RegionBody(BaseModel):
    """A part of the picture with a prompt of its own, by the names of `pd.Region`.

    Attributes:
        model_config: Nothing else may be said, and numbers are finite.
        box: Left, top, right and lower edge, from 0 to 1 in shares of the picture's sides, or in pixels.
        mask: A picture in base64 that is white in the region.
        painted: A picture in base64 in which regions are painted in colours.
        color: The colour of the region in it, as #ff0000.
        prompt: What the region shows, with adapters as <lora:NAME:0.8>; None for what the whole picture does.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    box: list[float] | None = Field(default=None, min_length=4, max_length=4)
    mask: str | None = None
    painted: str | None = None
    color: str = ""
    prompt: str | None = None


class Extras(BaseModel):
    """What ``generate`` knows and A1111 does not, by the names of its settings.

    Attributes:
        model_config: Nothing else may be said, and numbers are finite.
        auto: Choose up to so many adapters of the server's library for each prompt; None for none.
        region: The regions of the picture.
        regions: Where they are: as each says, or where triggers are read.
        region_feather: How wide their edges are, as a share of the shorter side.
        region_isolation: The share of the noise levels at which they do not attend to each other; None for what suits them.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    auto: int | None = Field(default=None, ge=1)
    region: list[RegionBody] = Field(default=[], max_length=_MOST_REGIONS)
    regions: Literal["given", "auto"] = "given"
    region_feather: float = Field(default=FEATHER, ge=0, le=1)
    region_isolation: float | None = Field(default=None, ge=0, le=1)


class OwnScript(BaseModel):
    """Our script, told as A1111's are.

    Attributes:
        model_config: Nothing else may be said.
        args: What it is told, once.
    """

    model_config = ConfigDict(extra="forbid")

    args: list[Extras] = Field(default=[], max_length=1)


class Scripts(BaseModel):
    """The scripts of ``alwayson_scripts``, those of others as they are.

    Attributes:
        model_config: Others are kept.
        peft_diffusion: Our own.
    """

    model_config = ConfigDict(extra="allow")

    peft_diffusion: OwnScript | None = None

    @model_validator(mode="before")
    @classmethod
    def _in_any_case(cls, told: Any) -> Any:
        """Know our own by its name in any case, as A1111 finds scripts."""
        if not isinstance(told, dict):
            return told
        return {OWN if str(name).lower() == OWN else name: value for name, value in told.items()}

    @property
    def others(self) -> dict[str, Any]:
        """Those of others, by name."""
        return self.model_extra or {}


class Drawing(BaseModel):
    """What ``txt2img`` and ``img2img`` are both told. What is None or left out is as ``generate`` has it by default.

    Attributes:
        model_config: Numbers are finite; what is not known is kept, and told in the answer.
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: str | None = None
    negative_prompt: str | None = None
    styles: list[str] | None = None
    seed: int | None = None
    subseed: int | None = None
    subseed_strength: float | None = None
    seed_resize_from_h: int | None = None
    seed_resize_from_w: int | None = None
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    batch_size: int | None = None
    n_iter: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    restore_faces: bool | None = None
    tiling: bool | None = None
    do_not_save_samples: bool | None = None
    do_not_save_grid: bool | None = None
    eta: float | None = None
    denoising_strength: float | None = None
    s_churn: float | None = None
    s_tmax: float | None = None
    s_tmin: float | None = None
    s_noise: float | None = None
    s_min_uncond: float | None = None
    override_settings: dict[str, Any] | None = None
    override_settings_restore_afterwards: bool | None = None
    refiner_checkpoint: str | None = None
    refiner_switch_at: float | None = None
    script_name: str | None = None
    script_args: list[Any] | None = None
    alwayson_scripts: Scripts | None = None
    send_images: bool = True
    save_images: bool = False
    force_task_id: str | None = None

    def neutral(self) -> dict[str, tuple[object, ...]]:
        """What changes a picture and is not done here, each with the values at which it changes none."""
        return {
            "styles": (None, []),
            "seed_resize_from_h": (None, 0, -1),
            "seed_resize_from_w": (None, 0, -1),
            "restore_faces": (None, False),
            "s_churn": (None, 0),
            "s_tmax": (None, 0),
            "s_tmin": (None, 0),
            "s_noise": (None, 1),
            "s_min_uncond": (None, 0),
            "refiner_checkpoint": (None, "", "None"),
            "script_name": (None, "", "None"),
        }

    @property
    def own(self) -> Extras:
        """What is said to us alone."""
        script = None if self.alwayson_scripts is None else self.alwayson_scripts.peft_diffusion
        return script.args[0] if script is not None and script.args else Extras()

    def repeated(self) -> dict[str, Any]:
        """All that was told, as the answer repeats it, without the pictures of regions."""
        told = self.model_dump()
        scripts = told["alwayson_scripts"]
        if scripts is not None and scripts[OWN] is None:
            del scripts[OWN]
        for region in (one for args in (scripts or {}).get(OWN, {}).get("args", ()) for one in args["region"]):
            region |= {"mask": None, "painted": None}
        return told

    def refuse_others(self) -> None:
        """Refuse what would change the picture and is not done here.

        Raises:
            UserError: There is something.
        """
        for name, values in self.neutral().items():
            value = getattr(self, name)
            if value not in values:
                raise UserError(f"{name} {str(value)[:60]!r} is not done here; leave it away")
        for name, told in ({} if self.alwayson_scripts is None else self.alwayson_scripts.others).items():
            if not _is_off(told.get("args") if isinstance(told, dict) else told):
                raise UserError(
                    f"the script {name[:60]!r} of alwayson_scripts is not done here; leave it away or turn it off"
                )


def _is_off(arguments: object) -> bool:
    """Whether a script of alwayson_scripts does nothing: without arguments, turned off, or with all of its units off.

    Its first argument turns a script on, as for ADetailer and Tiled Diffusion; a ControlNet's are units with "enabled".
    """
    if not arguments:
        return True
    if not isinstance(arguments, list):
        return False
    return arguments[0] is False or all(isinstance(one, dict) and one.get("enabled") is False for one in arguments)


class TextToImage(Drawing):
    """The body of ``txt2img``."""

    enable_hr: bool | None = None
    firstphase_width: int | None = None
    firstphase_height: int | None = None
    hr_scale: float | None = None
    hr_upscaler: str | None = None
    hr_second_pass_steps: int | None = None
    hr_resize_x: int | None = None
    hr_resize_y: int | None = None
    hr_checkpoint_name: str | None = None
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str | None = None
    hr_negative_prompt: str | None = None

    def neutral(self) -> dict[str, tuple[object, ...]]:
        """What is not done here."""
        others = super().neutral()
        if not self.enable_hr:
            return others
        return others | {
            "hr_checkpoint_name": (None, "", "Use same checkpoint"),
            "hr_sampler_name": (None, "", "Use same sampler", self.sampler_name),
            "hr_scheduler": (None, "", "Use same scheduler", self.scheduler),
            "hr_prompt": (None, "", self.prompt),
            "hr_negative_prompt": (None, "", self.negative_prompt),
            "firstphase_width": (None, 0),
            "firstphase_height": (None, 0),
        }


class ImageToImage(Drawing):
    """The body of ``img2img``."""

    init_images: list[str] | None = None
    resize_mode: int | None = None
    mask: str | None = None
    mask_blur: int | None = None
    mask_blur_x: int | None = None
    mask_blur_y: int | None = None
    inpainting_fill: int | None = None
    inpaint_full_res: bool | None = None
    inpaint_full_res_padding: int | None = None
    inpainting_mask_invert: int | None = None
    initial_noise_multiplier: float | None = None
    image_cfg_scale: float | None = None
    include_init_images: bool = False

    def repeated(self) -> dict[str, Any]:
        """All that was told, without pictures unless they are asked for."""
        told = super().repeated()
        return told if self.include_init_images else told | {"init_images": None, "mask": None}

    def neutral(self) -> dict[str, tuple[object, ...]]:
        """What is not done here."""
        return {**super().neutral(), "initial_noise_multiplier": (None, 0, 1)}


class PngInfo(BaseModel):
    """The body of ``png-info``."""

    image: str
