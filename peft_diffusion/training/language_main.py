"""``text train``: from a text to an adapter file for a causal language model."""

import datetime
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from .. import formats
from ..bases import LanguageInfo, LanguageModel, components, describe, load_lm
from ..bases.causal_lm import frozen
from ..bases.loading import pick_device
from ..bases.words import learned, teach
from ..core import quantized
from ..core.arena import Arena
from ..core.errors import UserError
from ..core.settings import pick, to_json
from ..data.text_files import Document, Texts, read_texts
from ..methods.tokens import Tokens
from .loop.trainer import Trainer
from .machine.memory_plan import Clock, Footing
from .machine.processes import Crew
from .machine.processes import crew as together
from .progress import noted, say_to
from .record.facts import about, commands, memory, warned
from .record.run_folder import RunFolder
from .record.trackers import Tracker, check_tracker
from .session import (
    IMPATIENT,
    Attached,
    Outcome,
    Say,
    Session,
    attach,
    base_kept,
    check_run,
    check_writable,
    next_command,
    origin,
    pick_precision,
    save,
    taught,
    told,
    told_rates,
    trainer_settings,
)
from .settings.blocks import Block, blocks, check_methods
from .settings.choices import Precision
from .settings.derive import resolve_language
from .settings.presets import HELD_OUT_FROM
from .settings.text import ResolvedTextConfig, TextTrainConfig, language_output, language_run
from .tasks.language import LanguageSettings, LanguageTask, tokens
from .watch.find_lr import FoundRates, find, refuse_crew


@dataclass(frozen=True)
class TextTrainResult:
    """What a run gave. Losses are nats per token of the text kept apart, None where there was none."""

    output: Path
    run_dir: Path
    config: ResolvedTextConfig
    steps: int
    tokens: int
    seconds: float
    held_out_before: float | None
    held_out_after: float | None
    base_fingerprint: str
    outcome: Outcome | None = None
    """None in a process that does not lead."""

    @property
    def perplexities(self) -> tuple[float, float] | None:
        """On the text kept apart, before and after."""
        if self.held_out_before is None or self.held_out_after is None:
            return None
        return math.exp(self.held_out_before), math.exp(self.held_out_after)


@dataclass(frozen=True)
class _Opened:
    """The texts that were read and the base that was loaded; ``config`` has all values but the steps of epochs."""

    asked: TextTrainConfig
    config: ResolvedTextConfig
    base: LanguageModel
    info: LanguageInfo
    texts: Texts
    apart: Texts | None


@dataclass(frozen=True)
class _Prepared:
    """What a run works on: the base, the tokens to learn from and those kept apart, and what they were made from."""

    config: ResolvedTextConfig
    base: LanguageModel
    info: LanguageInfo
    line: Tensor
    apart: Tensor | None
    items: list[dict[str, str]]


def train_text(
    config: TextTrainConfig, *, base: LanguageModel | None = None, console: Console | None = None
) -> TextTrainResult:
    """Learn from the configuration's text and write what was learned as one adapter file.

    ``base`` is one that is loaded already, used in place of ``config.base`` and left as it was. What happens is told to
    ``console``, if there is one. Raises UserError for what the user can mend, and Interrupted (a KeyboardInterrupt) where
    a signal stopped the run after it saved a checkpoint.
    """
    began = time.monotonic()
    crew, device = together(config.device)
    config = replace(config, device=device)
    console = console if console is not None and crew.leads else Console(quiet=True)
    said: list[str] = []
    say = noted(say_to(console), said)
    check_methods(config)
    check_tracker(config.log_with)
    folder = RunFolder(language_run(config), "text train", "text")
    check_run(folder, language_output(config), resume=config.resume, overwrite=config.overwrite)
    opened = _open(config, base, say)
    chosen, parts = taught(opened.base, blocks(opened.config)), components(opened.base)
    with base_kept(opened.base, parts, say) as fingerprint, folder.closing():
        rate = opened.config.lr
        attached = attach(parts, chosen, config.seed, lambda component: rate)
        teach(opened.base)  # before the texts become tokens
        prepared = _prepare(opened, say, crew)
        trainer = _trainer(prepared, attached, chosen, say, crew)
        session = _session(prepared, folder, console, trainer)
        with _footing(prepared, trainer, chosen).stand(say):
            session.start(config.resume)
            if crew.leads:
                folder.note(**_facts(prepared, trainer, told(parts, chosen, trainer.arena.count), said))
            tracker = Tracker(folder.logs, trainer.step) if config.log_with and crew.leads else None
            clock = Clock(prepared.config.steps, trainer.arena.flat.device, say)
            session.learn([clock, tracker] if tracker else [clock])
            if tracker:
                tracker.finish()
            outcome = session.outcome(parts) if crew.leads else None
        seconds = folder.seconds + time.monotonic() - began
        result = replace(_result(prepared, trainer, folder, seconds, fingerprint), outcome=outcome)
        if outcome is not None:
            result = replace(result, held_out_after=folder.held_out.get(outcome.kept))
        if crew.leads:
            save(result.output, parts, trainer, _spec(prepared, chosen, result))
            folder.finish(seconds=seconds, **memory(), **(outcome.training() if outcome else {}))
        crew.wait()
    _tell(result, say)
    return result


