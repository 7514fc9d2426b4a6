"""``train``: from a folder of pictures to an adapter file."""

import datetime
import hashlib
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from .. import formats
from ..bases import components, fingerprint
from ..core import site
from ..core.adapter import Method
from ..core.arena import Arena
from ..core.errors import UserError
from ..data.captions import with_trigger
from .blocks import Block, blocks, check_methods
from .checkpoint import Origin, explained
from .config import ResolvedConfig, TrainConfig, to_json
from .diffusion import DiffusionSettings, DiffusionTask
from .preparation import Prepared, check_places, prepare
from .previews import PROMPTS, Previews
from .progress import Bar, Reading, say_to
from .run import RunFolder
from .seeds import global_seed
from .trainer import Interrupted, Observer, Trainer, TrainerSettings

NAME = "trained"  # of the adapter, while it is


@dataclass(frozen=True)
class TrainResult:
    """What a run gave. The losses are those on pictures kept apart, before and after; None where there were none."""

    output: Path
    run_dir: Path
    config: ResolvedConfig
    steps: int
    images: int
    seconds: float
    held_out_before: float | None
    held_out_after: float | None
    base_fingerprint: str


def train(config: TrainConfig, *, pipe: Any | None = None, console: Console | None = None) -> TrainResult:
    """Learn a style from the configuration's folders and write it as one adapter file.

    ``pipe`` is a base that is loaded already, used in place of ``config.base`` and left as it was. What happens is told to
    ``console``, if there is one. Raises UserError for what the user can mend, and Interrupted (a KeyboardInterrupt) where
    a signal stopped the run after it saved a checkpoint.
    """
    began = time.monotonic()
    console = console or Console(quiet=True)
    say = say_to(console)
    check_methods(config)
    folder = check_places(config)
    with Reading(console) as reading:
        prepared = prepare(config, pipe, say, reading)
    parts = components(prepared.pipe)
    before = fingerprint(parts)
    say(f"base fingerprint before training: {before}")
    try:
        run = _Run(prepared, folder, console)
        run.train(config.resume)
        after = fingerprint(parts)
        say(f"base fingerprint after training:  {after}")
        if after != before:
            raise RuntimeError("training changed the base, which no setting may do")
        result = run.save(before, folder.seconds + time.monotonic() - began)
    finally:
        for part in parts.values():
            if NAME in site.names(part):
                site.detach(part, NAME)
    _tell(result, say)
    return result


