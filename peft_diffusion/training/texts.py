"""Text as what a run learns from, and a causal language model that it teaches."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ..bases import LanguageInfo, LanguageModel, components, describe, load_lm
from ..bases import family as families
from ..bases.loading import pick_device
from ..bases.taught import learned
from ..core import quantized
from ..core.errors import UserError
from ..core.events import Event, Observer
from ..core.files import at_home, refuse_overlaps
from ..core.others import Other
from ..core.settings import flag, pick, to_json
from ..data.text_files import Texts, read_texts
from .adapter_learner import AdapterLearner, check_asked
from .attachment import check_placements, new_words, with_words
from .beginning import with_rank_of_file
from .events import COLD, IMPATIENT, Data, DataRead, LanguageModelLoaded, TokensMade
from .loop.trainer import Trainer
from .machine.memory_plan import Load
from .machine.precision import pick_precision
from .machine.processes import Processes
from .record.run_folder import RunFolder, check_run, check_writable
from .results import FoundRates, RunResult, TextTrainResult
from .run import Facts, at_strength, next_command
from .settings.choices import Precision
from .settings.derive import resolve_language
from .settings.placements import blocks, plugins_of
from .settings.presets import HELD_OUT_FROM
from .settings.text import ResolvedTextConfig, TextTrainConfig, language_output, language_run
from .tasks.language import LanguageSettings, LanguageTask, tokens
from .watch.previews import Previews

_WORDS, _LETTERS = 6, 60  # of a prompt that is proposed


@dataclass(frozen=True)
class TextSource:
    """Text, and the language model that is to learn from it: a `run.RatedSource`.

    Attributes:
        asked: The settings as they were given.
        base: A model that is loaded already, used in place of ``asked.base`` and left as it was; or None.
    """

    asked: TextTrainConfig
    base: LanguageModel | None

    @property
    def others(self) -> Sequence[str]:
        """The adapters that the new one is trained beside."""
        return self.asked.beside

    @property
    def lent(self) -> LanguageModel | None:
        """The model of the caller."""
        return self.base

    @property
    def output(self) -> Path:
        """The adapter file that is to be made."""
        return language_output(self.asked)

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return language_run(self.asked)

    def check(self) -> None:
        """See that there are such methods, targets and an optimizer."""
        check_asked(self.asked, self.folder)

    def on(self, device: str) -> Self:
        """The same on another device."""
        return replace(self, asked=replace(self.asked, device=device))

    def processes(self, processes: Processes) -> Processes:
        """The processes as they are: a language model is not shared."""
        return processes

    def folder(self) -> RunFolder:
        """The run folder, after seeing that everything can be written."""
        config = self.asked
        folder = self._folder()
        _check_apart(config, (("--output", language_output(config)),))
        check_run(folder, language_output(config), resume=config.resume, overwrite=config.overwrite)
        return folder

    def search_folder(self) -> RunFolder:
        """Where a search for learning rates writes."""
        folder = self._folder()
        _check_apart(self.asked)
        check_writable(folder.path)
        return folder

    def _folder(self) -> RunFolder:
        return RunFolder(language_run(self.asked), "text train", "text")

    def open(self, folder: RunFolder, processes: Processes, tell: Observer) -> "TextMaterial":
        """Read the text and load the base."""
        config = with_rank_of_file(self.asked)
        texts = read_texts(config.texts)
        tell(DataRead("text", tuple(texts.describe())))
        apart = read_texts(config.held_out_text) if config.held_out_text else None
        going_on = folder.newest() if config.resume else None
        if going_on is not None:
            folder.check_data(going_on.origin, _items(texts, apart))
        device = pick_device(config.device)
        precision = pick_precision(config.precision, device)
        base = load_lm(self.base or config.base, device=config.device, dtype=precision, quantize=config.quantize)
        info = describe(base)
        tell(LanguageModelLoaded(info.name, info.architecture, info.vocabulary, info.context))
        if going_on is not None:
            folder.check_base(going_on.origin, info.fingerprint)
        return TextMaterial(config, precision, base, info, texts, apart, tell, processes)

    def remark(self, found: FoundRates) -> Event | None:
        """Text has nothing to be told."""
        return None


@dataclass(frozen=True)
class _Tokens:
    """Text as tokens: a line to learn from, and one that is kept apart; and the settings, steps of epochs among them."""

    config: ResolvedTextConfig
    line: Tensor
    held_out: Tensor | None
    items: list[dict[str, str]]


class TextMaterial:
    """A loaded language model, and text; `adapter_learner.AdapterMaterial` says what each method is for."""

    data: Data = "text"

    def __init__(
        self,
        asked: TextTrainConfig,
        precision: Precision,
        base: LanguageModel,
        info: LanguageInfo,
        texts: Texts,
        held_out_texts: Texts | None,
        tell: Observer,
        processes: Processes,
    ) -> None:
        self.asked = asked
        self.precision = precision
        self.base = base
        self.info = info
        self.texts = texts
        self.held_out_texts = held_out_texts
        self.tell = tell
        self.processes = processes
        self.beside: Sequence[Other] = ()
        # Whole but for the steps of epochs, which it takes tokens to count.
        self.first = self._resolved(None)
        self.seed = asked.seed
        self.parts = components(base)
        self.blocks = with_words(base, blocks(self.first))
        check_placements(self.parts, self.blocks)  # before texts become tokens

    def learner(self, folder: RunFolder, others: Sequence[Other], tell: Observer) -> AdapterLearner:
        """A fresh adapter."""
        return AdapterLearner(self, folder, others, tell)

    @property
    def plugins(self) -> list[str]:
        """The modules of plug-ins of methods."""
        return plugins_of(self.config, self.info.family)

    def rate(self, component: str) -> float:
        """The learning rate."""
        return self.first.lr

    def block_rates(self) -> dict[str, float]:
        """None."""
        return {}

    def until(self, component: str) -> float:
        """To the end."""
        return 1.0

    def rate_flags(self) -> dict[str, str]:
        """The flag that sets the learning rate."""
        return {} if self.asked.block else {name: flag(families.rate_setting(name)) for name in self.parts}

    @cached_property
    def task(self) -> LanguageTask:
        """What is learned; tells what it finds."""
        return LanguageTask(self.base, self._settings(self.config), self.tokens.line, self.tokens.held_out)

    @property
    def config(self) -> ResolvedTextConfig:
        """The settings, with every value that a run needs."""
        return self.tokens.config

    @property
    def items(self) -> list[dict[str, str]]:
        """The texts."""
        return self.tokens.items

    @cached_property
    def tokens(self) -> _Tokens:
        """The text as tokens, with the words that the adapter teaches.

        Raises:
            UserError: The text is too short, or never says a word that is taught.
        """
        base, first, apart = self.base, self.first, self.held_out_texts
        encoded = [tokens(base, [document.text]) for document in self.texts.documents]
        line, kept = _split(encoded, _share(first, encoded))
        if apart is not None:
            kept = tokens(base, [document.text for document in apart.documents])
        if len(line) < 2:
            raise UserError("the text is but one token; there is nothing to learn from it")
        _check_words_occur(base, new_words(self.blocks), line)
        windows = LanguageTask(base, self._settings(first), line).windows
        resolved = self._resolved(windows / self.processes.size)
        if resolved.patience and kept is None:
            self.tell(IMPATIENT)
        if resolved.warmup >= resolved.steps:
            self.tell(COLD)
        self.tell(TokensMade(len(line), windows, resolved.context, None if kept is None else len(kept)))
        return _Tokens(resolved, line, kept, _items(self.texts, apart))

    def _resolved(self, windows: float | None) -> ResolvedTextConfig:
        return resolve_language(
            self.asked,
            parameters=quantized.count(self.base.lm),
            context=self.info.context,
            windows=windows,
            device=self.base.device.type,
            precision=self.precision,
        )

    def _settings(self, config: ResolvedTextConfig) -> LanguageSettings:
        return pick(LanguageSettings, config, {"processes": self.processes})

    def faster(self) -> AbstractContextManager[None]:
        """Nothing is fused."""
        return nullcontext()

    def at_work(self) -> AbstractContextManager[None]:
        """Nothing of a language model is idle."""
        return nullcontext()

    def previews(self, trainer: Trainer, folder: RunFolder) -> Previews | None:
        """None are drawn of text."""
        return None

    def load(self, previews: Previews | None) -> Load:
        """What of the run takes memory."""
        config, parts = self.config, tuple(self.parts.values())
        savings = ["--batch-size 1 with --accumulation"] if config.batch_size > 1 else []
        savings += [] if config.quantize == "nf4" else ["--quantize nf4"]
        return Load(
            parts=parts,
            loaded=parts,
            largest=lambda: self.task.inputs(0, 0),
            dropout=any(block.method.dropped() for block in self.blocks),
            savings=[*savings, f"--context below {config.context}"],
        )

    def facts(self, folder: RunFolder, previews: Previews | None) -> Facts:
        """What the report tells of the run."""
        config = self.config
        plain = TextTrainConfig(
            config.texts, method=config.method, output=config.output, run_dir=config.run_dir, device=config.device,
            precision=config.precision,
        )  # fmt: skip
        apart = 0 if self.tokens.held_out is None else len(self.tokens.held_out)
        defaults = resolve_language(plain, parameters=quantized.count(self.base.lm), context=self.info.context)
        return Facts(
            defaults=to_json(defaults) | {"method": TextTrainConfig.method},
            held_out=f"{apart:,} tokens are kept apart to measure on" if apart else "",
        )

    def next_command(self, strength: float | None) -> str:
        """What to type to write with what was learned, at a strength that is suggested."""
        config = self.config
        base = None if config.base == TextTrainConfig.base else config.base
        flags = {"adapter": at_strength(config.output, strength), "base": base, "quantize": config.quantize}
        return next_command("text generate", self._own_words(), flags, self.plugins)

    def _own_words(self) -> str:
        """The first words of what was learned from."""
        words = self.texts.documents[0].text.split(maxsplit=_WORDS)[:_WORDS]
        return " ".join(words)[:_LETTERS].strip()

    def result(self, found: RunResult) -> TextTrainResult:
        """What the run gave."""
        return TextTrainResult(**vars(found), config=self.config, tokens=len(self.tokens.line))

    def training(self) -> dict[str, Any]:
        """Entries of the adapter file's training summary."""
        return {"tokens": len(self.tokens.line)}

    def triggers(self) -> list[str]:
        """The words that were taught."""
        return new_words(self.blocks)