def find_text_rates(
    config: TextTrainConfig, *, base: LanguageModel | None = None, console: Console | None = None
) -> FoundRates:
    """Find a learning rate for a training on text, without doing it: see `find_lr`.

    Nothing is written but ``find_lr.json`` and ``find_lr.png`` in the run folder. Raises as `train_text` does.
    """
    crew, device = together(config.device)
    refuse_crew(crew)
    console = console or Console(quiet=True)
    say = say_to(console)
    config = replace(config, device=device)
    check_methods(config)
    check_writable(language_run(config))
    opened = _open(config, base, say)
    chosen, parts = taught(opened.base, blocks(opened.config)), components(opened.base)
    with base_kept(opened.base, parts, say):
        rate = opened.config.lr
        attached = attach(parts, chosen, config.seed, lambda component: rate)
        teach(opened.base)
        prepared = _prepare(opened, say, crew)
        trainer = _trainer(prepared, attached, chosen, say, crew)
        flags = {"lm": "--lr"} if not config.block else {}
        with _footing(prepared, trainer, chosen).stand(say):
            return find(trainer.task, trainer.arena, trainer.settings, language_run(config), console, flags)


def _base(config: TextTrainConfig, precision: Precision) -> LanguageModel:
    return load_lm(config.base, device=config.device, dtype=precision, quantize=config.quantize)


def _as_asked(base: LanguageModel, quantize: str | None) -> LanguageModel:
    if quantize is not None and quantized.kind_of(base.lm) != quantize:
        raise UserError(f"this base is loaded already, and not as {quantize}; load it with load_lm(..., quantize=...)")
    return base


def _open(config: TextTrainConfig, base: LanguageModel | None, say: Say) -> _Opened:
    """Read the text and load the base; says what it finds. Raises UserError for what cannot be used."""
    texts = read_texts(config.texts)
    for words in texts.describe():
        say(words)
    apart = read_texts(config.held_out_text) if config.held_out_text else None
    precision = pick_precision(config.precision, pick_device(config.device))
    base = _base(config, precision) if base is None else _as_asked(frozen(base), config.quantize)
    info = describe(base)
    say(f"base {info.name}: {info.architecture}, {info.vocabulary:,} tokens, context {info.context}")
    asked = replace(config, precision=precision)
    first = resolve_language(asked, parameters=quantized.count(base.lm), context=info.context)
    return _Opened(asked, first, base, info, texts, apart)


def _prepare(opened: _Opened, say: Say, crew: Crew) -> _Prepared:
    """Make tokens, and steps of epochs; says what it finds. Raises UserError for what cannot be used."""
    base, info, first, texts, apart = opened.base, opened.info, opened.config, opened.texts, opened.apart
    encoded = [tokens(base, [document.text]) for document in texts.documents]
    line, kept = _split(encoded, _share(first, encoded))
    if apart is not None:
        kept = tokens(base, [document.text for document in apart.documents])
    if len(line) < 2:
        raise UserError("the text is but one token; there is nothing to learn from it")
    _check_said(base, _placeholders(opened.config), line)
    windows = LanguageTask(base, _settings(first, crew), line).windows
    resolved = resolve_language(
        opened.asked, parameters=quantized.count(base.lm), context=info.context, windows=windows / crew.size
    )
    if resolved.patience and kept is None:
        say(IMPATIENT)
    say(f"{len(line):,} tokens to learn from, in {windows} windows of up to {resolved.context}; {_apart_line(kept)}")
    items = _items(texts.documents, "") + (_items(apart.documents, "kept apart: ") if apart else [])
    return _Prepared(resolved, base, info, line, kept, items)


def _placeholders(config: TextTrainConfig) -> list[str]:
    """The new words that a run teaches."""
    return [name for block in blocks(config) if isinstance(block.method, Tokens) for name in block.method.names]


def _check_said(base: LanguageModel, words: Sequence[str], line: Tensor) -> None:
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


def _apart_line(apart: Tensor | None) -> str:
    if apart is None:
        return "none are kept apart to measure on (--held-out 0.1 keeps a tenth)"
    return f"{len(apart):,} are kept apart: the perplexity on them shows when to stop"


def _items(documents: Sequence[Document], prefix: str) -> list[dict[str, str]]:
    return [{"name": prefix + document.name, "digest": document.digest} for document in documents]


def _settings(config: ResolvedTextConfig, crew: Crew) -> LanguageSettings:
    return pick(LanguageSettings, config, {"crew": crew})


