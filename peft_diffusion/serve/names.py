"""Samplers and schedulers by the names of A1111. Imports no torch."""

from collections.abc import Container, Mapping
from types import MappingProxyType

from ..bases.schedulers import SCHEDULERS, canonical, label, parted
from ..core.errors import UserError, did_you_mean

# The schedule that A1111 takes for a sampler where it is told "Automatic" (its modules/sd_samplers_kdiffusion.py).
AUTOMATIC: Mapping[str, str] = MappingProxyType(
    {
        "dpm2": "karras",
        "dpm2-a": "karras",
        "dpm++": "karras",
        "dpm++-sde": "karras",
        "dpm++-2m-sde": "exponential",
        "dpm++-3m-sde": "exponential",
    }
)
# By the names of A1111's modules/sd_schedulers.py.
_SCHEDULES: Mapping[str, str] = MappingProxyType(
    {
        "uniform": "uniform", "karras": "karras", "exponential": "exponential", "sgm_uniform": "trailing", "beta": "beta",
        "simple": "trailing", "normal": "uniform",  # the levels are the same
    }
)  # fmt: skip
# Options of A1111 (its modules/shared_options.py) that change no picture here at these values; None for at any.
_IDLE: Mapping[str, Container[object] | None] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                "samples_save", "samples_filename_pattern", "save_images_add_number", "save_to_dirs", "save_txt",
                "directories_filename_pattern", "grid_save", "grid_format", "grid_save_to_dirs", "grid_only_if_multiple",
                "outdir_samples", "outdir_txt2img_samples", "outdir_img2img_samples", "outdir_grids", "outdir_save",
                "outdir_txt2img_grids", "outdir_img2img_grids", "export_for_4chan", "jpeg_quality", "webp_lossless",
                "live_previews_enable", "live_preview_refresh_period", "live_preview_content", "live_previews_image_format",
                "show_progress_every_n_steps", "show_progress_grid", "show_progress_type", "do_not_show_images",
                "show_progressbar", "show_warnings", "sd_checkpoint_cache", "sd_vae_checkpoint_cache",
                "sd_checkpoints_limit", "sd_checkpoints_keep_in_cpu", "unload_models_when_training", "memmon_poll_rate",
                "enable_console_prompts", "save_images_before_highres_fix", "save_images_before_color_correction",
                "save_mask", "save_mask_composite", "return_mask", "return_mask_composite",
                "add_model_hash_to_info", "add_model_name_to_info",
                "add_version_to_infotext", "lora_add_hashes_to_infotext", "face_restoration_model", "code_former_weight",
            )
        ),
        **dict.fromkeys(("enable_pnginfo", "enable_emphasis", "sd_vae_overrides_per_model_preferences"), (True,)),
        **dict.fromkeys(("sd_unet", "sd_hypernetwork", "sd_lora"), ("Automatic", "None", "", None)),
        **dict.fromkeys(
            (
                "return_grid", "img2img_color_correction", "img2img_fix_steps", "face_restoration", "enable_quantization",
                "always_discard_next_to_last_sigma", "use_old_scheduling", "use_old_emphasis_implementation",
                "use_old_karras_scheduler_sigmas", "no_dpmpp_sde_batch_determinism", "upcast_attn", "fp8_storage",
            ),
            (False,),
        ),
        **dict.fromkeys(("eta_noise_seed_delta", "token_merging_ratio", "token_merging_ratio_hr", "s_churn"), (0,)),
        "token_merging_ratio_img2img": (0,), "sdxl_crop_top": (0,), "sdxl_crop_left": (0,), "s_min_uncond": (0,),
        "initial_noise_multiplier": (1,), "inpainting_mask_weight": (1,), "emphasis": ("Original",),
        "randn_source": ("CPU",), "forge_additional_modules": ([],),
    }
)  # fmt: skip
# Samplers that add noise at each step, and those that take the same steps and add none (k-diffusion's with eta 0).
_ADD_NOISE: Mapping[str, str | None] = MappingProxyType(
    {"euler-a": "euler", "dpm2-a": "dpm2", "dpm++-sde": None, "dpm++-2m-sde": None, "dpm++-3m-sde": None}
)
_LABELS = {"automatic": "Automatic", "sgm_uniform": "SGM Uniform"}


