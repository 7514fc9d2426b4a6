"""Training steps that `benchmark_train.py` compares: ours, the frozen base alone, and those of other programs.

All work on one random UNet of a true architecture with latents and embeddings computed before, so that nobody pays for a VAE
or a text encoder. Each side is what its program does in a step.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from peft_diffusion.bases.architectures import Architecture
from peft_diffusion.core import site
from peft_diffusion.core.arena import Arena, side_by_side
from peft_diffusion.core.errors import UserError
from peft_diffusion.data.buckets import Bucket, fit
from peft_diffusion.data.latents import Latent, LatentCache, TextCache
from peft_diffusion.fast.cuda_graph import Recorder
from peft_diffusion.fast.low_rank import Working
from peft_diffusion.fast.unet import fused
from peft_diffusion.methods.lora import Lora
from peft_diffusion.training.events import Signals
from peft_diffusion.training.loop.trainer import Trainer, TrainerSettings
from peft_diffusion.training.tasks.diffusion import DiffusionSettings, DiffusionTask, Examples

RANK, RATE, PICTURES, TOKENS = 16, 1e-4, 16, 77
NAME = "a"
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")

TINY: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": [32, 64], "layers_per_block": 1,
    "cross_attention_dim": 32, "attention_head_dim": 8, "norm_num_groups": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
KINDS = ("sd1", "sdxl", "tiny")


@dataclass(frozen=True)
class Cell:
    """What is measured: an architecture at its own size, a batch, and whether activations are computed again."""

    kind: str
    batch: int
    checkpointing: bool = False

    @property
    def name(self) -> str:
        """As it is given on the command line."""
        return f"{self.kind}-b{self.batch}{'-ck' if self.checkpointing else ''}"

    @classmethod
    def parse(cls, name: str) -> "Cell":
        """From its name. Raises UserError."""
        found = re.fullmatch(rf"({'|'.join(KINDS)})-b([1-9]\d*)(-ck)?", name)
        if found is None:
            raise UserError(f"a cell is KIND-bBATCH or KIND-bBATCH-ck, KIND one of {', '.join(KINDS)}; not {name!r}")
        return cls(found[1], int(found[2]), found[3] is not None)

    @property
    def config(self) -> dict[str, Any]:
        """The UNet's."""
        if self.kind == "tiny":
            return TINY
        return Architecture("sdxl" if self.kind == "sdxl" else "sd1").configs()["unet"]


@dataclass
class Side:
    """A training that goes on: ``run`` makes so many steps; ``alone`` makes one that is no recording."""

    run: Callable[[int], None]
    loss: Callable[[], float]
    alone: Callable[[], None]
    unet: Any
    close: ExitStack = field(default_factory=ExitStack)
    note: Callable[[], str] = lambda: ""


def build(cell: Cell, device: torch.device, dtype: torch.dtype) -> Any:
    """A frozen UNet with the random weights that its layers begin with, the same for every side."""
    torch.manual_seed(0)
    with device:
        unet: Any = diffusers.UNet2DConditionModel.from_config({**cell.config})
    unet.to(dtype).requires_grad_(False).eval()
    if cell.checkpointing:
        # Without the state of generators: nothing draws, and a recording cannot ask for it.
        unet.enable_gradient_checkpointing(partial(_again, preserve_rng_state=False))
        unet.train()  # the UNet checkpoints in training only; it has no dropout
    return unet


def _again(function: Callable[..., Any], *inputs: Any, preserve_rng_state: bool) -> Any:
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=preserve_rng_state)


class Steps(DiffusionTask):
    """What a run measures between its steps is no part of them."""

    def signals(self) -> Signals:
        """Nothing."""
        return Signals()


def task_of(cell: Cell, unet: Any) -> DiffusionTask:
    """The package's loss, on random latents and embeddings."""
    chance, config = torch.Generator().manual_seed(1), cell.config
    size = config["sample_size"]
    square = fit(8 * size, 8 * size, Bucket(8 * size, 8 * size))

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=chance)

    entries = [Latent(n, False, square, 5 * drawn(4, size, size), 0.1 * drawn(4, size, size).abs()) for n in range(PICTURES)]
    captions = [f"picture {number}" for number in range(PICTURES)]
    xl = "addition_embed_type" in config
    widths = [(TOKENS, config["cross_attention_dim"]), *([(1280,)] if xl else [])]
    embeddings = TextCache({caption: tuple(drawn(*shape) for shape in widths) for caption in ["", *captions]})
    kind = Architecture("sdxl" if xl else "sd1").configs()
    words = SimpleNamespace(model_max_length=TOKENS)
    pipe = SimpleNamespace(
        unet=unet,
        vae=SimpleNamespace(config=SimpleNamespace(scaling_factor=kind["vae"]["scaling_factor"], latent_channels=4)),
        scheduler=diffusers.DDPMScheduler.from_config(kind["scheduler"]),
        tokenizer=words,
        text_encoder=nn.Identity(),
        **({"tokenizer_2": words, "text_encoder_2": nn.Identity()} if xl else {}),
    )
    examples = Examples(LatentCache(tuple(entries), 0, 0, 0), captions)
    task = Steps(pipe, NAME, DiffusionSettings(batch_size=cell.batch), examples)
    task.embeddings = embeddings
    return task


