"""A family of bases from outside of the package: one row, and a network that denoises of a kind of its own.

The network is a small transformer over patches of latents (as in Peebles and Xie 2022, https://arxiv.org/abs/2212.09748).
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from conftest import make_pipe
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn import functional as F

from peft_diffusion.bases import denoiser, family
from peft_diffusion.bases.denoiser import Conditioning
from peft_diffusion.bases.noise import Prediction, target
from peft_diffusion.bases.prompts import TextSide
from peft_diffusion.core import targets

ROW = family.Family(
    "toy",
    (
        family.Component("transformer", "denoiser", "unet_lr", None, "lora_transformer_", ("transformer.",)),
        family.Component("text_encoder", "text encoder", "text_encoder_lr", "tokenizer", "lora_te_", ("text_encoder.",)),
    ),
    kind="toy transformer",
    versions={"": family.Version("toy-v1", "toy_v1")},
    presets=family.SMALL_DIFFUSION.presets,
)
PATTERNS = {
    "attention": r".*\.attn\.(to_q|to_k|to_v|to_out)",
    "attention+ff": r".*\.(attn\.(to_q|to_k|to_v|to_out)|ff\.[02])",
}


class ToyAttention(nn.Module):
    """Attention of the patches to themselves and to the prompt."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        seen = torch.cat([x, text], 1)
        found: Tensor = self.to_out(F.scaled_dot_product_attention(self.to_q(x), self.to_k(seen), self.to_v(seen)))
        return found


class ToyBlock(nn.Module):
    """Attention and a feed-forward, each beside what it reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = ToyAttention(width)
        self.ff = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn(x, text)
        return x + self.ff(x)


class ToyTransformer(nn.Module):
    """Noisy latents (batch, 4, height, width) as patches of 2x2."""

    def __init__(self, width: int = 32, text: int = 32) -> None:
        super().__init__()
        self.config = SimpleNamespace(sample_size=8)
        self.inward, self.outward = nn.Conv2d(4, width, 2, 2), nn.ConvTranspose2d(width, 4, 2, 2)
        self.time, self.text = nn.Linear(1, width), nn.Linear(text, width)
        self.blocks = nn.ModuleList(ToyBlock(width) for _ in range(2))

    def forward(self, sample: Tensor, timestep: Tensor, hidden: Tensor) -> Tensor:
        patches = self.inward(sample)
        x = patches.flatten(2).transpose(1, 2)
        x = x + self.time(timestep.to(x.dtype).view(-1, 1, 1) / 1000)
        text = self.text(hidden)
        for block in self.blocks:
            x = block(x, text)
        answer: Tensor = self.outward(x.transpose(1, 2).reshape(patches.shape))
        return answer


class ToyPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Draws with a `ToyTransformer`, as pipelines of diffusers do."""

    _callback_tensor_inputs = ("latents", "prompt_embeds")

    def __init__(self, vae: Any, text_encoder: Any, tokenizer: Any, transformer: nn.Module, scheduler: Any) -> None:
        super().__init__()
        parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "transformer": transformer}
        self.register_modules(scheduler=scheduler, **parts)
        self.vae_scale_factor = 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=8)
        self._guidance_scale = 1.0
        self._num_timesteps = 0

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str],
        *,
        latents: Tensor | None = None,
        negative_prompt: list[str] | None = None,
        width: int = 64,
        height: int = 64,
        num_inference_steps: int = 4,
        guidance_scale: float = 1.0,
        generator: Any = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        output_type: str = "pil",
    ) -> Any:
        """Draw; ``latents`` is (batch, 4, height / 8, width / 8), by default drawn from the generators."""
        if latents is None:
            latents = randn_tensor((len(prompt), 4, height // 8, width // 8), generator=generator)
        self._guidance_scale = guidance_scale
        texts = [*(negative_prompt or [""] * len(prompt)), *prompt] if self.do_classifier_free_guidance else prompt
        prompt_embeds = denoiser_text(self).encode(texts)[0]
        self.scheduler.set_timesteps(num_inference_steps)
        self._num_timesteps = len(self.scheduler.timesteps)
        with self.progress_bar(total=num_inference_steps) as bar:
            for step, timestep in enumerate(self.scheduler.timesteps):
                sample = torch.cat([latents] * 2) if self.do_classifier_free_guidance else latents
                answer = self.transformer(sample, timestep.expand(len(sample)), prompt_embeds)
                if self.do_classifier_free_guidance:
                    plain, prompted = answer.chunk(2)
                    answer = plain + self._guidance_scale * (prompted - plain)
                latents = self.scheduler.step(answer, timestep, latents).prev_sample
                if callback_on_step_end is not None:
                    known = {"prompt_embeds": prompt_embeds}
                    given = {name: known[name] for name in callback_on_step_end_tensor_inputs or []}
                    prompt_embeds = callback_on_step_end(self, step, timestep, given).pop("prompt_embeds", prompt_embeds)
                bar.update()
        pixels = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return SimpleNamespace(images=self.image_processor.postprocess(pixels, output_type=output_type))


def denoiser_text(pipe: Any) -> TextSide:
    """The text side of a pipeline."""
    return TextSide([(pipe.tokenizer, pipe.text_encoder)])


class ToyDenoiser:
    """The transformer of a `ToyPipeline`."""

    kind: ClassVar[str] = "toy transformer"
    told_sizes = told_masks = False
    channels, resolution, step = 4, 64, 16
    family = ROW

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.text = denoiser_text(pipe)

    @classmethod
    def recognizes(cls, pipe: Any) -> bool:
        return isinstance(getattr(pipe, "transformer", None), ToyTransformer)

    @property
    def network(self) -> nn.Module:
        network: nn.Module = self.pipe.transformer
        return network

    @property
    def prediction(self) -> str:
        return str(self.pipe.scheduler.config.prediction_type)

    def powers(self) -> Tensor:
        powers: Tensor = DDPMScheduler.from_config(self.pipe.scheduler.config).alphas_cumprod
        return powers

    def scaled(self, latents: Tensor) -> Tensor:
        return latents * float(self.pipe.vae.config.scaling_factor)

    def conditioning(self, encoding: tuple[Tensor, ...], inputs: Mapping[str, Tensor]) -> Conditioning:
        return Conditioning(encoding[0].to(next(self.network.parameters()).dtype))

    @staticmethod
    def call(args: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Tensor, Any]:
        return args[0], args[1]

    def predict(self, noisy: Tensor, timesteps: Tensor, told: Conditioning) -> Tensor:
        answer: Tensor = self.network(noisy, timesteps, told.hidden)
        return answer

    def target(self, latents: Tensor, noise: Tensor, power: Tensor, prediction: Prediction) -> Tensor:
        return target(prediction, latents, noise, power)


family.register(ROW)
denoiser.register(ToyDenoiser)
targets.register("ToyTransformer", PATTERNS, r"(blocks\.\d+)\b.*")


def make_toy(seed: int = 0) -> ToyPipeline:
    """A pipeline of 64 pixels with random weights."""
    small = make_pipe(seed)
    torch.manual_seed(seed)
    pipe = ToyPipeline(small.vae, small.text_encoder, small.tokenizer, ToyTransformer(), small.scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.requires_grad_(False).eval()
    return pipe
