"""What the package does, by function: the one place above both training and generation, where each gets what it needs.

The commands call these, and so does Python: ``import peft_diffusion as pd; pd.train(...)``.
"""

from typing import TYPE_CHECKING

from .core.settings import of_kind
from .generation.while_training import TrainingPictures, beside, carried, others
from .training import run
from .training.composing import ComposeSource
from .training.pictures import PictureSource, searched
from .training.settings.composing import ComposeTrainConfig
from .training.settings.pictures import TrainConfig
from .training.settings.text import TextTrainConfig
from .training.texts import TextSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .bases import LanguageModel
    from .bases.pipelines import Pipeline
    from .core.events import Observer, Stop
    from .training.composing import ComposeResult
    from .training.results import FoundRates, TextTrainResult, TrainResult


def train(
    config: TrainConfig,
    *,
    pipe: "Pipeline | None" = None,
    observers: "Sequence[Observer]" = (),
    stop: "Stop | None" = None,
) -> "TrainResult":
    """Learn a style or a subject from folders of pictures and write it as one adapter file.

    Args:
        config: What is learned from, and how.
        pipe: A base that is loaded already, used in place of ``config.base`` and left as it was.
        observers: Are told what happens, by the events of `training.events`.
        stop: Where it is set, such as a ``threading.Event`` by another thread, the run ends after the present step, with a
            checkpoint. Without one, SIGINT, SIGTERM and SIGHUP do the same, where this is the main thread.

    Returns:
        What the run gave.

    Raises:
        UserError: For what the user can mend.
        Interrupted: The run was stopped, after it saved a checkpoint. It is a KeyboardInterrupt.
    """
    _check(config, TrainConfig)
    return run.train(PictureSource.of(config, pipe, TrainingPictures()), beside, observers, stop)


def find_rates(
    config: TrainConfig,
    *,
    pipe: "Pipeline | None" = None,
    observers: "Sequence[Observer]" = (),
    stop: "Stop | None" = None,
) -> "FoundRates":
    """Find a learning rate for a training on pictures by trials; see `training.watch.find_lr`.

    Nothing is written but ``find_lr.json`` and ``find_lr.png`` in the run folder.

    Args:
        config: What is learned from, and how.
        pipe: A base that is loaded already, used in place of ``config.base`` and left as it was.
        observers: Are told what happens, by the events of `training.events`.
        stop: Where it is set, such as a ``threading.Event`` by another thread, the search ends. Without one, SIGINT,
            SIGTERM and SIGHUP do the same, where this is the main thread.

    Returns:
        The rates, and all trials.

    Raises:
        UserError: For what the user can mend.
        Interrupted: The search was stopped. It is a KeyboardInterrupt.
    """
    _check(config, TrainConfig)
    return run.find_rates(PictureSource.of(searched(config), pipe, TrainingPictures()), beside, observers, stop)


def train_text(
    config: TextTrainConfig,
    *,
    base: "LanguageModel | None" = None,
    observers: "Sequence[Observer]" = (),
    stop: "Stop | None" = None,
) -> "TextTrainResult":
    """Teach a causal language model a text and write what it learned as one adapter file.

    Args:
        config: What is learned from, and how.
        base: A model that is loaded already, used in place of ``config.base`` and left as it was.
        observers: Are told what happens, by the events of `training.events`.
        stop: Where it is set, such as a ``threading.Event`` by another thread, the run ends after the present step, with a
            checkpoint. Without one, SIGINT, SIGTERM and SIGHUP do the same, where this is the main thread.

    Returns:
        What the run gave.

    Raises:
        UserError: For what the user can mend.
        Interrupted: The run was stopped, after it saved a checkpoint. It is a KeyboardInterrupt.
    """
    _check(config, TextTrainConfig)
    return run.train(TextSource(config, base), beside, observers, stop)


def find_text_rates(
    config: TextTrainConfig,
    *,
    base: "LanguageModel | None" = None,
    observers: "Sequence[Observer]" = (),
    stop: "Stop | None" = None,
) -> "FoundRates":
    """Find a learning rate for a training on text by trials; see `training.watch.find_lr`.

    Nothing is written but ``find_lr.json`` and ``find_lr.png`` in the run folder.

    Args:
        config: What is learned from, and how.
        base: A model that is loaded already, used in place of ``config.base`` and left as it was.
        observers: Are told what happens, by the events of `training.events`.
        stop: Where it is set, such as a ``threading.Event`` by another thread, the search ends. Without one, SIGINT,
            SIGTERM and SIGHUP do the same, where this is the main thread.

    Returns:
        The rates, and all trials.

    Raises:
        UserError: For what the user can mend.
        Interrupted: The search was stopped. It is a KeyboardInterrupt.
    """
    _check(config, TextTrainConfig)
    return run.find_rates(TextSource(config, base), beside, observers, stop)


def train_composition(
    config: ComposeTrainConfig,
    *,
    pipe: "Pipeline | None" = None,
    observers: "Sequence[Observer]" = (),
    stop: "Stop | None" = None,
) -> "ComposeResult":
    """Learn how much of each frozen adapter acts in each block and at each step, and write that as a small file.

    Args:
        config: Which adapters, from which pictures, and how.
        pipe: A base that is loaded already, used in place of ``config.base`` and left as it was.
        observers: Are told what happens, by the events of `training.events`.
        stop: Where it is set, such as a ``threading.Event`` by another thread, the run ends after the present step, with a
            checkpoint. Without one, SIGINT, SIGTERM and SIGHUP do the same, where this is the main thread.

    Returns:
        What the run gave.

    Raises:
        UserError: For what the user can mend.
        Interrupted: The run was stopped, after it saved a checkpoint. It is a KeyboardInterrupt.
    """
    of_kind(config, ComposeTrainConfig)
    return run.train(ComposeSource.of(config, pipe, TrainingPictures()), carried, observers, stop)


def _check(config: TrainConfig | TextTrainConfig, kind: type[TrainConfig | TextTrainConfig]) -> None:
    """Refuse settings of another kind, and adapters to train beside that cannot be, before anything is loaded."""
    of_kind(config, kind)
    others(config.beside)