def ours(
    cell: Cell, device: torch.device, dtype: torch.dtype, *, record: bool = True, fast: bool = True, cudnn: bool = True
) -> Side:
    """The package's trainer and task."""
    unet, close = build(cell, device, dtype), ExitStack()
    if fast:
        close.enter_context(fused(unet, cudnn_attention=cudnn))
    torch.manual_seed(2)
    site.attach(unet, NAME, Lora(RANK), "attention")
    arena = arena_of(unet)
    settings = TrainerSettings(steps=10**9, rates={"unet": RATE}, log_every=10, save_every=10**9, cuda_graph=record)
    trainer = Trainer(task_of(cell, unet), arena, settings, passes=Working(arena.flat, arena.grad))

    def alone() -> None:
        trainer.records, before = False, trainer.records
        trainer.run(trainer.step + 1)
        trainer.records = before

    def note() -> str:
        return f"not recorded: {trainer.unrecorded}" if trainer.unrecorded else ""

    return Side(lambda steps: void(trainer.run(trainer.step + steps)), trainer.total.item, alone, unet, close, note)


def arena_of(unet: Any) -> Arena:
    """What the package trains of its adapter on a UNet, as its trainer has it."""
    built = site.adapters(unet, NAME)
    return Arena({"unet": side_by_side((path, list(adapter.parameters())) for path, adapter in built.items())})


def working(unet: Any) -> AbstractContextManager[None]:
    """A pass forward and backward as the trainer makes it."""
    arena = arena_of(unet)
    return Working(arena.flat, arena.grad).passing()


def void(_: object) -> None:
    """Nothing of it."""


def floor(cell: Cell, device: torch.device, dtype: torch.dtype, *, record: bool = True, fast: bool = True) -> Side:
    """The frozen base's forward and the gradients through its activations: what no training can do without."""
    unet, close = build(cell, device, dtype), ExitStack()
    if fast:
        close.enter_context(fused(unet))
    given, total = batch_of(cell, unet), torch.zeros((), device=device)

    def work(inputs: Mapping[str, Tensor]) -> None:
        seen = inputs["noisy"].to(dtype).requires_grad_(True)
        loss = F.mse_loss(answer_of(unet, {**inputs, "noisy": seen}, dtype).float(), inputs["noise"])
        loss.backward()
        total.copy_(loss.detach())

    recorder = Recorder(work, lambda: [total], device)
    once = partial(recorder, given) if record and device.type == "cuda" else partial(work, on(given, device))
    return Side(partial(_repeat, once), total.item, partial(work, on(given, device)), unet, close)


def script(cell: Cell, device: torch.device, dtype: torch.dtype) -> Side:
    """The step of diffusers' ``train_text_to_image_lora.py`` (and its SDXL version) with ``--mixed_precision bf16``."""
    from accelerate import Accelerator

    unet = build(cell, device, dtype)
    add_lora(unet)
    accelerator = Accelerator(mixed_precision="bf16" if dtype == torch.bfloat16 else "no", cpu=device.type == "cpu")
    own = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=RATE, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    unet.train()
    unet, optimizer, rates = accelerator.prepare(unet, optimizer, rates)
    given = on(batch_of(cell, unet), device)
    schedule = diffusers.DDPMScheduler.from_config(Architecture("sd1").configs()["scheduler"])
    last: list[float] = [0.0]

    def once() -> None:
        with accelerator.accumulate(unet):
            latents = given["clean"].to(dtype)
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, schedule.config.num_train_timesteps, (cell.batch,), device=device).long()
            noisy = schedule.add_noise(latents, noise, timesteps)
            answer = answer_of(unet, {**given, "noisy": noisy, "timesteps": timesteps}, dtype)
            loss = F.mse_loss(answer.float(), noise.float(), reduction="mean")
            average = accelerator.gather(loss.repeat(cell.batch)).mean()
            running = average.item()
            accelerator.backward(loss)
            optimizer.step()  # its clipping finds an iterator that is used up
            rates.step()
            optimizer.zero_grad()
        last[0] = max(running, loss.detach().item())  # for its progress bar

    return Side(partial(_repeat, once), lambda: last[0], once, unet)


def peft(cell: Cell, device: torch.device, dtype: torch.dtype, *, compiled: bool = False, record: bool = False) -> Side:
    """The best that one gets from peft by hand: no autocast, channels last, one fused AdamW, the device never asked."""
    unet = build(cell, device, dtype)
    add_lora(unet)
    unet.to(memory_format=torch.channels_last)
    own = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    record = record and device.type == "cuda"
    optimizer = torch.optim.AdamW(own, lr=RATE, fused=True, capturable=record)
    run: Any = torch.compile(unet) if compiled else unet
    given, total = on(batch_of(cell, unet), device), torch.zeros((), device=device)
    powers = diffusers.DDPMScheduler.from_config(Architecture("sd1").configs()["scheduler"]).alphas_cumprod.to(device)

    def once(inputs: Mapping[str, Tensor] = given) -> None:
        noise = torch.randn_like(inputs["clean"])
        timesteps = torch.randint(0, len(powers), (cell.batch,), device=device)
        power = powers[timesteps].view(-1, 1, 1, 1)
        noisy = (power.sqrt() * inputs["clean"] + (1 - power).sqrt() * noise).to(dtype, memory_format=torch.channels_last)
        loss = F.mse_loss(answer_of(run, {**inputs, "noisy": noisy, "timesteps": timesteps}, dtype).float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not record)
        total.copy_(loss.detach())

    def kept() -> list[Tensor]:
        return [total, *(parameter.data for parameter in own)]

    once_recorded = partial(Recorder(once, kept, device), batch_of(cell, unet)) if record else once
    return Side(partial(_repeat, once_recorded), total.item, once, unet)