def is_idle(name: str, value: object) -> bool:
    """Tell whether an option of A1111 that is not known here changes no picture all the same.

    Args:
        name: Its name.
        value: Its value.

    Returns:
        Whether it changes none.
    """
    if name not in _IDLE:
        return False
    values = _IDLE[name]
    return values is None or value in values


def scheduler(sampler: str | None, schedule: str | None) -> str | None:
    """Choose a scheduler by what A1111 calls sampler and schedule.

    Args:
        sampler: Such as "Euler a", "DPM++ 2M Karras" or "k_dpmpp_2m"; None or "" for the base's own, or with a schedule for
            Euler, which A1111 takes.
        schedule: Such as "karras", "SGM Uniform" or "automatic"; None or "" is automatic.

    Returns:
        The name here; None for the base's own.

    Raises:
        UserError: There is no such sampler or schedule.
    """
    if not sampler:
        if not schedule or schedule.casefold() == "automatic":
            return None
        sampler = "euler"
    kind, spacing = parted(canonical(sampler.removeprefix("k_")))
    known = {name.casefold(): name for name in _SCHEDULES} | {title(name).casefold(): name for name in _SCHEDULES}
    asked = (schedule or "automatic").casefold()
    if asked == "automatic":
        spacing = spacing or AUTOMATIC.get(kind, "")
    elif asked in known:
        spacing = _SCHEDULES[known[asked]]
    else:
        there = ["automatic", *_SCHEDULES]
        raise UserError(f"there is no scheduler {schedule!r}; there are: {', '.join(there)}{did_you_mean(schedule, there)}")
    return canonical(f"{kind}-{spacing}" if spacing else kind)


def with_eta(name: str | None, eta: float | None) -> str | None:
    """Choose the scheduler that does what A1111's sampler does with an eta, the share of noise that each step adds anew.

    Args:
        name: As `scheduler` gives it.
        eta: As requests tell it; None for what A1111 begins with: 0 for DDIM, 1 for those that add noise.

    Returns:
        The same; of a sampler that adds noise, at 0 the one that adds none.

    Raises:
        UserError: There is none that does.
    """
    kind, spacing = parted(name or "")
    if eta is None or not (kind in _ADD_NOISE or kind in ("", "ddim")) or eta == 1 or (eta == 0 and kind not in _ADD_NOISE):
        return name
    plain = _ADD_NOISE.get(kind) if eta == 0 else None
    if plain is None:
        other = "; take DPM++ 2M, which adds no noise" if eta == 0 else ", nor any other than 0 and 1"
        raise UserError(f"eta {eta:g} of {label(kind) if kind else 'this base'} is not done here{other}; leave it away")
    return f"{plain}-{spacing}" if spacing else plain


def title(schedule: str) -> str:
    """Say what A1111 shows for a schedule.

    Args:
        schedule: Its name there.

    Returns:
        Its label.
    """
    return _LABELS.get(schedule, schedule.title())


def samplers() -> list[dict[str, object]]:
    """List the samplers as ``/sdapi/v1/samplers`` does.

    Returns:
        One entry a sampler.
    """
    found: list[dict[str, object]] = []
    for name in SCHEDULERS:
        options = {"scheduler": AUTOMATIC[name]} if name in AUTOMATIC else {}
        found.append({"name": label(name), "aliases": [name], "options": options})
    return found


def schedulers() -> list[dict[str, object]]:
    """List the schedules as ``/sdapi/v1/schedulers`` does.

    Returns:
        One entry a schedule.
    """
    return [
        {"name": name, "label": title(name), "aliases": None, "default_rho": -1.0, "need_inner_model": False}
        for name in ("automatic", *_SCHEDULES)
    ]
