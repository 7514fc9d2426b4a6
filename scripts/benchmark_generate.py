"""Drawing with LoRAs: this package against diffusers with peft, eager and as one recorded graph, in one run.

    python scripts/benchmark_generate.py                                  # SD1.5 and SDXL, 1 and 8 LoRAs, on CUDA
    python scripts/benchmark_generate.py --kinds sd1 --loras 1 --compiled default reduce-overhead   # theirs compiled too
    python scripts/benchmark_generate.py --kinds tiny --device cpu --loras 1 2 --steps 4   # sees that the script works

Weights are random and the LoRAs (rank 16, on attention) are files that both sides load. First the gate: a step of both sides
gives the same, up to the rounding of the precision. Then, for each side: loading the first and the last file, setting a
strength, exchanging one file for another, a step of the network (batch 2, one guided picture), and the whole picture. Peak
memory is that of the picture. Medians, in milliseconds; what loads and merges is timed from its second turn on. With
``--compiled`` their UNet runs through ``torch.compile`` as well, in each mode that is named; its first call is the time that
compiling takes.
"""

import argparse
import gc
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are no part of the package

from peft_diffusion import load_base
from peft_diffusion.bases.architectures import Architecture
from peft_diffusion.core.errors import UserError
from peft_diffusion.generation.adapters import Adapters
from scripts.measuring import markdown_table, peak_memory, run
from scripts.training_sides import TINY

RANK = 16
LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
IN_A_ROW = 10
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
NEAR = {"bfloat16": 3e-2, "float16": 4e-3, "float32": 1e-5}  # of a step's size, what two orders of rounding may differ by


def main() -> None:
    """The gate and the figures of each architecture."""
    parser = parser_of(__doc__, repeats=5)
    parser.add_argument("--loras", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--compiled", nargs="+", default=[], choices=MODES, help="modes of torch.compile for their UNet")
    options = read(parser)
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.kinds:
            Comparison(kind, options, Path(folder)).take()
            gc.collect()


def parser_of(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """A parser of what benchmarks of drawing have in common.

    Args:
        description: Of the script.
        repeats: How often it measures by default.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["sd1", "sdxl"], choices=["sd1", "sdxl", "tiny", "icons"])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="bfloat16", choices=DTYPES)
    return parser


def read(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the flags, and tell the card."""
    options = parser.parse_args()
    if options.device == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, diffusers {diffusers.__version__}", flush=True)
    return options


def pipeline(kind: str, folder: Path, device: str, dtype: torch.dtype) -> Any:
    """A pipeline of random weights, or the embedded base."""
    if kind == "icons":
        base = load_base(device=device, dtype=str(dtype).removeprefix("torch."))
        base.set_progress_bar_config(disable=True)
        return base
    made = Architecture("sdxl" if kind == "sdxl" else "sd1")
    made.write(folder)
    configs = made.configs()
    if kind == "tiny":
        configs["unet"] = {**TINY, "cross_attention_dim": configs["unet"]["cross_attention_dim"]}
    torch.manual_seed(0)
    parts: dict[str, Any] = {}
    with torch.device(device):
        parts["unet"] = diffusers.UNet2DConditionModel.from_config(configs["unet"])
        parts["vae"] = diffusers.AutoencoderKL.from_config(configs["vae"])
        for name in ("text_encoder", "text_encoder_2"):
            if name in configs:
                cls = transformers.CLIPTextModelWithProjection if name.endswith("2") else transformers.CLIPTextModel
                parts[name] = cls(transformers.CLIPTextConfig(**configs[name]))
    for part in parts.values():
        part.to(dtype).requires_grad_(False).eval()
    words = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    parts |= {"tokenizer": words} | ({"tokenizer_2": words} if "text_encoder_2" in parts else {})
    # Of a scheduler that asks the device for nothing in its steps.
    parts["scheduler"] = diffusers.EulerDiscreteScheduler.from_config(configs["scheduler"])
    if kind != "sdxl":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = getattr(diffusers, made.pipeline)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def lora_files(pipe: Any, count: int, folder: Path) -> list[Path]:
    """Random LoRAs in 16 bits, as diffusers names them."""
    from peft import LoraConfig, get_peft_model_state_dict

    found = []
    pipe.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS), "made")
    tensors = get_peft_model_state_dict(pipe.unet, adapter_name="made")
    for number in range(count):
        chance = torch.Generator().manual_seed(number)
        drawn = {name: (0.02 * torch.randn(tensor.shape, generator=chance)).half() for name, tensor in tensors.items()}
        path = folder / f"lora{number}"
        type(pipe).save_lora_weights(path, unet_lora_layers=drawn)
        found.append(path / "pytorch_lora_weights.safetensors")
    pipe.unload_lora_weights()
    return found


