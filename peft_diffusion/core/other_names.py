"""What kohya sd-scripts, the scripts of diffusers and A1111 call settings that have another name here. Imports no torch."""

from collections.abc import Iterable

# By their names without dashes: the settings here, of any command.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "lr": ("unet_lr", "lr"),
    "learning_rate": ("unet_lr", "lr"),
    "network_dim": ("rank",),
    "network_alpha": ("alpha",),
    "lora_alpha": ("alpha",),
    "network_module": ("method",),
    "network_args": ("option",),
    "network_dropout": ("dropout",),
    "max_train_steps": ("steps",),
    "max_train_epochs": ("epochs",),
    "num_train_epochs": ("epochs",),
    "train_batch_size": ("batch_size",),
    "gradient_accumulation_steps": ("accumulation",),
    "gradient_checkpointing": ("memory",),
    "lr_scheduler": ("scheduler",),
    "lr_warmup_steps": ("warmup",),
    "optimizer_type": ("optimizer",),
    "mixed_precision": ("precision",),
    "max_grad_norm": ("clip",),
    "snr_gamma": ("min_snr_gamma",),
    "save_every_n_steps": ("save_every",),
    "checkpointing_steps": ("save_every",),
    "resume_from_checkpoint": ("resume",),
    "pretrained_model_name_or_path": ("base",),
    "model": ("base",),
    "train_data_dir": ("folder",),
    "instance_data_dir": ("folder",),
    "reg_data_dir": ("regularisation",),
    "class_data_dir": ("regularisation",),
    "instance_prompt": ("trigger",),
    "prior_loss_weight": ("prior_weight",),
    "output_name": ("output",),
    "output_dir": ("run_dir", "output"),
    "save_precision": ("save_dtype",),
    "save_model_as": ("save_as",),
    "cache_latents": ("cache",),
    "shuffle_caption": ("shuffle_tags",),
    "caption_dropout_rate": ("caption_dropout",),
    "flip_aug": ("flip",),
    "random_flip": ("flip",),
    "validation_prompt": ("preview_prompts",),
    "sample_prompts": ("preview_prompts",),
    "num_inference_steps": ("steps",),
    "guidance_scale": ("guidance",),
    "cfg_scale": ("guidance",),
    "negative_prompt": ("negative",),
    "sampler": ("scheduler",),
    "lora_weights": ("adapter",),
}


def known_here_as(given: str, known: Iterable[str]) -> str | None:
    """Find what the setting of another program is called here.

    Args:
        given: Its name, with or without dashes in front and between.
        known: The settings of the command, with underscores.

    Returns:
        The name here; None where the command has none that is meant.
    """
    there = set(known)
    names = OTHER_NAMES.get(given.lstrip("-").replace("-", "_").lower(), ())
    return next((name for name in names if name in there), None)