def _check_apart(config: TextTrainConfig, files: Sequence[tuple[str, Path]] = ()) -> None:
    """Raise UserError where a run would write among the texts or into the base that it reads."""
    read = [("text", place) for place in config.texts]
    read += [("--held-out-text", place) for place in config.held_out_text]
    read += [] if config.base == TextTrainConfig.base else [("--base", at_home(Path(config.base)))]
    refuse_overlaps([("--run-dir", language_run(config)), *files], read)


def _check_words_occur(base: LanguageModel, words: Sequence[str], line: Tensor) -> None:
    """Raise UserError for a new word that the text does not say: nothing could be learned of it."""
    for word in words:
        if not bool((line == learned(base.tokenizer)[word]).any()):
            raise UserError(f"the text never says {word!r}, so its meaning cannot be learned from it; write it there")


def _share(config: ResolvedTextConfig, encoded: Sequence[Tensor]) -> float:
    """How much of each text is kept apart."""
    if config.held_out is not None or config.held_out_text:
        return config.held_out or 0.0
    return 0.1 if sum(map(len, encoded)) >= HELD_OUT_FROM * config.context else 0.0


def _split(encoded: Sequence[Tensor], share: float) -> tuple[Tensor, Tensor | None]:
    """One line of tokens to learn from, and one of the ends of all texts."""
    cuts = [len(one) - round(len(one) * share) for one in encoded]
    line = torch.cat([one[:cut] for one, cut in zip(encoded, cuts, strict=True)])
    apart = torch.cat([one[cut:] for one, cut in zip(encoded, cuts, strict=True)])
    return line, apart if len(apart) > 1 else None


def _items(texts: Texts, apart: Texts | None) -> list[dict[str, str]]:
    """What of texts a run depends on."""
    named = [("", one) for one in texts.documents] + [("kept apart: ", one) for one in (apart.documents if apart else ())]
    return [{"name": prefix + document.name, "digest": document.digest} for prefix, document in named]
