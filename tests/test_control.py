"""Pictures that steer: tiny random models of the true architectures, compared with the pipelines of diffusers."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import make_pipe, make_xl_pipe
from diffusers import ControlNetModel, DiffusionPipeline, T2IAdapter
from making import make_adapter, modes
from PIL import Image
from safetensors.torch import save_file
from taped import tape
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from peft_diffusion import Adapters, GenerateConfig, GridConfig, UserError, generate, grid
from peft_diffusion.bases import single_file
from peft_diffusion.fast import drawing as fast
from peft_diffusion.generation import recipe as recipes
from peft_diffusion.generation.sampler import Cell, paint
from peft_diffusion.generation.settings import Sampling

pytestmark = pytest.mark.usefixtures("read_bases_once")

MAKE: dict[str, Callable[[], DiffusionPipeline]] = {"sd": make_pipe, "xl": make_xl_pipe}


def ip_adapter(file: Path, pipe: DiffusionPipeline) -> Path:
    """A plain IP-Adapter of four tokens, as h94/IP-Adapter lays it out: its image encoder is in the folder beside it."""
    width = pipe.unet.config.cross_attention_dim
    tensors = {
        "image_proj.proj.weight": torch.randn(4 * width, 16), "image_proj.proj.bias": torch.randn(4 * width),
        "image_proj.norm.weight": torch.ones(width), "image_proj.norm.bias": torch.zeros(width),
    }  # fmt: skip
    for number, name in enumerate(pipe.unet.attn_processors):
        if "attn2" in name:
            own = pipe.unet.get_submodule(name.removesuffix(".processor"))
            for part in ("to_k_ip", "to_v_ip"):
                tensors[f"ip_adapter.{number}.{part}.weight"] = torch.randn(own.to_k.out_features, width)
    file.parent.mkdir()
    save_file(tensors, file)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16,
        projection_dim=16,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(file.parent / "image_encoder")
    return file


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    """Where the models are, by the kind of base and of control; they are no zeros, as fresh ones are."""
    folder = tmp_path_factory.mktemp("controls")
    torch.manual_seed(0)
    found: dict[tuple[str, str], str] = {}
    for base, make in MAKE.items():
        pipe = make()
        net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
        for one in net.parameters():
            torch.nn.init.normal_(one, std=0.1)
        net.save_pretrained(folder / base / "net")
        kind: dict[str, Any] = {"channels": [32, 64], "num_res_blocks": 1}
        if base == "xl":
            kind |= {"channels": [32, 64, 64, 64], "downscale_factor": 16, "adapter_type": "full_adapter_xl"}
        T2IAdapter(**kind).save_pretrained(folder / base / "t2i")
        T2IAdapter(in_channels=1, **kind).save_pretrained(folder / base / "gray")
        found |= {(base, "controlnet"): str(folder / base / "net"), (base, "t2i-adapter"): str(folder / base / "t2i")}
        found[base, "gray"] = str(folder / base / "gray")
        found[base, "ip-adapter"] = str(ip_adapter(folder / base / "ip" / "ip.safetensors", pipe))
    return found


_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip


def original(name: str, layers: int) -> str:
    """What a tensor of a ControlNet is called in cldm/cldm.py of lllyasviel/ControlNet, whose files A1111 reads."""
    hint = re.sub(r"blocks\.(\d+)", lambda found: f"input_hint_block.{2 * int(found[1]) + 2}", name.partition(".")[2])
    attends = "attentions" in name
    if name.startswith("controlnet_cond_embedding."):
        return hint.replace("conv_in", "input_hint_block.0").replace("conv_out", "input_hint_block.14")
    for there, here in (
        (r"controlnet_down_blocks\.(\d+)", r"zero_convs.\1.0"), (r"controlnet_mid_block", "middle_block_out.0"),
        (r"conv_in", "input_blocks.0.0"), (r"(\w+)_embedding\.linear_1", r"\1_embed.0"),
        (r"(\w+)_embedding\.linear_2", r"\1_embed.2"), (r"mid_block\.attentions\.0", "middle_block.1"),
    ):  # fmt: skip
        name = re.sub(rf"^{there}(?=\.)", here, name)
    name = name.replace("add_embed.", "label_emb.0.")
    name = re.sub(r"^mid_block\.resnets\.(\d)", lambda found: f"middle_block.{2 * int(found[1])}", name)
    parts = name.split(".")
    if parts[0] == "down_blocks":
        block, kind, layer = int(parts[1]), parts[2], int(parts[3])
        place = 1 + block * (layers + 1) + (layers if kind == "downsamplers" else layer)
        head = [f"input_blocks.{place}.{int(kind == 'attentions')}"]
        parts = [*head, *(["op"] if kind == "downsamplers" else []), *parts[5 if kind == "downsamplers" else 4 :]]
    return ".".join(parts if attends else [_RESNET.get(part, part) for part in parts])


@pytest.mark.slow
@pytest.mark.parametrize("base", ["sd", "xl"])
@pytest.mark.parametrize("layout", ["diffusers.safetensors", "original.safetensors", "original.pth"])
def test_a_controlnet_of_one_file_is_that_of_its_folder(
    base: str, layout: str, models: dict[tuple[str, str], str], tmp_path: Path
) -> None:
    net = ControlNetModel.from_pretrained(models[base, "controlnet"])
    tensors = {name: one.contiguous() for name, one in net.state_dict().items()}
    if layout.startswith("original"):
        layers = net.config.layers_per_block
        tensors = {f"control_model.{original(name, layers)}": one for name, one in tensors.items()}
    file = tmp_path / layout
    torch.save(tensors, file) if file.suffix == ".pth" else save_file(tensors, file)
    found = single_file.controlnet(file, MAKE[base]().unet)
    assert all(torch.equal(one, net.state_dict()[name]) for name, one in found.state_dict().items())
    for name in ("attention_head_dim", "conditioning_channels", "addition_embed_type", "use_linear_projection", "norm_eps"):
        assert json.dumps(found.config[name]) == json.dumps(net.config[name]), name
    with pytest.raises(UserError, match=r"no ControlNet, or of another kind of base: \d+ tensors not as in one"):
        single_file.controlnet(file, MAKE["xl" if base == "sd" else "sd"]().unet)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (96, 80, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def drawn(pipe: DiffusionPipeline, *controls: str, **told: Any) -> Image.Image:
    (image,) = paint(Adapters(pipe), [Cell("a cat", 5, None)], Sampling(steps=2, control=controls, **told))
    return image


@pytest.mark.slow
@pytest.mark.parametrize("base", ["sd", "xl"])
@pytest.mark.parametrize("kind", ["controlnet", "t2i-adapter", "gray", "ip-adapter"])
def test_a_control_steers_as_the_pipeline_of_diffusers(
    models: dict[tuple[str, str], str], picture: Path, base: str, kind: str
) -> None:
    pipe, model = MAKE[base](), models[base, kind]
    before = modes(pipe.unet)
    plain = drawn(pipe)
    image = drawn(pipe, f"{kind.replace('gray', 't2i-adapter')}:{model}={picture}@0.7")
    assert drawn(pipe).tobytes() == plain.tobytes() and modes(pipe.unet) == before
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    told: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 5.0, "latents": noise}
    told |= {"height": 64, "width": 64}
    xl, seen = "XL" if base == "xl" else "", Image.open(picture)
    if kind == "controlnet":
        other = getattr(diffusers, f"StableDiffusion{xl}ControlNetPipeline")
        made = other(**pipe.components, controlnet=ControlNetModel.from_pretrained(model))
        told |= {"image": seen.resize((64, 64), Image.Resampling.LANCZOS), "controlnet_conditioning_scale": 0.7}
    elif kind == "ip-adapter":
        made = pipe
        made.load_ip_adapter(str(Path(model).parent), subfolder="", weight_name=Path(model).name)
        made.set_ip_adapter_scale(0.7)
        told |= {"ip_adapter_image": seen}
    else:
        other = getattr(diffusers, f"StableDiffusion{xl}AdapterPipeline")
        made = other.from_pipe(pipe, adapter=T2IAdapter.from_pretrained(model))
        told |= {"image": seen.convert("L") if kind == "gray" else seen, "adapter_conditioning_scale": 0.7}
    made.set_progress_bar_config(disable=True)
    assert difference(image, made("a cat", **told).images[0]) <= 1 < 5 < difference(image, plain)


@pytest.mark.slow
@pytest.mark.parametrize(("base", "kind"), [("sd", "controlnet"), ("xl", "t2i-adapter"), ("sd", "ip-adapter")])
def test_a_control_steers_fast_steps_too(
    models: dict[tuple[str, str], str], picture: Path, base: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tape(monkeypatch)
    pipe, control = MAKE[base](), f"{kind}:{models[base, kind]}={picture}@0.7"
    expected = drawn(pipe, control, guidance_stop=0.5)
    started: list[nn.Module] = []
    start = fast.start

    def noted(part: nn.Module, kind: Any = None) -> fast.Engine:
        started.append(part)
        return start(part, kind)

    monkeypatch.setattr(fast, "start", noted)
    assert Adapters(pipe).fast(True) is None
    plain, found = drawn(pipe, guidance_stop=0.5), drawn(pipe, control, guidance_stop=0.5)
    assert difference(found, expected) <= 1 < 5 < difference(found, plain)
    engines = {type(part).__name__: fast.engine_of(part) for part in started}
    assert all(engine is not None and engine.refused is None for engine in engines.values())
    name = {"controlnet": "ControlNetModel", "t2i-adapter": "T2IAdapter"}.get(kind, "UNet2DConditionModel")
    assert engines[name].recordings  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["controlnet", "t2i-adapter", "ip-adapter"])
def test_controls_go_with_adapters_pictures_second_passes_and_each_other(
    models: dict[tuple[str, str], str], picture: Path, tiny_base: Path, tmp_path: Path, kind: str
) -> None:
    """Each of these draws otherwise than without the control, and the recipe makes it again to the bit."""
    file = make_adapter(tmp_path / "ink.safetensors", tiny_base, 1)
    control = f"{kind}:{models['sd', kind]}={picture}"
    both = (control, f"controlnet:{models['sd', 'controlnet']}={picture}@0.5")
    common: dict[str, Any] = {"base": str(tiny_base), "device": "cpu", "steps": 2, "adapter": str(file)}
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    ways: list[dict[str, Any]] = [{"image": tmp_path / "red.png", "tile": "x"}, {"hires": 1.5, "guidance_stop": 0.5}]
    for number, way in enumerate(ways):
        plain, made, more = (
            generate(GenerateConfig("a cat", control=controls, output=tmp_path / f"{number}{n}.png", **way, **common))[0]
            for n, controls in enumerate(((), control, both))
        )
        assert plain.image.tobytes() != made.image.tobytes() != more.image.tobytes() != plain.image.tobytes()
    assert len(recipes.read(more.path).controls) == 2 and not recipes.read(plain.path).controls
    config = GenerateConfig(recipe=more.path, output=tmp_path / "again.png", base=str(tiny_base), device="cpu", control=both)
    assert generate(config)[0].image.tobytes() == more.image.tobytes()
    with pytest.raises(UserError, match=r"was drawn with --control .*@0\.5; give exactly that"):
        generate(replace(config, control=(control,)))


@pytest.mark.slow
def test_a_shown_picture_goes_on_to_count_where_guidance_has_ended(
    models: dict[tuple[str, str], str], picture: Path
) -> None:
    """Written out: two rows while guidance acts, and from there the one with prompt and picture."""
    pipe, model = make_pipe(), Path(models["sd", "ip-adapter"])
    images = list(
        paint(
            Adapters(pipe),
            [Cell("a cat", 5, None), Cell("a red dog", 6, None)],
            Sampling(steps=4, guidance=5.0, guidance_stop=0.5, control=f"ip-adapter:{model}={picture}@2"),
        )
    )
    pipe.load_ip_adapter(str(model.parent), subfolder="", weight_name=model.name)
    pipe.set_ip_adapter_scale(2.0)
    shown = pipe.prepare_ip_adapter_image_embeds(Image.open(picture), None, "cpu", 1, True)[0]
    for image, (prompt, seed) in zip(images, (("a cat", 5), ("a red dog", 6)), strict=True):
        words, nothing = pipe.encode_prompt(prompt, "cpu", 1, True, "")
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        pipe.scheduler.set_timesteps(4)
        for t in pipe.scheduler.timesteps:
            told, given = (torch.cat([nothing, words]), shown) if t >= 500 else (words, shown[1:])
            both = latents.repeat(len(told), 1, 1, 1)
            with torch.no_grad():
                answer = pipe.unet(both, t, told, added_cond_kwargs={"image_embeds": [given]}).sample
            noise = answer[:1] + 5.0 * (answer[1:] - answer[:1]) if len(told) == 2 else answer
            latents = pipe.scheduler.step(noise, t, latents).prev_sample
        with torch.no_grad():
            pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        assert difference(image, pipe.image_processor.postprocess(pixels)[0]) <= 1


@pytest.mark.slow
def test_a_side_of_a_grid_is_the_scale(
    models: dict[tuple[str, str], str], picture: Path, tiny_base: Path, tmp_path: Path
) -> None:
    control = f"controlnet:{models['sd', 'controlnet']}={picture}@0.5"
    told: dict[str, Any] = {"base": str(tiny_base), "device": "cpu", "steps": 2, "seed": 5, "output": tmp_path / "a.png"}
    (row,) = grid(GridConfig("a cat", control=control, x="control_scale=0,1,2", **told)).pictures
    assert difference(row[0], drawn(make_pipe())) <= 1
    assert difference(row[2], drawn(make_pipe(), control.replace("@0.5", "@1.0"))) <= 1 < difference(row[1], row[2])


@pytest.mark.slow
def test_what_cannot_steer_is_refused_in_words(models: dict[tuple[str, str], str], picture: Path, tmp_path: Path) -> None:
    def refused(said: str, control: str, pipe: DiffusionPipeline | None = None) -> None:
        with pytest.raises(UserError, match=said):
            GenerateConfig("a", control=control).check()
            drawn(pipe or make_pipe(), control)

    net = models["sd", "controlnet"]
    refused("no kind 'controlnets'.*did you mean 'controlnet'", f"controlnets:{net}={picture}")
    refused("--control is KIND:MODEL=PICTURE", f"controlnet:{net}")
    refused(r"there is no picture .*gone\.png", f"controlnet:{net}=gone.png")
    refused("'much' is no scale", f"controlnet:{net}={picture}@much")
    refused("holds no diffusion_pytorch_model", f"controlnet:{tmp_path}={picture}")
    refused(r"there is no ip-adapter .*; name its file", f"ip-adapter:{tmp_path}={picture}")
    refused("cannot be fetched from the hub", f"controlnet:nobody/nothing={picture}")
    for kind in ("controlnet", "t2i-adapter", "ip-adapter"):
        refused("is of another kind of base", f"{kind}:{models['xl', kind]}={picture}")
    (tmp_path / "text.png").write_text("no picture")
    refused("the content is no picture", f"controlnet:{net}={tmp_path / 'text.png'}")
    pipe = make_pipe()
    refused("is of another kind of base", f"ip-adapter:{models['xl', 'ip-adapter']}={picture}", pipe)
    assert drawn(pipe).tobytes() == drawn(make_pipe()).tobytes()
