"""Files of other programs, told apart by what is in them. Imports no torch."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ....core.errors import UserError
from ....core.files import at_home
from ....core.parsing import refusing
from ..pictures import TrainConfig
from . import kohya, kohya_data, onetrainer, onetrainer_data
from .taking import Found, parsed_of

_ONETRAINER = frozenset(("concept_file_name", "training_method", "model_type", "base_model_name", "peft_type"))
_KOHYA = frozenset(
    ("pretrained_model_name_or_path", "network_dim", "network_module", "train_data_dir", "LoRA_type", "max_train_steps",
     "max_train_epochs", "dataset_config", "train_batch_size", "optimizer_type", "output_name", "learning_rate")
)  # fmt: skip


def read_datasets(file: Path) -> Found:
    """Read a file that names folders.

    Args:
        file: A dataset file of sd-scripts (TOML or JSON), or OneTrainer's concepts (JSON).

    Returns:
        What it says.

    Raises:
        UserError: It is neither, or cannot be read.
    """
    given = parsed_of(file := at_home(file))
    with refusing(f"{file} cannot be read"):
        if isinstance(given, list):
            return onetrainer_data.read(file, given)
        if isinstance(given, dict) and "datasets" in given:
            return kohya_data.read(file, given)
    raise UserError(
        f"{file} is neither a dataset file of sd-scripts, with [[datasets]], nor a list of OneTrainer's concepts"
    )


def read(file: Path) -> Found:
    """Read a file of another program.

    Args:
        file: A training of sd-scripts (TOML) or of kohya_ss (JSON), a configuration of OneTrainer (JSON), or what
            `read_datasets` reads.

    Returns:
        What it says.

    Raises:
        UserError: It is none of them, or cannot be read.
    """
    given = parsed_of(file := at_home(file))
    if isinstance(given, dict) and "datasets" not in given:
        flat = _names(given)
        with refusing(f"{file} cannot be read"):
            if flat & _ONETRAINER:
                return onetrainer.read(file, given)
            if flat & _KOHYA:
                return kohya.read(file, given)
        raise UserError(
            f"{file} is no configuration of sd-scripts, kohya_ss or OneTrainer; it has {', '.join(sorted(flat)[:8])}"
        )
    return read_datasets(file)


def _names(given: Mapping[str, Any]) -> frozenset[str]:
    """The options, also those in sections."""
    inner = (name for value in given.values() if isinstance(value, dict) for name in value)
    return frozenset((*given, *inner))


def with_datasets(config: TrainConfig) -> tuple[TrainConfig, tuple[str, ...]]:
    """Put what a dataset file of another program says into settings.

    Args:
        config: The settings, with ``dataset_config`` or without.

    Returns:
        The settings without the file, which has become folders of theirs; and what of it has no counterpart.

    Raises:
        UserError: The file cannot be read.
    """
    if config.dataset_config is None:
        return config, ()
    found = read_datasets(config.dataset_config)
    absent = list(found.absent)
    if "batch_size" in found.settings and config.batch_size is None:
        config = replace(config, batch_size=found.settings["batch_size"])
    if found.settings.get("prior_target", config.prior_target) != config.prior_target:
        absent.append(
            f"{config.dataset_config}: is_reg = true (its pictures are learned as they are there, and as the base answers to"
            " them here, unless --prior-target noise is given)"
        )
    epochs = config.epochs
    if epochs is not None and found.longer != 1:
        absent.append(f"{config.dataset_config}: an epoch here is {found.longer} there, as it has each form of a picture")
    return replace(config, dataset=(*config.dataset, *found.datasets), dataset_config=None), tuple(absent)