def _trainer(prepared: _Prepared, attached: Attached, chosen: Sequence[Block], say: Say, crew: Crew) -> Trainer:
    config, parts = prepared.config, components(prepared.base)
    arena = Arena(attached.groups)
    size = config.batch_size * config.accumulation * crew.size
    rates = told_rates(attached.rates) if len(attached.rates) > 1 else f"{next(iter(attached.rates.values())):g}"
    plan = f"{config.steps} steps of {size} windows, learning rate {rates}"
    say(f"{told(parts, chosen, arena.count)}; {plan} ({config.scheduler}), seed {config.seed}, {config.precision}")
    task = LanguageTask(prepared.base, _settings(config, crew), prepared.line, prepared.apart)
    return Trainer(task, arena, trainer_settings(config, attached), crew=crew)


def _footing(prepared: _Prepared, trainer: Trainer, chosen: Sequence[Block]) -> Footing:
    config, parts = prepared.config, tuple(components(prepared.base).values())
    savings = ["--batch-size 1 with --accumulation"] if config.batch_size > 1 else []
    savings += [] if config.quantize == "nf4" else ["--quantize nf4"]
    return Footing(
        memory=config.memory,
        trainer=trainer,
        parts=parts,
        loaded=parts,
        largest=lambda: trainer.task.inputs(0, 0),
        chance=any(getattr(block.method, "dropout", 0.0) for block in chosen),
        savings=[*savings, f"--context below {config.context}"],
    )


def _session(prepared: _Prepared, folder: RunFolder, console: Console, trainer: Trainer) -> Session:
    return Session(
        config=prepared.config,
        folder=folder,
        console=console,
        trainer=trainer,
        origin=origin(prepared.config, prepared.items, prepared.info.fingerprint, trainer.crew),
        items=prepared.items,
        command="text train",
        held_out_line=lambda loss: f"text kept apart: loss {loss:.4f}, perplexity {math.exp(loss):.2f}",
    )


def _result(prepared: _Prepared, trainer: Trainer, folder: RunFolder, seconds: float, fingerprint: str) -> TextTrainResult:
    config = prepared.config
    return TextTrainResult(
        output=config.output,
        run_dir=config.run_dir,
        config=config,
        steps=trainer.step,
        tokens=len(prepared.line),
        seconds=seconds,
        held_out_before=folder.held_out.get(0),
        held_out_after=folder.held_out.get(trainer.step),
        base_fingerprint=fingerprint,
    )


def _spec(prepared: _Prepared, chosen: Sequence[Block], result: TextTrainResult) -> formats.Spec:
    config = prepared.config
    training = to_json(config) | {
        # Where texts lie on this disk is nobody's business.
        "texts": [path.name for path in config.texts],
        "held_out_text": [path.name for path in config.held_out_text],
        "tokens": result.tokens,
        "steps_done": result.steps,
        "seconds": round(result.seconds, 1),
        "held_out_loss": result.held_out_after,
        "held_out_loss_before": result.held_out_before,
        **(result.outcome.training() if result.outcome else {}),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    for place in ("output", "run_dir"):
        del training[place]
    return formats.Spec(
        methods={"lm": tuple(block.spec() for block in chosen)},
        base=asdict(prepared.info),
        triggers=tuple(_placeholders(config)),
        training=training,
        title=config.output.stem,
    )


def _tell(result: TextTrainResult, say: Say) -> None:
    """What was made, and what to type next."""
    config = result.config
    if result.perplexities is not None:
        before, after = result.perplexities
        say(f"perplexity on text kept apart: {before:.2f} before, {after:.2f} after ({after / before - 1:+.0%})")
    size = result.output.stat().st_size / 2**20
    say(
        f"wrote {result.output} ({size:.1f} MiB) after {result.steps} steps on {result.tokens:,} tokens,"
        f" {result.seconds:.0f} s; settings, metrics and report.html are in {result.run_dir}"
    )
    say(f"next: {_next(config)}")


def _next(config: ResolvedTextConfig) -> str:
    base = None if config.base == TextTrainConfig.base else config.base
    flags = {"adapter": str(config.output), "base": base, "quantize": config.quantize}
    return next_command("text generate", "The first words", flags)


def _facts(prepared: _Prepared, trainer: Trainer, what: str, said: list[str]) -> dict[str, Any]:
    """What the report tells of the run besides its settings and measurements."""
    config, info = prepared.config, prepared.info
    plain = TextTrainConfig(
        config.texts, method=config.method, output=config.output, run_dir=config.run_dir, device=config.device,
        precision=config.precision,
    )  # fmt: skip
    defaults = resolve_language(plain, parameters=quantized.count(prepared.base.lm), context=info.context)
    apart = 0 if prepared.apart is None else len(prepared.apart)
    return {
        "about": about(what, trainer.arena.count, info.name, info.fingerprint),
        "defaults": to_json(defaults) | {"method": TextTrainConfig.method},
        "warnings": warned(said),
        "said": said,
        "apart": f"{apart:,} tokens are kept apart to measure on" if apart else "",
        "commands": commands("text train", config.run_dir, _next(config)),
    }
