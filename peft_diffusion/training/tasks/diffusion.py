"""What is learned from pictures: to take the noise out of their latents, told their captions."""

import math
import random
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...bases import components, denoiser_of
from ...bases.denoiser import Conditioning, Denoiser
from ...bases.noise import prediction_type, zero_terminal
from ...bases.pipelines import Pipeline
from ...bases.prompts import Reading, encode_frozen, together, with_prompts
from ...core import site
from ...core.adapter import parts_of
from ...core.errors import UserError
from ...core.events import Observer, progress, untold
from ...data import inpainting_masks
from ...data.buckets import Batch, Bucket, batches, repeated, steps_per_epoch
from ...data.captions import CaptionRules
from ...data.latents import LatentCache, TextCache, cache_text, ready
from ...fast import frozen_ops
from ..attachment import at_strength, evaluating
from ..events import Signals
from ..loop.seeds import generator, global_seed, seed_of
from ..machine.preflight import peak
from ..machine.processes import Processes
from ..settings.choices import HuberSchedule, Loss, PriorTarget, TimestepBias
from ..settings.pictures import timestep_range
from . import objective, prediction
from .layer_changes import layer_changes

_DRAWS = 8  # noises and timesteps per held-out picture
_SEEN = 4  # pictures of those trained on that are measured too: enough to tell learning by heart, and little time
_COMPARED = 512  # training pictures that previews are compared with, at most
# Prompts of many things, without trigger, and where in the schedule they are asked: there, noise alone is what the UNet
# is used to seeing, whatever the picture.
_OTHER_PROMPTS = (
    "a red apple", "a photo of a dog", "a house by a lake", "a portrait of a woman", "a car", "a tree", "a bird", "a city",
)  # fmt: skip
_OTHER_PLACES = (0.65, 0.9)
_OF_BASE = "of_base_"  # what names of tokens begin with that the base reads in place of the batch's


@dataclass(frozen=True)
class Examples:
    """Pictures as latents, and for each picture, by the index that its latents name, a caption, how often an epoch draws
    it, what it counts in the loss, and how its caption becomes a prompt; once, 1 and as the run has it where that is not
    said. A picture in several sizes or cut-outs is here as often."""

    latents: LatentCache
    captions: Sequence[str]
    repeats: Sequence[int] = ()
    weights: Sequence[float] = ()
    rules: Sequence[CaptionRules] = ()

    @property
    def groups(self) -> dict[Bucket, tuple[int, ...]]:
        """The entries of each bucket, each as often as an epoch draws it."""
        groups = self.latents.groups
        return repeated(groups, [self.repeats[one.picture] for one in self.latents.entries]) if self.repeats else groups

    @property
    def masked(self) -> bool:
        """Whether only a part of some picture is learned."""
        return any(one.where is not None for one in self.latents.entries)

    def weight(self, entry: int) -> float:
        """Tell what an entry counts in the loss.

        Args:
            entry: Of the cache.

        Returns:
            Its weight, 1 where none was said.
        """
        return self.weights[self.latents.entries[entry].picture] if self.weights else 1.0

    def where(self, entries: Sequence[int]) -> Tensor:
        """Tell what of each image is learned.

        Args:
            entries: Of the cache, in one bucket.

        Returns:
            (batch, 1, height, width) from 0 to 1, at the latents' size.
        """
        chosen = [self.latents.entries[entry] for entry in entries]
        return torch.stack([torch.ones_like(one.mean[:1]) if one.where is None else one.where for one in chosen])

    def caption(self, entry: int) -> str:
        """Give the caption of an entry.

        Args:
            entry: Of the cache.

        Returns:
            The caption as written.
        """
        return self.captions[self.latents.entries[entry].picture]

    def rule(self, entry: int, usual: CaptionRules) -> CaptionRules:
        """Tell how the caption of an entry becomes a prompt.

        Args:
            entry: Of the cache.
            usual: The rules of the run.

        Returns:
            Its rules.
        """
        return self.rules[self.latents.entries[entry].picture] if self.rules else usual

    def plain(self, usual: CaptionRules) -> list[str]:
        """Give the prompts of all pictures for measuring and drawing.

        Args:
            usual: The rules of the run.

        Returns:
            One each.
        """
        rules = self.rules or [usual] * len(self.captions)
        return [rule.plain(caption) for rule, caption in zip(rules, self.captions, strict=True)]


