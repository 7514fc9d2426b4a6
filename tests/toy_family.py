"""A family of bases from outside of the package: one row, and a network that denoises of a kind of its own.

The network is a small transformer over patches of latents (as in Peebles and Xie 2022, https://arxiv.org/abs/2212.09748).
It predicts the flow from latents to noise (Lipman et al. 2023, https://arxiv.org/abs/2210.02747).
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from conftest import make_pipe
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn import functional as F

from peft_diffusion.bases import family
from peft_diffusion.bases.denoiser import Conditioning, Denoiser, NetworkCall
from peft_diffusion.bases.noise import flow_powers
from peft_diffusion.bases.pipelines import Pipeline
from peft_diffusion.bases.prompts import TextSide
from peft_diffusion.bases.schedulers import FLOW_SCHEDULERS, SchedulerTable
from peft_diffusion.core.target_tables import TargetTable

ROW = family.Family(
    "toy",
    (
        family.Component("transformer", "denoiser", "unet_lr", None, "lora_transformer_", ("transformer.",)),
        family.Component("text_encoder", "text encoder", "text_encoder_lr", "tokenizer", "lora_te_", ("text_encoder.",)),
    ),
    kind="toy_family:ToyDenoiser",
    versions={"": family.Version("toy-v1", "toy_v1")},
    small=True,
    targets={
        "ToyTransformer": TargetTable(
            {
                "attention": r".*\.attn\.(to_q|to_k|to_v|to_out)",
                "attention+ff": r".*\.(attn\.(to_q|to_k|to_v|to_out)|ff\.[02])",
            },
            r"(blocks\.\d+)\b.*",
            ("ToyBlock",),
        )
    },
)
family.register(ROW)
_TIMESTEPS = 1000


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
        more: Tensor = self.ff(x)
        return x + more


class ToyTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Noisy latents (batch, 4, height, width) as patches of 2x2."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, width: int = 32, text_width: int = 32, sample_size: int = 8) -> None:
        super().__init__()
        self.inward, self.outward = nn.Conv2d(4, width, 2, 2), nn.ConvTranspose2d(width, 4, 2, 2)
        self.time, self.text = nn.Linear(1, width), nn.Linear(text_width, width)
        self.blocks = nn.ModuleList(ToyBlock(width) for _ in range(2))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        """The flow; ``timestep`` is (batch,), from 0 at latents to 1 at noise."""
        patches = self.inward(hidden_states)
        x = patches.flatten(2).transpose(1, 2)
        x = x + self.time(timestep.to(x.dtype).view(-1, 1, 1))
        text = self.text(encoder_hidden_states)
        for block in self.blocks:
            x = block(x, text)
        flow: Tensor = self.outward(x.transpose(1, 2).reshape(patches.shape))
        return flow


class ToyPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Generates with a `ToyTransformer`, as pipelines of diffusers do."""

    _callback_tensor_inputs = ("latents", "prompt_embeds")

    def __init__(self, vae: Any, text_encoder: Any, tokenizer: Any, transformer: ToyTransformer, scheduler: Any) -> None:
        super().__init__()
        parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "transformer": transformer}
        self.register_modules(scheduler=scheduler, **parts)
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
        prompt_embeds = text_side(self).encode(texts)[0]
        self.scheduler.set_timesteps(num_inference_steps)
        self._num_timesteps = len(self.scheduler.timesteps)
        with self.progress_bar(total=num_inference_steps) as bar:
            for step, timestep in enumerate(self.scheduler.timesteps):
                sample = torch.cat([latents] * 2) if self.do_classifier_free_guidance else latents
                flow = self.transformer(
                    hidden_states=sample,
                    encoder_hidden_states=prompt_embeds,
                    timestep=timestep.expand(len(sample)) / _TIMESTEPS,
                )
                if self.do_classifier_free_guidance:
                    plain, prompted = flow.chunk(2)
                    flow = plain + self._guidance_scale * (prompted - plain)
                latents = self.scheduler.step(flow, timestep, latents).prev_sample
                if callback_on_step_end is not None:
                    known = {"prompt_embeds": prompt_embeds}
                    given = {name: known[name] for name in callback_on_step_end_tensor_inputs or []}
                    prompt_embeds = callback_on_step_end(self, step, timestep, given).pop("prompt_embeds", prompt_embeds)
                bar.update()
        pixels = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return SimpleNamespace(images=self.image_processor.postprocess(pixels, output_type=output_type))


def text_side(pipe: Any) -> TextSide:
    """The text side of a pipeline."""
    return TextSide([(pipe.tokenizer, pipe.text_encoder)])


class ToyDenoiser(Denoiser):
    """The transformer of a `ToyPipeline`."""

    schedulers: ClassVar[SchedulerTable] = FLOW_SCHEDULERS
    pipeline_class: ClassVar[type | None] = ToyPipeline
    family, resolution, step, prediction = ROW, 64, 16, "flow_prediction"

    def __init__(self, pipe: Pipeline) -> None:
        self.pipe = pipe
        self.text = text_side(pipe)

    @classmethod
    def recognizes(cls, pipe: object) -> bool:
        return isinstance(pipe, ToyPipeline)

    @property
    def network(self) -> nn.Module:
        transformer: nn.Module = self.pipe.components["transformer"]
        return transformer

    def powers(self) -> Tensor:
        return flow_powers(_TIMESTEPS)

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        flow: Tensor = self.network(noisy, conditioning.hidden, (timesteps + 1) / _TIMESTEPS)
        return flow

    @classmethod
    def read_call(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> NetworkCall:
        return NetworkCall(len(kwargs["hidden_states"]), kwargs["timestep"] * _TIMESTEPS)


def make_toy(seed: int = 0) -> ToyPipeline:
    """A pipeline of 64 pixels with random weights."""
    small = make_pipe(seed)
    torch.manual_seed(seed)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=_TIMESTEPS)
    pipe = ToyPipeline(small.vae, small.text_encoder, small.tokenizer, ToyTransformer(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.requires_grad_(False).eval()
    return pipe
