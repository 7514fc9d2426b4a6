"""Handling of adapters on a base: loading, setting, swapping, removing, merging; ours against diffusers with peft.

    python scripts/benchmark_load.py --kinds sd1 sdxl --layouts diffusers kohya
    python scripts/benchmark_load.py --kinds sd1 --device cuda --precision bfloat16 --repeats 7

For each kind a base of the true architecture is made with random weights, and nine LoRA files of rank 16 on the attention of
its UNet, in bfloat16. Before anything is timed, the UNet's outputs with three files are compared between both sides, and the
base's with what they were before. Then both load eight files one after the other, set strengths, swap one of eight for
another file, merge all and undo that, in turns; medians are printed, in milliseconds, with the ratio. The first load of ours
is timed twice: after files of the same shape (*known*), and with all forgotten that those taught (*new*).
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are no part of the package

from peft_diffusion.bases.architectures import Architecture
from peft_diffusion.core.errors import UserError
from peft_diffusion.formats import planning
from peft_diffusion.generation import Adapters
from scripts.measuring import markdown_table, run

KINDS = {"sd1": Architecture("sd1"), "sdxl": Architecture("sdxl")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
RANK, FILES = 16, 9
Times = dict[str, list[float]]


def main() -> None:
    """Make bases and files, compare, measure, print."""
    options = _options()
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    device, dtype = torch.device(options.device), DTYPES[options.precision]
    if device.type == "cuda":
        print(torch.cuda.get_device_name(device))
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            pipe = base(KINDS[kind], dtype, device)
            for layout in options.layouts:
                files = made(pipe.unet, Path(folder), layout)
                apart = compare(kind, pipe, files)
                where = f"{kind}, {options.precision} on {device}, files of the layout {layout}"
                print(f"\n{where}; outputs apart by {apart:.1e}\n")
                print(markdown_table(("", "ours", "diffusers + peft", "ratio"), measured(pipe, files, options)), flush=True)
            del pipe
            gc.collect()


def base(found: Architecture, dtype: torch.dtype, device: torch.device) -> Any:
    """A pipeline of that architecture; its UNet has random weights, all else what was in memory."""
    configs = found.configs()
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        found.write(Path(folder))
        for name in ("unet", "vae"):
            parts[name] = getattr(diffusers, configs[name]["_class_name"]).from_config(configs[name])
        for name, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
            if name in configs:
                cls = getattr(transformers, configs[name]["architectures"][0])
                parts[name] = cls(cls.config_class(**configs[name]))
                parts[tokenizer] = transformers.CLIPTokenizer.from_pretrained(Path(folder) / tokenizer)
    parts["scheduler"] = getattr(diffusers, configs["scheduler"]["_class_name"]).from_config(configs["scheduler"])
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            parts[name] = part.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    _fill(parts["unet"])
    if found.kind != "sdxl":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return getattr(diffusers, found.pipeline)(**parts)


def _fill(module: nn.Module) -> None:
    """Random weights that keep the size of what runs through, all from a few million numbers: more would take minutes."""
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(1 << 22, generator=generator)
    for name, own in module.named_parameters():
        if own.ndim == 1:
            own.data.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        width = own[0].numel()
        numbers = some.to(own) / width**0.5
        flat = own.data.view(-1)
        for start in range(0, len(flat), len(numbers)):
            part = flat[start : start + len(numbers)]
            part.copy_(numbers[: len(part)])


def made(unet: nn.Module, folder: Path, layout: str) -> list[Path]:
    """LoRA files on the attention of a UNet."""
    found = []
    for number in range(FILES):
        generator = torch.Generator().manual_seed(number)
        tensors: dict[str, Tensor] = {}
        for path, module in unet.named_modules():
            if isinstance(module, nn.Linear) and path.endswith(LAYERS):
                down = torch.randn(RANK, module.in_features, generator=generator) / module.in_features**0.5
                up = torch.randn(module.out_features, RANK, generator=generator) / 20
                tensors |= _named(layout, path, down.bfloat16(), up.bfloat16())
        found.append(folder / f"{layout}{number}.safetensors")
        save_file(tensors, found[-1], {"format": "pt"})
    return found


def _named(layout: str, path: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    if layout == "diffusers":
        return {f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up}
    stem = f"lora_unet_{path.replace('.', '_')}"
    alpha = torch.tensor(float(RANK // 2), dtype=down.dtype)
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": alpha}


def compare(kind: str, pipe: Any, files: list[Path]) -> float:
    """The greatest distance between the outputs of both sides over the size of what the adapters changed.

    Raises:
        UserError: It is beyond what the rounding of the base's numbers explains.
    """
    unet = pipe.unet
    call = _call(kind, unet)
    with torch.no_grad():
        plain = unet(**call)[0]
        adapters = Adapters(pipe)
        for file in files[:3]:
            adapters.load(file)
        adapters.set({name: 0.3 * (number + 1) for number, name in enumerate(adapters.names)})
        ours = unet(**call)[0]
        for name in adapters.names:
            adapters.remove(name)
        again = unet(**call)[0]
        names = _load_theirs(pipe, files[:3])
        pipe.set_adapters(names, [0.3 * (number + 1) for number in range(3)])
        theirs = unet(**call)[0]
        pipe.unload_lora_weights()
    if not torch.equal(plain, again):
        raise UserError(f"{kind}: the base is another one after its adapters were removed")
    change = float((theirs - plain).float().abs().max())
    apart = float((ours - theirs).float().abs().max()) / change
    limit = 1e-3 if plain.dtype == torch.float32 else 0.1
    if not change > 0 or not apart < limit:
        raise UserError(f"{kind}: outputs differ by {apart:.2g} of what the adapters change; nothing was measured")
    return apart


def _call(kind: str, unet: nn.Module) -> dict[str, Any]:
    own = next(unet.parameters())
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(own)

    config: Any = unet.config
    width = config.cross_attention_dim
    call: dict[str, Any] = {"sample": random(1, 4, 16, 16), "timestep": 500, "encoder_hidden_states": random(1, 77, width)}
    if kind == "sdxl":
        call["added_cond_kwargs"] = {"text_embeds": random(1, 1280), "time_ids": random(1, 6)}
    return {**call, "return_dict": False}


def measured(pipe: Any, files: list[Path], options: argparse.Namespace) -> list[tuple[str, ...]]:
    """The rows of the table."""
    sides: dict[str, Callable[[Any, list[Path], bool], Times]] = {"ours": ours, "theirs": theirs}
    found: dict[str, Times] = {"ours": {}, "theirs": {}}
    for number in range(options.repeats + 1):
        for side in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
            times = sides[side](pipe, files, not options.no_merge)
            for what, spans in times.items() if number else ():  # the first round warms up
                found[side].setdefault(what, []).extend(spans)
    rows: list[tuple[str, ...]] = []
    for what in found["ours"]:
        own = statistics.median(found["ours"][what])
        other = statistics.median(found["theirs"].get(_of_theirs(what), [float("nan")]))
        rows.append((what, f"{own:.2f}", f"{other:.1f}", f"{other / own:.1f}x"))
    return rows


def _of_theirs(what: str) -> str:
    return "load 1st" if what.startswith("load 1st") else what


@contextmanager
def _timed(times: Times, what: str, device: torch.device) -> Iterator[None]:
    """Time what happens inside, in milliseconds, with the device's work."""
    _wait(device)
    began = time.perf_counter()
    yield
    _wait(device)
    times.setdefault(what, []).append(1000 * (time.perf_counter() - began))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ours(pipe: Any, files: list[Path], merging: bool) -> Times:
    """A round of ours."""
    times: Times = {}
    device = pipe.unet.device
    gc.collect()
    adapters = Adapters(pipe)
    planning.forget()
    with _timed(times, "load 1st, new", device):
        adapters.load(files[0], "a0")
    adapters.remove("a0")
    with _timed(times, "load 1st, known", device):
        adapters.load(files[0], "a0")
    for number in range(1, 8):
        with _timed(times, "load 8th" if number == 7 else "load between", device):
            adapters.load(files[number], f"a{number}")
    for number in range(4):
        with _timed(times, "set one of 8", device):
            adapters.set(a3=0.1 * number)
        with _timed(times, "set all 8", device):
            adapters.set({f"a{one}": 0.1 * (one + number + 1) for one in range(8)})
    for number in (8, 3):
        with _timed(times, "swap one of 8", device):
            adapters.swap("a3", files[number])
    if merging:
        with _timed(times, "merge 8", device):
            adapters.merge()
        with _timed(times, "unmerge 8", device):
            adapters.unmerge()
    for number in range(7, -1, -1):
        with _timed(times, "remove 1 of 8" if number == 7 else "remove between", device):
            adapters.remove(f"a{number}")
    return {what: spans for what, spans in times.items() if not what.endswith("between")}