@dataclass(frozen=True)
class DiffusionSettings:
    """How the loss is made. ``min_snr_gamma`` 0 weighs every timestep alike; ``batch_size`` is that of each process, and
    there are as many pictures of the class besides, where there are any. ``others`` are adapters that are on the pipeline
    and stay as they are; in a share ``beside_dropout`` of the steps they are off."""

    seed: int = 0
    batch_size: int = 1
    accumulation: int = 1
    min_snr_gamma: float = 0.0
    timestep_bias: TimestepBias = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    timesteps: str = ""
    noise_offset: float = 0.0
    multires_noise: float = 0.0
    zero_terminal_snr: bool = False
    loss: Loss = "l2"
    huber_c: float = 0.1
    huber_schedule: HuberSchedule = "snr"
    debiased: bool = False
    reading: Reading = field(default_factory=lambda: Reading("none"))
    prior_weight: float = 1.0
    prior_target: PriorTarget = "base"
    dropout: float = 0.0
    others: tuple[str, ...] = ()
    beside_dropout: float = 0.0
    processes: Processes = field(default_factory=Processes)
    rules: CaptionRules = field(default_factory=CaptionRules)


class DiffusionTask:
    """The loss of a pipeline that carries the adapter ``name``, on examples; and on others that are never trained on.

    ``prior`` are pictures of the class, some in every bucket of the examples: each step learns from as many of them to
    answer as the base does, or to draw them (prior preservation, Ruiz et al. 2022, https://arxiv.org/abs/2208.12242).
    Every picture counts alike in an epoch, times its repeats: a batch that copies fill counts less (`Batch.weights`).
    All chance comes from the seed, the step and the micro-batch. Latents and, with a frozen text encoder and fixed
    captions, embeddings are computed before, of which ``tell`` is told; `offload` then takes what is idle off the device.
    """

    def __init__(
        self,
        pipe: Pipeline,
        name: str,
        settings: DiffusionSettings,
        train: Examples,
        held_out: Examples | None = None,
        prior: Examples | None = None,
        tell: Observer = untold,
    ) -> None:
        self.pipe = pipe
        self.name = name
        self.settings = settings
        self.train = train
        self.unseen = held_out
        self.prior = prior
        self.tell = tell
        self.prior_rules = settings.rules.of_class()
        self.masked = train.masked or (prior is not None and prior.masked)
        self.groups = train.groups
        # Filled batches hold copies, which count less.
        self.fills = any(len(entries) % (settings.batch_size * settings.processes.size) for entries in self.groups.values())
        self.weighs = prior is not None or bool(train.weights) or self.fills
        self.denoiser = denoiser_of(pipe)
        weight = next(self.denoiser.network.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.text = self.denoiser.text.read_as(settings.reading)
        of_text = [one for encoder in self.text.encoders for one in site.adapters(encoder, name).values()]
        self.trains_text = bool(of_text)
        self.precedes = any(part.precedes for adapter in of_text for part in parts_of(adapter))
        self.prediction = prediction_type(self.denoiser.prediction)
        self.powers = noise_schedule(self.denoiser, settings.zero_terminal_snr).to(self.device)
        self.chosen_timesteps = _timesteps(settings, len(self.powers))
        self._epoch: tuple[int, tuple[Batch, ...]] = (-1, ())
        self._base_answers: list[Tensor] = []

    @cached_property
    def embeddings(self) -> TextCache | None:
        """Embeddings of every prompt that can come up; None where they change or are too many to list."""
        rules = self.settings.rules
        used = [rule for one in (self.train, self.prior) if one for rule in one.rules or [rules]]
        if self.trains_text or any(rule.varies for rule in used):
            return None
        prompts = ["", *self.train.plain(rules), *(self.unseen.plain(rules) if self.unseen else ())]
        prompts += self.prior.plain(self.prior_rules) if self.prior else []
        return self._encoded_text(prompts)

    @cached_property
    def embeddings_alone(self) -> TextCache | None:
        """The same without the adapters that are trained beside; where these leave the text alone, those with them."""
        told = (site.adapters(encoder, other) for encoder in self.text.encoders for other in self.settings.others)
        if self.embeddings is None or not self.settings.beside_dropout or not any(told):
            return self.embeddings
        with self._without(self.settings.others):
            return self._encoded_text(list(self.embeddings))

    @cached_property
    def other_embeddings(self) -> TextCache | None:
        """Embeddings of the prompts that leakage is measured on; apart, so that those of the pictures keep their bits."""
        if self.embeddings is None:
            return None
        return self._encoded_text(_OTHER_PROMPTS)

    def _encoded_text(self, prompts: Sequence[str]) -> TextCache:
        """Embeddings of prompts, each of its own length."""
        distinct = list(dict.fromkeys(prompts))
        lengths = dict(zip(distinct, self.text.chunks(distinct), strict=True))
        rows: dict[str, tuple[Tensor, ...]] = {}
        tick = progress(self.tell, "encoding captions")
        for length in sorted(set(lengths.values())):
            alike = [prompt for prompt in distinct if lengths[prompt] == length]
            told = partial(_of_all, tick, len(rows), len(distinct))
            rows |= cache_text(alike, lambda batch: encode_frozen(self.text, batch), on_progress=told)
        return TextCache(rows)

    def inputs(self, step: int, micro: int) -> dict[str, Tensor]:
        """Make what one micro-batch is computed from, all its chance in it.

        Args:
            step: From 0.
            micro: The micro-batch of the step, from 0.

        Returns:
            Tensors by name, on the CPU.
        """
        alone = self.alone(step)
        embeddings = self.embeddings_alone if alone else self.embeddings
        # Soft prompts of the others stand before a prompt that is read anew only where the others are on.
        with self._without(self.settings.others if alone and embeddings is None else ()):
            return self._inputs(step, micro, embeddings)

    def _inputs(self, step: int, micro: int, embeddings: TextCache | None) -> dict[str, Tensor]:
        """The same, with the embeddings of the prompts; None where these are read anew."""
        seed, batch = self.settings.seed, self.batch(step, micro)
        chances = [random.Random(seed_of(seed, "caption", step, micro, row)) for row in range(len(batch.indices))]
        prompts = self._prompts(self.train, batch.indices, self.settings.rules, chances)
        found = self._drawn(self.train, batch.indices, prompts, generator(seed, "noise", step, micro), embeddings)
        if self.fills:
            share = sum(batch.weights) / len(batch.weights)
            weights = batch.weights[self.settings.processes.part(self.settings.batch_size)]
            found["weights"] *= torch.tensor([weight / share for weight in weights])
            found["shares"] = torch.full((len(weights),), share)
        if self.prior is None:
            return found
        entries = self.prior_entries(batch.bucket, step, micro)
        chances = [random.Random(seed_of(seed, "prior caption", step, micro, row)) for row in range(len(entries))]
        prompts = self._prompts(self.prior, entries, self.prior_rules, chances)
        kept = self._drawn(self.prior, entries, prompts, generator(seed, "prior noise", step, micro), embeddings)
        kept["weights"] *= self.settings.prior_weight
        kept |= {name: found[name] for name in ("shares",) if name in found}  # the class counts as much as what is learned
        # Twice each: the loss is the mean over both, and shall be the sum of the means of each.
        both = {name: tensor * (2 if name == "weights" else 1) for name, tensor in together(found, kept).items()}
        return both | self._read_by_base(prompts[self.settings.processes.part(self.settings.batch_size)])

    def _read_by_base(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts of the class as the base reads them, where the adapter is a soft prompt, which is not to stand before them
        then; nothing else, as both read the same."""
        if not self.precedes or self.settings.prior_target != "base":
            return {}
        with self._base():
            return {_OF_BASE + name: tensor for name, tensor in self.text.tokenized(prompts).items()}

    @staticmethod
    def _prompts(
        examples: Examples, entries: Sequence[int], usual: CaptionRules, chances: Sequence[random.Random]
    ) -> list[str]:
        """The prompts of one step, by the chance of each."""
        pairs = zip(entries, chances, strict=True)
        return [examples.rule(entry, usual).prompt(examples.caption(entry), chance) for entry, chance in pairs]

    def prior_entries(self, bucket: Bucket, step: int, micro: int) -> tuple[int, ...]:
        """Draw the class images of a micro-batch of all processes, without one twice where there are enough.

        Args:
            bucket: That of the micro-batch.
            step: From 0.
            micro: The micro-batch of the step, from 0.

        Returns:
            Entries of the cache.
        """
        if self.prior is None:
            return ()
        there = self.prior.groups[bucket]
        count = self.settings.batch_size * self.settings.processes.size
        chance = random.Random(seed_of(self.settings.seed, "prior", step, micro))
        drawn = chance.sample(there, min(count, len(there)))
        return tuple(drawn[row % len(drawn)] for row in range(count))

    def _drawn(
        self,
        examples: Examples,
        entries: Sequence[int],
        prompts: Sequence[str],
        chance: torch.Generator,
        embeddings: TextCache | None,
    ) -> dict[str, Tensor]:
        """Noisy latents to be, and what is told with them, for this process's part of a batch."""
        settings, latents = self.settings, examples.latents
        mean, std = latents.stack(entries)
        clean = mean.float() + std.float() * torch.randn(mean.shape, generator=chance)
        noise = objective.noise(tuple(mean.shape), settings.noise_offset, chance)
        timesteps = objective.timesteps(len(mean), len(self.powers), self.chosen_timesteps, chance)
        hiding = (
            torch.randint(inpainting_masks.COUNT, (len(mean),), generator=chance).tolist() if self.denoiser.inpaints else ()
        )
        if settings.multires_noise:
            noise = objective.pyramid(noise, settings.multires_noise, chance)
        # Everything is drawn for the batch of all processes, so that their number changes nothing.
        own = settings.processes.part(settings.batch_size)
        found = {"latents": self.denoiser.scaled(clean)[own], "noise": noise[own], "timesteps": timesteps[own]}
        if self.weighs:
            found["weights"] = torch.tensor([examples.weight(entry) for entry in entries[own]])
        if self.masked:
            found["where"] = examples.where(entries[own])
        return found | self._conditioning_inputs(latents, entries[own], prompts[own], hiding[own], embeddings)

    def largest(self) -> dict[str, Tensor]:
        """The inputs of the micro-batch with the most pixels, of those of a pass over the pictures."""
        settings, entries = self.settings, self.train.latents.entries
        count = steps_per_epoch(self.groups, settings.batch_size * settings.processes.size)
        places = [divmod(number, settings.accumulation) for number in range(count)]
        sizes = [sum(entries[one].mean[0].numel() for one in self.batch(*place).indices) for place in places]
        return self.inputs(*places[sizes.index(max(sizes))])

    def seeded(self, step: int, micro: int) -> AbstractContextManager[object]:
        """Put torch's generators at the seed of a micro-batch, where anything draws from them, and others off in some steps.

        Args:
            step: From 0.
            micro: The micro-batch of the step, from 0.

        Returns:
            A context, after which they are as they were.
        """
        stack, settings = ExitStack(), self.settings
        if settings.dropout:
            parts = settings.processes.seed_parts()
            stack.enter_context(global_seed(self.device, settings.seed, "dropout", step, micro, *parts))
        if self.alone(step):
            stack.enter_context(self._without(settings.others))
        return stack

    def alone(self, step: int) -> bool:
        """Tell whether the adapters that are trained beside are off in a step.

        Args:
            step: From 0.

        Returns:
            Whether they are.
        """
        share = self.settings.beside_dropout
        return share > 0 and random.Random(seed_of(self.settings.seed, "beside", step)).random() < share

    def loss(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Compute the loss of one micro-batch.

        Args:
            inputs: From `inputs`, on the device.

        Returns:
            A float32 scalar with gradients to the adapter.
        """
        settings, timesteps = self.settings, inputs["timesteps"]
        of_base = self._base_answer(inputs)
        answer, wanted = self.answer(inputs)
        if of_base is not None:
            wanted = torch.cat([wanted[: settings.batch_size].float(), of_base.float()])
        power = self.powers[timesteps]
        deltas = None
        if settings.loss != "l2":
            count = len(self.powers)
            deltas = objective.huber_deltas(settings.huber_schedule, settings.huber_c, timesteps, power, count)
        errors = objective.errors(answer, wanted, settings.loss, deltas)
        loss = objective.weighted(objective.per_image(errors, inputs.get("where")), self._weights(inputs, power))
        return objective.counted(loss, inputs["shares"][0]) if self.fills else loss

    @torch.no_grad()
    def fitting_prediction(self, entries: Sequence[int] | None = None, seed: int = 0) -> str | None:
        """Test what the base predicts, on pictures with much noise: see `prediction.fitting`.

        Args:
            entries: Of the training pictures; by default the first ones.
            seed: Of the noise.

        Returns:
            ``epsilon`` or ``v_prediction``; None where neither fits, and for a flow, which is another process.
        """
        if self.prediction not in prediction.TESTED:
            return None
        chosen = list(range(len(self.train.latents.entries)))[: prediction.PICTURES] if entries is None else list(entries)
        cases = [(entry, place) for entry in chosen for place in prediction.places(self.powers.cpu())]
        found: list[prediction.Answers] = []
        with self.evaluating(), self._base(), frozen_ops.in_torch():
            for number, (entry, place) in enumerate(cases):
                mean, _ = self.train.latents.stack([entry])
                latents = self.denoiser.scaled(mean.float())
                noise = objective.noise(tuple(mean.shape), 0.0, generator("prediction", seed, number))
                prompts = [self._plain(self.train, entry)]
                inputs = {"latents": latents, "noise": noise, "timesteps": torch.tensor([place])}
                inputs |= self._conditioning_inputs(self.train.latents, [entry], prompts, [0])
                answer, _ = self.answer({name: tensor.to(self.device) for name, tensor in inputs.items()})
                power = self.powers[place].cpu()
                found.append(prediction.Answers(answer.float().cpu(), latents, noise, power))
        return prediction.fitting(found)

    def held_out(self) -> float | None:
        """The plain loss on the pictures kept apart: fixed noise, timesteps spread evenly, whatever the run's settings."""
        return None if self.unseen is None else self._fixed_loss(self.unseen, self._chunks(self.unseen))

    def signals(self) -> Signals:
        """The plain loss on a few training pictures, and how far the answers to prompts without trigger left the base's."""
        parts = {name: part for name, part in components(self.pipe).items() if site.adapters(part, self.name)}
        seen = self._fixed_loss(self.train, self._chunks(self.train, self.watched()))
        changes = layer_changes(parts, self.name)
        # Where nothing has changed yet, nothing has moved: the start of a run need not look.
        return Signals(seen, self.leakage() if any(changes.values()) else 0.0, changes)

    @torch.no_grad()
    def nearness(self, pictures: Sequence[Image.Image]) -> float | None:
        """Compare pictures with those that are trained on.

        Args:
            pictures: Drawn ones.

        Returns:
            The mean distance to the nearest training image, over the median of that among the latter, as root mean squares
            in latent space. None where there are not two training images of that size.
        """
        latents = self._encoded(pictures)
        seen = [entry.mean for entry in self.train.latents.entries if entry.mean.shape == latents.shape[1:]][:_COMPARED]
        if len(seen) < 2:
            return None
        rows = torch.stack(seen).float().flatten(1)
        among = torch.cdist(rows, rows).fill_diagonal_(math.inf).amin(1).median()
        found = torch.cdist(latents.flatten(1), rows).amin(1).mean()
        return float(found / among) if among > 0 else None

    def _encoded(self, pictures: Sequence[Image.Image]) -> Tensor:
        """The means of the VAE's latents, (pictures, channels, height, width), float32 on the CPU."""
        vae = self.denoiser.vae
        vae.to(self.device)
        pixels = torch.stack([torch.from_numpy(np.array(picture.convert("RGB"))) for picture in pictures])
        encoder: Any = ready(vae)
        given = (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).to(self.device, next(encoder.parameters()).dtype)
        means = [encoder.encode(one[None]).latent_dist.mean.float().cpu() for one in given]
        if self.device.type != "cpu":
            vae.to("cpu")
        return torch.cat(means)

    def watched(self) -> frozenset[int]:
        """Entries of the training pictures that are measured on, spread over all of them."""
        count = len(self.train.captions)
        return frozenset(range(0, count, -(-count // _SEEN)))

    def _fixed_loss(self, examples: Examples, chunks: Iterator[list[tuple[int, int]]]) -> float:
        with torch.no_grad(), self.evaluating():
            losses = [loss for chunk in chunks for loss in self._fixed_losses(examples, chunk)]
        return sum(losses) / len(losses)

    def losses(self, examples: Examples) -> list[float]:
        """Measure the plain loss of each picture: fixed noise, timesteps spread evenly, whatever the run's settings.

        Args:
            examples: The pictures, each once.

        Returns:
            The mean over noises and timesteps, by entry of the cache.
        """
        chunks = list(self._chunks(examples))
        with torch.no_grad(), self.evaluating():
            found = {
                pair: loss for chunk in chunks for pair, loss in zip(chunk, self._fixed_losses(examples, chunk), strict=True)
            }
        return [sum(found[entry, draw] for draw in range(_DRAWS)) / _DRAWS for entry in range(len(examples.latents.entries))]

    def leakage(self) -> float:
        """The rms of what the adapter changes in answers to other prompts, on fixed noise, over that of the base's."""
        with torch.no_grad(), self.evaluating():
            if not self._base_answers:
                with at_strength(self._components(), self.name, 0.0):
                    self._base_answers = list(self._other_answers())
            moved = [now - was for now, was in zip(self._other_answers(), self._base_answers, strict=True)]
        return math.sqrt(_energy(moved) / max(1e-12, _energy(self._base_answers)))

    def _other_answers(self) -> Iterator[Tensor]:
        """What the UNet says to noise and prompts without trigger, in batches no larger than those of training."""
        entry = max(self.groups.values(), key=len)[0]
        latents = self.train.latents
        shape = tuple(latents.entries[entry].mean.shape)
        cases = [(prompt, place) for place in _OTHER_PLACES for prompt in _OTHER_PROMPTS]
        for start in range(0, len(cases), self.settings.batch_size):
            chunk = cases[start : start + self.settings.batch_size]
            chances = [generator("leakage", start + row) for row in range(len(chunk))]
            prompts = [prompt for prompt, _ in chunk]
            told = self._conditioning_inputs(latents, [entry] * len(chunk), prompts, [0] * len(chunk), self.other_embeddings)
            drawn = torch.cat([objective.noise((1, *shape), 0.0, chance) for chance in chances])
            times = torch.tensor([int(place * len(self.powers)) for _, place in chunk])
            inputs = {"latents": torch.zeros_like(drawn), "noise": drawn, "timesteps": times, **told}
            yield self.answer({name: tensor.to(self.device) for name, tensor in inputs.items()})[0].float()

    def batch(self, step: int, micro: int) -> Batch:
        """List the entries of a micro-batch, of all processes.

        Args:
            step: From 0.
            micro: The micro-batch of the step, from 0.

        Returns:
            The batch.
        """
        size, seed = self.settings.batch_size * self.settings.processes.size, self.settings.seed
        epoch, index = divmod(step * self.settings.accumulation + micro, steps_per_epoch(self.groups, size))
        if self._epoch[0] != epoch:
            self._epoch = epoch, batches(self.groups, size, seed_of(seed, "order"), epoch)
        return self._epoch[1][index]

    def offload(self) -> None:
        """Compute what stays the same, and take the VAE and a text encoder that is no more needed off the device."""
        known = all(one is not None for one in (self.embeddings, self.embeddings_alone, self.other_embeddings))
        if self.device.type != "cpu":
            self.denoiser.vae.to("cpu")
            for encoder in self.text.encoders if known else ():
                encoder.to("cpu")

    def peak_of_drawing(self, count: int, size: int) -> int:
        """Predict the most bytes that drawing holds, with guidance.

        Args:
            count: Pictures at once.
            size: Pixels a side.

        Returns:
            Bytes.
        """
        vae, side = self.denoiser.vae, size // self.denoiser.factor
        told = {name: one[:1].repeat(2 * count, *(1,) * (one.ndim - 1)) for name, one in self.largest().items()}
        latents = {"latents": torch.empty(count, self.denoiser.channels, side, side, dtype=vae.dtype)}
        self.restore()
        with torch.no_grad():
            network = peak(self.answer, told, self.device)
            decoding = peak(lambda given: vae.decode(given["latents"]), latents, self.device)
        self.offload()
        return max(network, decoding)

    def restore(self) -> None:
        """Bring back what `offload` took."""
        self.denoiser.vae.to(self.device)
        for encoder in self.text.encoders:
            encoder.to(self.device)

    def evaluating(self) -> AbstractContextManager[None]:
        """The adapter without its dropout."""
        return evaluating(self._components(), self.name)

    def _weights(self, inputs: Mapping[str, Tensor], power: Tensor) -> Tensor | None:
        """What each image counts: by its timestep, its folder, and whether it is of the class."""
        weights, gamma = inputs.get("weights"), self.settings.min_snr_gamma
        if gamma:
            of_steps = objective.min_snr_weights(self.prediction, power, gamma)
        elif self.settings.debiased:
            of_steps = objective.debiased_weights(self.prediction, power)
        else:
            return weights
        return of_steps if weights is None else of_steps * weights

    def _base_answer(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """What the base says to the pictures of the class; None where the pictures themselves are learned."""
        if self.prior is None or self.settings.prior_target != "base":
            return None
        both = {name: tensor for name, tensor in inputs.items() if not name.startswith(_OF_BASE)}
        of_class = {name: tensor[self.settings.batch_size :] for name, tensor in both.items()}
        read = {name.removeprefix(_OF_BASE): tensor for name, tensor in inputs.items() if name.startswith(_OF_BASE)}
        with torch.no_grad(), self._base():
            return self.answer(with_prompts(of_class, read) if read else of_class)[0]

    def _base(self) -> ExitStack:
        """The base without the adapter."""
        return self._without([self.name])

    def _without(self, names: Sequence[str]) -> ExitStack:
        """The pipeline without some adapters."""
        stack = ExitStack()
        for part in self._components():
            if (strengths := site.strengths(part)) is not None:
                for name in names:
                    if name in strengths.names:
                        stack.enter_context(strengths.without(name))
        return stack

    def _components(self) -> list[nn.Module]:
        return list(components(self.pipe).values())

    def _plain(self, examples: Examples, entry: int) -> str:
        """The prompt of an entry, without dropout or shuffling."""
        return examples.rule(entry, self.settings.rules).plain(examples.caption(entry))

    def _conditioning_inputs(
        self,
        latents: LatentCache,
        entries: Sequence[int],
        prompts: Sequence[str],
        hiding: Sequence[int],
        embeddings: TextCache | None = None,
    ) -> dict[str, Tensor]:
        """What the UNet is told besides noisy latents: text, and sizes and masks where it was trained to be told them.

        ``embeddings`` are those of the prompts, where they are not the examples'.
        """
        told: dict[str, Tensor] = {}
        embeddings = embeddings or self.embeddings
        if embeddings is not None:
            told |= zip(("hidden", "summary"), embeddings.stack(prompts), strict=False)
        else:
            told |= self.text.tokenized(prompts)
        if self.denoiser.size_conditioned:
            # In float32: bfloat16 rounds sides of more than 256 pixels.
            told["sizes"] = torch.tensor([latents.entries[entry].sizes for entry in entries], dtype=torch.float32)
        if self.denoiser.inpaints:
            told["inpainting"] = self.inpainting_inputs(latents, entries, hiding)
        return told

    def conditioning(self, inputs: Mapping[str, Tensor]) -> Conditioning:
        """Say what the denoiser is told of the prompts and of the sizes of the images, in its dtype.

        Args:
            inputs: Those of the batch: embeddings, or tokens where text encoders learn.

        Returns:
            The conditioning.
        """
        if self.embeddings is not None:
            encoding = [inputs[name] for name in ("hidden", "summary") if name in inputs]
        else:
            with torch.set_grad_enabled(self.trains_text and torch.is_grad_enabled()):
                encoding = list(self.text.run(inputs))
        return self.denoiser.conditioning(tuple(encoding), inputs)

    def inpainting_inputs(self, latents: LatentCache, entries: Sequence[int], hiding: Sequence[int]) -> Tensor:
        """Make what a base that paints parts anew is told of the rest.

        Args:
            latents: The cache, with masks.
            entries: Of the cache.
            hiding: The number of each entry's mask.

        Returns:
            Mask and latents, (batch, 1 + channels, height, width).

        Raises:
            ValueError: The latents were cached without masks.
        """
        rows = []
        for entry, number in zip(entries, hiding, strict=True):
            one = latents.entries[entry]
            if one.masks is None or one.hidden is None:
                raise ValueError("the latents were cached without masks")
            rows.append(torch.cat([one.masks[number], self.denoiser.scaled(one.hidden[number].float())]))
        return torch.stack(rows)

    def answer(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Ask the network about the noisy latents of a batch.

        Args:
            inputs: ``latents`` and ``noise`` (batch, channels, height, width), ``timesteps`` (batch,), and what is told.

        Returns:
            Its answer, and what it should have been, both (batch, channels, height, width).
        """
        latents, noise, timesteps = inputs["latents"], inputs["noise"], inputs["timesteps"]
        told = self.conditioning(inputs)
        power = self.powers[timesteps]
        noisy = self.denoiser.noised(latents, noise, power, self.prediction).to(self.dtype)
        answer = self.denoiser.predict(noisy, timesteps, told)
        return answer, self.denoiser.target(latents, noise, power, self.prediction)

    def _chunks(self, examples: Examples, only: Container[int] | None = None) -> Iterator[list[tuple[int, int]]]:
        """(entry, draw) of one bucket each, in batches; of all entries, or of those in ``only``."""
        for entries in examples.latents.groups.values():
            chosen = [entry for entry in entries if only is None or entry in only]
            pairs = [(entry, draw) for entry in chosen for draw in range(_DRAWS)]
            for start in range(0, len(pairs), self.settings.batch_size):
                yield pairs[start : start + self.settings.batch_size]

    def _fixed_losses(self, examples: Examples, pairs: Sequence[tuple[int, int]]) -> list[float]:
        """The loss of each pair; its noise and timestep are the same in every run."""
        mean, _ = examples.latents.stack([entry for entry, _ in pairs])
        chances = [generator("held out", entry, draw) for entry, draw in pairs]
        drawn = torch.cat([objective.noise((1, *mean.shape[1:]), 0.0, chance) for chance in chances])
        within = torch.cat([torch.rand(1, generator=chance) for chance in chances])
        draws = torch.tensor([draw for _, draw in pairs])
        timesteps = ((draws + within) / _DRAWS * len(self.powers)).long().clamp(max=len(self.powers) - 1)
        entries, hiding = [entry for entry, _ in pairs], [draw % inpainting_masks.COUNT for _, draw in pairs]
        prompts = [self._plain(examples, entry) for entry in entries]
        inputs = {"latents": self.denoiser.scaled(mean.float()), "noise": drawn, "timesteps": timesteps}
        inputs |= self._conditioning_inputs(examples.latents, entries, prompts, hiding)
        answer, wanted = self.answer({name: tensor.to(self.device) for name, tensor in inputs.items()})
        where = examples.where(entries).to(self.device) if examples.masked else None
        losses: list[float] = objective.per_image(objective.errors(answer, wanted), where).tolist()
        return losses


def _of_all(tick: Callable[[int, int], None], before: int, total: int, done: int, _: int) -> None:
    """Tell how far a part is as how far all of it is."""
    tick(before + done, total)


def _timesteps(settings: DiffusionSettings, count: int) -> objective.Timesteps:
    """The timesteps that a run draws. Raises UserError where the base has none of those that were named."""
    within = timestep_range(settings.timesteps)
    if within is not None and within[1] > count:
        raise UserError(f"--timesteps {settings.timesteps}: the last is at most {count}, as the base has so many timesteps")
    return objective.Timesteps(settings.timestep_bias, within, settings.logit_mean, settings.logit_std)


def noise_schedule(denoiser: Denoiser, zero_terminal_snr: bool) -> Tensor:
    """Choose the signal powers that a run goes by.

    Args:
        denoiser: The base's.
        zero_terminal_snr: Whether they end at 0.

    Returns:
        (timesteps,), from nearly 1 downwards.

    Raises:
        UserError: They shall end at 0, and the base predicts what pure noise does not tell.
    """
    if not zero_terminal_snr:
        return denoiser.powers()
    if denoiser.prediction != "v_prediction":
        raise UserError(
            f"--zero-terminal-snr needs a base with v-prediction; this one predicts {denoiser.prediction}, and in pure noise"
            " there is nothing to tell from the noise. Leave it away; --noise-offset or --multires-noise help there"
        )
    return zero_terminal(denoiser.powers())


def _energy(tensors: Sequence[Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors)