def lycoris(cell: Cell, device: torch.device, dtype: torch.dtype) -> Side:
    """LyCORIS' LoCon modules at the same layers, as kohya's trainer runs them."""
    from lycoris import LycorisNetwork, create_lycoris

    unet = build(cell, device, dtype)
    LycorisNetwork.apply_preset({"enable_conv": False, "target_module": ["Attention"], "target_name": []})
    network = create_lycoris(unet, 1.0, linear_dim=RANK, linear_alpha=RANK, algo="lora")
    network.apply_to()
    return _in_autocast(cell, unet, network, device, dtype)


def kohya(cell: Cell, device: torch.device, dtype: torch.dtype) -> Side:
    """The LoRA modules of kohya's sd-scripts, a folder on PYTHONPATH, at the same layers, as its trainer runs them."""
    from networks.lora import LoRAModule

    unet, modules = build(cell, device, dtype), {}
    for path in sorted(path for path, module in unet.named_modules() if path.endswith(LAYERS)):
        name = f"lora_unet_{path.replace('.', '_')}"
        modules[name] = LoRAModule(name, unet.get_submodule(path), 1.0, RANK, RANK)
    for module in modules.values():
        module.apply_to()
    return _in_autocast(cell, unet, nn.ModuleDict(modules), device, dtype)


def _in_autocast(cell: Cell, unet: Any, network: nn.Module, device: torch.device, dtype: torch.dtype) -> Side:
    """A step of kohya's trainer on float32 modules: autocast, clipping, AdamW, the loss read."""
    network.to(device, torch.float32)
    network.requires_grad_(True)
    own = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=RATE)
    given, last = on(batch_of(cell, unet), device), torch.zeros((), device=device)

    def once() -> None:
        around: AbstractContextManager[Any] = nullcontext()
        if dtype == torch.bfloat16:
            around = torch.autocast(device.type, dtype)
        with around:
            answer = answer_of(unet, given, dtype)
        loss = F.mse_loss(answer.float(), given["noise"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        last.fill_(loss.item())

    return Side(partial(_repeat, once), last.item, once, unet)


SIDES: dict[str, Callable[[Cell, torch.device, torch.dtype], Side]] = {
    "ours": ours,
    "ours-eager": partial(ours, record=False),
    "ours-plain": partial(ours, fast=False),
    "ours-flash": partial(ours, cudnn=False),
    "floor": floor,
    "floor-eager": partial(floor, record=False),
    "floor-plain": partial(floor, fast=False),
    "script": script,
    "peft": peft,
    "peft-graph": partial(peft, record=True),
    "peft-compiled": partial(peft, compiled=True),
    "lycoris": lycoris,
    "kohya": kohya,
}


def add_lora(unet: Any) -> None:
    """peft's LoRA at the same layers, in the dtype of the base."""
    from peft import LoraConfig

    dtype = unet.dtype
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=list(LAYERS)))
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def batch_of(cell: Cell, unet: Any) -> dict[str, Tensor]:
    """One batch on the CPU, for sides that have it on the device already."""
    chance, config = torch.Generator().manual_seed(3), cell.config
    size, width = config["sample_size"], config["cross_attention_dim"]

    def drawn(*shape: int) -> Tensor:
        return torch.randn(cell.batch, *shape, generator=chance)

    found = {
        "clean": drawn(4, size, size),
        "noise": drawn(4, size, size),
        "noisy": drawn(4, size, size),
        "timesteps": torch.randint(1000, (cell.batch,), generator=chance),
        "hidden": drawn(TOKENS, width),
    }
    if "addition_embed_type" in config:
        sizes = torch.tensor([[8 * size, 8 * size, 0, 0, 8 * size, 8 * size]] * cell.batch, dtype=torch.float32)
        found |= {"summary": drawn(1280), "sizes": sizes}
    return found


def answer_of(unet: Any, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """What the UNet says."""
    added = {"text_embeds": inputs["summary"].to(dtype), "time_ids": inputs["sizes"]} if "summary" in inputs else None
    answer: Tensor = unet(
        inputs["noisy"], inputs["timesteps"], inputs["hidden"].to(dtype), added_cond_kwargs=added, return_dict=False
    )[0]
    return answer


def on(inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors on a device."""
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _repeat(once: Callable[[], None], steps: int) -> None:
    for _ in range(steps):
        once()