def theirs(pipe: Any, files: list[Path], merging: bool) -> Times:
    """A round of diffusers with peft."""
    times: Times = {}
    device = pipe.unet.device
    gc.collect()
    names = []
    for number in range(8):
        with _timed(times, {0: "load 1st", 7: "load 8th"}.get(number, "load between"), device):
            names += _load_theirs(pipe, [files[number]], number)
    pipe.set_adapters(names)
    for number in range(4):
        with _timed(times, "set one of 8", device):
            pipe.set_adapters(names, [1.0] * 7 + [0.1 * number])
        with _timed(times, "set all 8", device):
            pipe.set_adapters(names, [0.1 * (one + number + 1) for one in range(8)])
    for number in (8, 3):
        with _timed(times, "swap one of 8", device):
            pipe.load_lora_weights(files[number].parent, weight_name=files[number].name, adapter_name="a3", hotswap=True)
    if merging:
        with _timed(times, "merge 8", device):
            pipe.fuse_lora(adapter_names=names)
        with _timed(times, "unmerge 8", device):
            pipe.unfuse_lora()
    with _timed(times, "remove 1 of 8", device):
        pipe.delete_adapters("a7")
    pipe.unload_lora_weights()
    return {what: spans for what, spans in times.items() if not what.endswith("between")}


def _load_theirs(pipe: Any, files: list[Path], first: int = 0) -> list[str]:
    names = []
    for number, file in enumerate(files, first):
        names.append(f"a{number}")
        pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=names[-1])
    return names


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--layouts", nargs="+", choices=["diffusers", "kohya"], default=["diffusers"])
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--precision", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-merge", action="store_true", help="leave out merging, which takes memory")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