class _Run:
    """One training: its task, trainer and observers."""

    def __init__(self, prepared: Prepared, folder: RunFolder, console: Console) -> None:
        config = self.config = prepared.config
        self.prepared = prepared
        self.folder = folder
        self.console = console
        self.say = say_to(console)
        self.parts = {name: part for name, part in components(prepared.pipe).items() if name in config.components}
        self.blocks = blocks(config)
        self.rates: dict[str, float] = {}
        groups: dict[str, list[nn.Parameter]] = {}
        for name, part in self.parts.items():
            groups |= self._attach(name, part)
        arena = Arena(groups)
        layers = len({(name, path) for name, part in self.parts.items() for path in site.adapters(part, NAME)})
        told = ", ".join(dict.fromkeys(_named(block.method) for block in self.blocks))
        self.say(f"{told}: {layers} layers, {arena.count:,} parameters; {_plan(config)}")
        self.task = _task(prepared, self.blocks)
        self.trainer = Trainer(self.task, arena, _settings(config, self.rates))
        self.previews = _previews(prepared, folder, self.task, self.trainer)

    def train(self, resume: bool) -> None:
        """Train to the end. Raises Interrupted where a signal ended it early."""
        config, folder = self.config, self.folder
        self.task.offload()
        origin = Origin(to_json(config), _digest(self._pictures()), self.prepared.info.fingerprint)
        if resume:
            self._resume(origin)
        else:
            folder.start(config, self._pictures(), origin)
        if self.trainer.step == 0 and self.previews:
            self.previews.draw_base()
        with Bar(self.console, config.steps, self.trainer.step) as bar:
            watching: list[Observer] = [bar, folder]
            # Previews last: a picture shows what is already on the disk.
            self.trainer.observers = [*watching, self.previews] if self.previews else watching
            finished = self.trainer.run()
        if not finished:
            raise Interrupted(
                f"stopped after step {self.trainer.step} of {config.steps}; go on with: peft-diffusion train --config"
                f" {shlex.quote(str(folder.path / 'config.toml'))} --resume"
            )
        if self.previews:
            self.previews.draw(self.trainer.step)

    def save(self, base: str, seconds: float) -> TrainResult:
        """Write the adapter file with what is worth knowing of it."""
        config, held_out = self.config, self.folder.held_out
        result = TrainResult(
            output=config.output,
            run_dir=config.run_dir,
            config=config,
            steps=self.trainer.step,
            images=len(self.prepared.train.captions),
            seconds=seconds,
            held_out_before=held_out.get(0),
            held_out_after=held_out.get(self.trainer.step),
            base_fingerprint=base,
        )
        with explained(config.output):
            config.output.parent.mkdir(parents=True, exist_ok=True)
        with self.trainer.final_weights():
            formats.save(config.output, self.parts, NAME, self._spec(result))
        return result

    def _attach(self, name: str, part: nn.Module) -> dict[str, list[nn.Parameter]]:
        """Put the adapter on a component; returns its parameters, grouped by learning rate."""
        own = [block for block in self.blocks if block.component == name]
        if not own:
            raise UserError(f"no --block trains {name}; leave it out of --components")
        with global_seed(torch.device("cpu"), self.config.seed, "start", name):
            built = site.attach_all(part, NAME, [(block.method, block.target) for block in own])
        groups: dict[str, list[nn.Parameter]] = {}
        for number, (block, adapters) in enumerate(zip(own, built, strict=True)):
            group = name if block.rate is None else f"{name}.{number}"
            self.rates[group] = _component_rate(self.config, name) if block.rate is None else block.rate
            for adapter in adapters.values():
                adapter.train()  # the base stays in eval mode; dropout belongs to the adapter
                groups.setdefault(group, []).extend(adapter.parameters())
        return groups

    def _resume(self, origin: Origin) -> None:
        found = self.folder.resume(self.config, self._pictures(), origin)
        if found is None:
            self.say("no checkpoint was made yet: the run starts from the beginning")
            return
        self.trainer.load(found.state)
        if self.previews:
            self.previews.forget_after(found.state.step)
        self.say(f"going on from step {found.state.step} of {self.config.steps}")
        planned = found.origin.config["steps"]
        if planned != self.config.steps and self.config.scheduler != "constant":
            self.say(
                f"the run was planned for {planned} steps: from here its {self.config.scheduler} learning rate is that of"
                f" {self.config.steps}, so the result is not quite that of one run of this length"
            )

    def _pictures(self) -> list[dict[str, str]]:
        kept = ("name", "digest", "caption")
        return [{key: getattr(picture, key) for key in kept} for picture in self.prepared.pictures]

    def _spec(self, result: TrainResult) -> formats.Spec:
        config = self.config
        training = to_json(config) | {
            "folder": [path.name for path in config.folder],  # where pictures lie on this disk is nobody's business
            "images": result.images,
            "steps_done": result.steps,
            "seconds": round(result.seconds, 1),
            "held_out_loss": result.held_out_after,
            "held_out_loss_before": result.held_out_before,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        for place in ("output", "run_dir", "cache"):
            del training[place]
        return formats.Spec(
            methods={name: [block.spec() for block in self.blocks if block.component == name] for name in self.parts},
            base=asdict(self.prepared.info),
            triggers=tuple(words for part in config.trigger.split("{}") if (words := part.strip(" ,;:"))),
            training=training,
            title=config.output.stem,
        )


def _task(prepared: Prepared, blocks: Sequence[Block]) -> DiffusionTask:
    config = prepared.config
    settings = DiffusionSettings(
        seed=config.seed,
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        min_snr_gamma=config.min_snr_gamma,
        noise_offset=config.noise_offset,
        dropout=max(getattr(block.method, "dropout", 0.0) for block in blocks),
        rules=prepared.rules,
    )
    return DiffusionTask(prepared.pipe, NAME, settings, prepared.train, prepared.held_out)


def _component_rate(config: ResolvedConfig, name: str) -> float:
    return {"unet": config.unet_lr, "text_encoder": config.text_encoder_lr}[name]


def _named(method: Method) -> str:
    """A method with the hyper-parameter that says most."""
    rank = getattr(method, "rank", None)
    return method.name if rank is None else f"{method.name} of rank {rank}"


def _settings(config: ResolvedConfig, rates: Mapping[str, float]) -> TrainerSettings:
    return TrainerSettings(
        steps=config.steps,
        rates=rates,
        accumulation=config.accumulation,
        scheduler=config.scheduler,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        clip=config.clip,
        ema=config.ema,
        log_every=config.log_every,
        save_every=config.save_every,
    )


def _previews(prepared: Prepared, folder: RunFolder, task: DiffusionTask, trainer: Trainer) -> Previews | None:
    config = prepared.config
    if not config.preview_steps:
        return None
    prompts = prepared.prompts if config.preview_prompts else prepared.prompts[:PROMPTS]
    size = config.resolution // prepared.info.step * prepared.info.step
    often, steps = config.preview_every, config.preview_steps
    return Previews(folder.previews, task, prompts, trainer.final_weights, steps=steps, every=often, size=size)


def _digest(pictures: Sequence[dict[str, str]]) -> str:
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update("\0".join((picture["name"], picture["digest"], picture["caption"], "")).encode())
    return digest.hexdigest()[:16]


def _plan(config: ResolvedConfig) -> str:
    """What was chosen, in a line."""
    rates = {"unet": config.unet_lr, "text_encoder": config.text_encoder_lr}
    told = ", ".join(f"{name} {rates[name]:g}" for name in config.components)
    return (
        f"{config.steps} steps of {config.batch_size * config.accumulation} pictures, learning rate {told}"
        f" ({config.scheduler}), seed {config.seed}, {config.precision}"
    )


def _tell(result: TrainResult, say: Callable[[str], None]) -> None:
    """What was made, and what to type next."""
    config = result.config
    if result.held_out_before is not None and result.held_out_after is not None:
        losses = f"{result.held_out_before:.4f} before, {result.held_out_after:.4f} after"
        say(f"loss on pictures kept apart: {losses} ({result.held_out_after / result.held_out_before - 1:+.0%})")
    size = result.output.stat().st_size / 2**20
    say(
        f"wrote {result.output} ({size:.1f} MiB) after {result.steps} steps on {result.images} pictures,"
        f" {result.seconds:.0f} s; settings, metrics and previews are in {result.run_dir}"
    )
    prompt = with_trigger("a red apple", config.trigger)
    base = "" if config.base == "icons" else f" --base {shlex.quote(config.base)}"
    say(f"next: peft-diffusion generate {shlex.quote(prompt)} --adapter {shlex.quote(str(result.output))}{base}")