class Comparison:
    """One architecture: both sides on the same weights, files and inputs."""

    def __init__(self, kind: str, options: argparse.Namespace, folder: Path) -> None:
        self.kind, self.options = kind, options
        self.device, self.dtype = torch.device(options.device), DTYPES[options.precision]
        self.pipe = pipeline(kind, folder / kind, options.device, self.dtype)
        self.files = lora_files(self.pipe, max(options.loras) + 1, folder / kind)
        self.rows: list[list[str]] = []
        self.inputs = self._inputs()

    def take(self) -> None:
        """Measure, and print."""
        began = time.monotonic()
        self._base()
        for count in self.options.loras:
            theirs = self._theirs(count)
            ours = self._ours(count)
            self._check(f"{count} LoRAs, a step of both", ours["answer"], theirs["answer"])
            print(f"{self.kind} {count} LoRAs: {time.monotonic() - began:.0f} s", flush=True)
            for name in theirs:
                if name != "answer":
                    ratio = theirs[name] / ours[name] if ours.get(name) else None
                    self._row(f"{count} LoRAs, {name}", ours.get(name), theirs[name], ratio)
            for name in ours.keys() - theirs.keys():
                self._row(f"{count} LoRAs, {name}", ours[name], None, None)
        print(markdown_table([f"{self.kind}, ms", "ours", "diffusers + peft", "ratio"], self.rows), flush=True)

    def _check(self, what: str, one: Tensor, other: Tensor) -> None:
        """The gate. Raises UserError where two answers are not the same up to the rounding of the precision."""
        far = float((one - other).norm() / other.norm())
        print(f"{self.kind} {what} differs by {far:.2g}", flush=True)
        if not far <= NEAR[self.options.precision]:
            raise UserError("the gate was not passed: both sides compute something else, so their times compare nothing")

    def _row(self, what: str, *figures: float | None) -> None:
        self.rows.append([what, *("-" if one is None else f"{one:.4g}" for one in figures)])

    def _inputs(self) -> dict[str, Any]:
        config = self.pipe.unet.config
        chance = torch.Generator().manual_seed(1)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=chance).to(self.device, self.dtype)

        xl = self.kind == "sdxl"
        added = {"text_embeds": drawn(2, 1280), "time_ids": torch.ones(2, 6).to(self.device, self.dtype)} if xl else None
        return {
            "sample": drawn(2, 4, config.sample_size, config.sample_size),
            "timestep": torch.tensor(500.0, device=self.device),
            "encoder_hidden_states": drawn(2, 77, config.cross_attention_dim),
            "added_cond_kwargs": added,
            "return_dict": False,
        }

    @torch.no_grad()
    def _answer(self) -> Tensor:
        answer: Tensor = self.pipe.unet(**self.inputs)[0]
        return answer

    def _picture(self) -> None:
        size = 8 * self.pipe.unet.config.sample_size
        self.pipe(
            "a red apple", negative_prompt="blurred", num_inference_steps=self.options.steps, width=size, height=size,
            generator=torch.Generator().manual_seed(0), output_type="pt",
        )  # fmt: skip

    def _time(self, work: Callable[[], object], repeats: int | None = None, warm: int = 2) -> float:
        """The median of a work's time, in milliseconds."""
        for _ in range(warm):
            work()
        found = []
        for _ in range(repeats or self.options.repeats):
            self._wait()
            began = time.perf_counter()
            work()
            self._wait()
            found.append(1000 * (time.perf_counter() - began))
        return statistics.median(found)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _graph(self) -> float:
        """A step of the network as it stands, as one recorded graph."""
        side: torch.cuda.Stream = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._answer()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._answer()
        return self._step(graph.replay)

    def _step(self, work: Callable[[], object]) -> float:
        """A step among others: nothing waits for the device in between, as in the midst of a picture."""

        def several() -> None:
            for _ in range(IN_A_ROW):
                work()

        return self._time(several) / IN_A_ROW

    def _loaded(
        self, found: dict[str, Any], names: list[str], load: Callable[[Path, str], object], unload: Callable[[], object]
    ) -> None:
        """Load files one after the other, and again after they are gone; the first time warms up."""
        times: dict[str, list[float]] = {}
        for turn in range(self.options.repeats + 1):
            if turn:
                unload()
            for name, file in zip(names, self.files, strict=False):
                times.setdefault(name, []).append(self._time(partial(load, file, name), 1, 0))
        found["load the first"] = statistics.median(times[names[0]][1:])
        found["load the last"] = statistics.median(times[names[-1]][1:])

    def _drawn(self, found: dict[str, Any]) -> None:
        found["step"] = self._step(self._answer)
        with peak_memory() as peak:
            found["picture"] = self._time(self._picture, warm=1)
        found["peak MiB"] = peak.get("peak", 0) / 2**20

    def _base(self) -> None:
        """The base without adapters: eager, as one graph, and fast."""
        plain: dict[str, Any] = {}
        self._drawn(plain)
        if self.device.type == "cuda":
            plain["graph"] = self._graph()
        adapters = Adapters(self.pipe)
        adapters.fast(True)
        fast: dict[str, Any] = {}
        fast["first"] = self._time(self._picture, 1, 0)
        self._drawn(fast)
        if adapters.plain_because:
            raise UserError(f"nothing was recorded: {adapters.plain_because}")
        adapters.fast(False)
        for name, figure in fast.items():
            self._row(f"no LoRA, {name}", figure, plain.get(name), plain[name] / figure if name in plain else None)
        if "graph" in plain:
            self._row("no LoRA, step as a graph", fast["step"], plain["graph"], plain["graph"] / fast["step"])

    def _theirs(self, count: int) -> dict[str, Any]:
        """diffusers with peft."""
        found: dict[str, Any] = {}
        names = [f"a{number}" for number in range(count)]

        def load(file: Path, name: str) -> None:
            self.pipe.load_lora_weights(file, adapter_name=name)

        self._loaded(found, names, load, self.pipe.unload_lora_weights)
        found["set"] = self._time(lambda: self.pipe.set_adapters(names, [0.5] * count))
        self._drawn(found)
        found["answer"] = self._answer()
        if self.device.type == "cuda":
            found["step as a graph"] = self._graph()
        for mode in self.options.compiled:
            found |= {f"{name}, compiled ({mode})": figure for name, figure in self._compiled(mode, found["answer"]).items()}
        self.pipe.unload_lora_weights()
        return found

    def _compiled(self, mode: str, plain: Tensor) -> dict[str, Any]:
        """The network as it stands, compiled: its first call, a step and a picture, after the gate."""
        found: dict[str, Any] = {}
        torch._dynamo.reset()  # so that nothing of another mode is there
        network, self.pipe.unet = self.pipe.unet, torch.compile(self.pipe.unet, mode=None if mode == "default" else mode)
        try:
            found["first call"] = self._time(self._answer, 1, 0)
            self._check(f"compiled ({mode}), a step", self._answer().clone(), plain)
            found["step"], found["picture"] = self._step(self._answer), self._time(self._picture)
        finally:
            self.pipe.unet = network
        return found

    def _ours(self, count: int) -> dict[str, Any]:
        """This package."""
        found: dict[str, Any] = {}
        adapters = Adapters(self.pipe)
        names = [f"a{number}" for number in range(count)]

        def remove() -> None:
            for name in adapters.names:
                adapters.remove(name)

        self._loaded(found, names, adapters.load, remove)
        adapters.fast(True)
        found["set"] = self._time(lambda: adapters.set(dict.fromkeys(names, 0.5)))
        self._drawn(found)
        found["answer"], found["step as a graph"] = self._answer(), found["step"]
        for mode in self.options.compiled:
            found |= {f"{name}, compiled ({mode})": found[name] for name in ("step", "picture")}
        before = adapters.recordings

        others = itertools.cycle(self.files[-2:])
        found["swap"] = self._time(lambda: adapters.swap(names[-1], next(others)))
        found["first step after a swap"] = self._time(self._answer, 1, 0)
        print(f"{self.kind} {count} LoRAs: {before} recordings, {adapters.recordings - before} more by swapping", flush=True)
        merges, unmerges = [], []
        for _ in range(self.options.repeats + 1):
            merges.append(self._time(adapters.merge, 1, 0))
            unmerges.append(self._time(adapters.unmerge, 1, 0))
        found |= {"merge": statistics.median(merges[1:]), "unmerge": statistics.median(unmerges[1:])}
        adapters.merge()
        found["merged step"] = self._step(self._answer)
        adapters.unmerge()
        remove()
        adapters.fast(False)
        return found


if __name__ == "__main__":
    run(main)
