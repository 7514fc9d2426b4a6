"""The tools for adapter files on the shapes of Stable Diffusion XL, beside peft's and kohya's way of the same thing.

    python scripts/benchmark_tools.py --folder /tmp/tools                  # everything, on two cores: half an hour, 30 GiB
    python scripts/benchmark_tools.py --folder /tmp/tools --small          # the same on narrow layers, in a minute
    python scripts/benchmark_tools.py --folder /tmp/tools --cases merge resize --kohya ~/sd-scripts

Weights are random: time and memory do not ask what was learned. Each side runs in a process of its own, which tells seconds,
the most memory beyond what importing took, and the error against an exact decomposition in float64. peft and kohya decompose
every weight in full, which takes hours for a whole file: what is compared there is a sample of sites, one of each shape, on
both sides; ours is then told for the whole file too. kohya's script for resizing is taken from ``--kohya``, a checkout of
sd-scripts; without it, and for extraction, its way is written out here: ``torch.linalg.svd`` of every weight.
"""

import argparse
import importlib.util
import json
import math
import os
import resource
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are no part of the package

import peft_diffusion as pd
from peft_diffusion.bases.skeleton import published
from peft_diffusion.core import targets
from peft_diffusion.core.reduction import Truncation, reduced_matrix
from peft_diffusion.formats import container

GIB = 2**30
RANK, FILES, FROM_RANK = 32, 10, 128
NARROW = 8  # how many times narrower the layers of --small are


def main() -> None:
    """Make the files, run every case, and print a table."""
    arguments = _arguments()
    if arguments.side:
        _run_side(arguments)
        return
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for case in arguments.cases or [name for name in CASES if not (arguments.small and name == "extract")]:
        _prepare(case, folder, arguments.small)
        for side in CASES[case]:
            if side.endswith("-kohya") and arguments.kohya is None:
                continue
            results.append(_in_process(case, side, arguments))
    print(f"\n{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for line in _table(results):
        print(line)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the files that are made, and kept for the next time")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=(), help="by default all that there are")
    parser.add_argument("--small", action="store_true", help="narrow layers, to see that the script works")
    parser.add_argument("--kohya", type=Path, help="a checkout of sd-scripts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    return found


# The files.


def _sites() -> dict[str, tuple[int, int]]:
    """The layers that an SDXL LoRA of kohya's trainer sits on, by the names in its files: outputs and inputs."""
    found = {}
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_text_model_"}
    for component, module in published("sdxl").parts.items():
        for path in targets.match(module, "attention+ff"):
            layer = module.get_submodule(path)
            if isinstance(layer, nn.Linear):
                bare = path.removeprefix("text_model.").replace(".", "_")
                found[prefixes[component] + bare] = (layer.out_features, layer.in_features)
    return found


def _shapes(small: bool) -> dict[str, tuple[int, int]]:
    return {name: (out // NARROW, into // NARROW) if small else (out, into) for name, (out, into) in _sites().items()}


def _sample(shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """One site of each shape."""
    return {name: shape for shape, name in {shape: name for name, shape in shapes.items()}.items()}


def _prepare(case: str, folder: Path, small: bool) -> None:
    shapes = _shapes(small)
    if case == "extract":
        for name in ("base", "tuned"):
            _write_checkpoint(folder / f"{name}{'-small' * small}", shapes, name == "tuned", small)
        return
    rank = FROM_RANK if case == "resize" else RANK
    for number in range(1 if case == "resize" else FILES):
        for kind, sites in (("whole", shapes), ("sample", _sample(shapes))):
            _write_lora(_file(folder, case, kind, number, small), sites, rank, number)


def _file(folder: Path, case: str, kind: str, number: int, small: bool) -> Path:
    return folder / f"{'from' if case == 'resize' else 'lora'}-{kind}{'-small' * small}-{number}.safetensors"


def _write_lora(path: Path, shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> None:
    if path.exists():
        return
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (outputs, inputs) in shapes.items():
        falling = torch.arange(1, rank + 1).float() ** -0.5  # singular values as training leaves them
        down = torch.randn(rank, inputs, generator=generator) * falling[:, None] / math.sqrt(inputs)
        tensors[f"{name}.lora_down.weight"] = down.half()
        tensors[f"{name}.lora_up.weight"] = (torch.randn(outputs, rank, generator=generator) / rank).half()
        tensors[f"{name}.alpha"] = torch.tensor(rank / 2)
    save_file(tensors, path, {"ss_base_model_version": "sdxl_base_v1-0"})


def _write_checkpoint(folder: Path, shapes: Mapping[str, tuple[int, int]], tuned: bool, small: bool) -> None:
    """A diffusers folder in half precision; the tuned one differs at every layer, with values that fall slowly."""
    if folder.exists():
        return
    from peft_diffusion.bases.architectures import Architecture

    Architecture("sdxl").write(folder)
    if small:
        raise SystemExit("extract has no --small: its folders have the configurations of SDXL; leave it out with --cases")
    for component, module in published("sdxl").parts.items():
        change = torch.Generator().manual_seed(1000 + len(component))
        layers = {f"{path}.weight" for path, one in module.named_modules() if isinstance(one, nn.Linear)}

        def make(name: str, module: nn.Module = module, layers: set[str] = layers, change: Any = change) -> Tensor:
            shape = tuple(module.state_dict()[name].shape)
            own = torch.randn(shape, generator=torch.Generator().manual_seed(hash_of(name))) * 0.02
            if tuned and name in layers:
                falling = torch.arange(1, 65).float() ** -0.5
                up, down = torch.randn(shape[0], 64, generator=change), torch.randn(64, shape[1], generator=change)
                own += (up * falling) @ down * (0.002 / math.sqrt(64)) + 1e-4 * torch.randn(shape, generator=change)
            return own.half()

        is_unet = component == "unet"
        file = folder / component / f"{'diffusion_pytorch_model' if is_unet else 'model'}.safetensors"
        forms = {name: (torch.float16, tuple(one.shape)) for name, one in module.state_dict().items()}
        container.write_each(file, forms, make, {})


def hash_of(name: str) -> int:
    """A seed that follows from a name."""
    return int.from_bytes(name.encode()[-7:], "little")


# The sides. Each does its work, and gives what measures the errors afterwards, out of time: by site, against the least that
# an exact decomposition in float64 leaves out.

Check = Callable[[], Mapping[str, float]]


def _unchecked() -> Mapping[str, float]:
    return {}


def _merge_ours(folder: Path, small: bool, kind: str = "whole", rank: int | None = None) -> Check:
    files = [f"{_file(folder, 'merge', kind, number, small)}=0.1" for number in range(FILES)]
    output = folder / f"merged-{kind}-{rank}.safetensors"
    if small:
        _make_narrow()
    pd.merge(pd.MergeConfig(files, output=output, rank=rank, base="sdxl"))
    if rank is None or kind == "whole":
        return _unchecked
    return lambda: _errors(output, _sum_of(folder, small), rank)


def _at_peft(name: str) -> str:
    """The name of a layer in peft's model: it merges nothing in a layer that has lora_ in its name."""
    return f"site_{name.removeprefix('lora_')}"


def _merge_peft(folder: Path, small: bool, kind: str = "whole", rank: int | None = None) -> Check:
    from peft import LoraConfig, get_peft_model

    shapes = _shapes(small) if kind == "whole" else _sample(_shapes(small))
    layers = nn.Module()
    for name, (outputs, inputs) in shapes.items():
        bare = nn.Linear(inputs, outputs, bias=False, device="meta", dtype=torch.float16)
        layers.add_module(_at_peft(name), bare.to_empty(device="cpu"))  # takes no memory until it is written to
    every = r"site_[^.]*"  # peft takes minutes to look through a list of a thousand names
    config = LoraConfig(r=RANK, lora_alpha=RANK // 2, target_modules=every)
    model: Any = None
    for number in range(FILES):
        if model is None:
            model = get_peft_model(layers, config, f"n{number}", low_cpu_mem_usage=True)
        else:
            model.add_adapter(f"n{number}", config, low_cpu_mem_usage=True)
        tensors = load_file(_file(folder, "merge", kind, number, small))
        for name in shapes:
            layer = getattr(model.base_model.model, _at_peft(name))
            for own, theirs in ((layer.lora_A, "lora_down"), (layer.lora_B, "lora_up")):
                own[f"n{number}"].weight = nn.Parameter(tensors[f"{name}.{theirs}.weight"].float())
    names = [f"n{number}" for number in range(FILES)]
    if rank is None:
        model.add_weighted_adapter(names, [0.1] * FILES, "merged", combination_type="cat")
    else:
        model.add_weighted_adapter(names, [0.1] * FILES, "merged", combination_type="svd", svd_rank=rank)
    tensors = {}
    for name in shapes:
        layer = getattr(model.base_model.model, _at_peft(name))
        tensors[f"{name}.lora_down.weight"] = layer.lora_A["merged"].weight.detach().half().contiguous()
        tensors[f"{name}.lora_up.weight"] = layer.lora_B["merged"].weight.detach().half().contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(layer.scaling["merged"] * len(tensors[f"{name}.lora_down.weight"]))
    output = folder / f"peft-{kind}.safetensors"
    save_file(tensors, output)
    return _unchecked if rank is None else lambda: _errors(output, _sum_of(folder, small), rank)


def _resize_ours(folder: Path, small: bool, kind: str = "whole") -> Check:
    source, output = _file(folder, "resize", kind, 0, small), folder / f"resized-{kind}.safetensors"
    if small:
        _make_narrow()
    pd.resize(pd.ResizeConfig(source, output=output, rank=RANK, base="sdxl"))
    return _unchecked if kind == "whole" else lambda: _errors(output, _changes(source), RANK)


def _resize_kohya(folder: Path, small: bool, checkout: Path) -> Check:
    source, output = _file(folder, "resize", "sample", 0, small), folder / "kohya-sample.safetensors"
    tensors = {name: tensor.float() for name, tensor in load_file(source).items()}
    found, _, _ = _kohya(checkout).resize_lora_model(tensors, RANK, RANK, torch.float16, "cpu", None, None, False)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, output)
    return lambda: _errors(output, _changes(source), RANK)


def _kohya(checkout: Path) -> Any:
    """kohya's script, without the trainer that it imports for the hashes of a file."""
    for name in ("library", "library.train_util", "library.model_util", "library.utils"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["library"].train_util = sys.modules["library.train_util"]  # type: ignore[attr-defined]
    sys.modules["library"].model_util = sys.modules["library.model_util"]  # type: ignore[attr-defined]
    sys.modules["library.utils"].setup_logging = lambda: None  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("resize_lora", checkout / "networks" / "resize_lora.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"{checkout} is no checkout of sd-scripts")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _extract_ours(folder: Path, small: bool) -> Check:
    output = folder / "extracted.safetensors"
    pd.extract(pd.ExtractConfig(str(folder / "tuned"), str(folder / "base"), output=output, rank=RANK))
    return _unchecked


def _differences(folder: Path, small: bool) -> Iterator[tuple[str, Tensor]]:
    """The difference of one weight of each shape."""
    if small:
        raise SystemExit("extract has no --small")
    module = published("sdxl").parts["unet"]
    paths = {one.weight.shape: f"{path}.weight" for path, one in module.named_modules() if isinstance(one, nn.Linear)}
    names = ("base", "tuned")
    files = [
        container.Stored(container.read_header(folder / name / "unet" / "diffusion_pytorch_model.safetensors"))
        for name in names
    ]
    for path in paths.values():
        yield path, files[1][path].float() - files[0][path].float()


def _extract_sample_ours(folder: Path, small: bool) -> Check:
    found = {name: reduced_matrix(one, Truncation(RANK)).pair for name, one in _differences(folder, small)}
    return _against({name: (one.up, one.down) for name, one in found.items()}, folder, small)


def _extract_sample_full(folder: Path, small: bool) -> Check:
    found = {}
    for name, one in _differences(folder, small):
        u, values, v = torch.linalg.svd(one)
        found[name] = (u[:, :RANK] @ torch.diag(values[:RANK]), v[:RANK].clone())
    return _against(found, folder, small)


def _against(found: Mapping[str, tuple[Tensor, Tensor]], folder: Path, small: bool) -> Check:
    def check() -> Mapping[str, float]:
        return {
            name: float((one - found[name][0] @ found[name][1]).norm() / one.norm()) / _best(one, RANK)
            for name, one in _differences(folder, small)
        }

    return check


CASES: dict[str, dict[str, Callable[..., Check]]] = {
    "merge": {
        "ten files, exact: ours": _merge_ours,
        "ten files, exact: peft cat": _merge_peft,
        "ten files to rank 32: ours": lambda folder, small: _merge_ours(folder, small, "whole", RANK),
        "sample to rank 32: ours": lambda folder, small: _merge_ours(folder, small, "sample", RANK),
        "sample to rank 32: peft svd": lambda folder, small: _merge_peft(folder, small, "sample", RANK),
    },
    "resize": {
        "128 to 32: ours": _resize_ours,
        "sample 128 to 32: ours": lambda folder, small: _resize_ours(folder, small, "sample"),
        "sample 128 to 32: kohya's script-kohya": _resize_kohya,
    },
    "extract": {
        "rank 32: ours": _extract_ours,
        "sample at rank 32: ours": _extract_sample_ours,
        "sample at rank 32: full decompositions": _extract_sample_full,
    },
}


# What is measured.


def _changes(path: Path) -> dict[str, Tensor]:
    tensors = load_file(path)
    names = [name.removesuffix(".lora_up.weight") for name in tensors if name.endswith(".lora_up.weight")]
    found = {}
    for name in names:
        up, down = (tensors[f"{name}.lora_{side}.weight"].double() for side in ("up", "down"))
        found[name] = float(tensors[f"{name}.alpha"]) / len(down) * up @ down
    return found


def _sum_of(folder: Path, small: bool) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for number in range(FILES):
        for name, one in _changes(_file(folder, "merge", "sample", number, small)).items():
            total[name] = total.get(name, torch.zeros_like(one)) + 0.1 * one
    return total


def _best(matrix: Tensor, rank: int) -> float:
    rows = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    squares = torch.linalg.eigvalsh(rows.double() @ rows.double().T).clamp_min(0).flip(0)
    return math.sqrt(float(squares[rank:].sum() / squares.sum()))


def _errors(path: Path, wholes: Mapping[str, Tensor], rank: int) -> dict[str, float]:
    """How many times the least error that a rank allows each site of a file has."""
    found = _changes(path)
    return {name: float((found[name] - whole).norm() / whole.norm()) / _best(whole, rank) for name, whole in wholes.items()}


def _make_narrow() -> None:
    """Files of narrow layers are for no base that there is: the skeleton of SDXL is made as narrow, in this process."""
    for module in published("sdxl").parts.values():
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.out_features //= NARROW
                layer.in_features //= NARROW
                empty = torch.empty(layer.out_features, layer.in_features, device="meta")
                layer.weight = nn.Parameter(empty, requires_grad=False)


def _run_side(arguments: argparse.Namespace) -> None:
    """Runs in a process of its own, and prints what it measured as JSON."""
    case, _, side = arguments.side.partition("/")
    published("sdxl")  # what importing and the names of the base take is no part of the work
    if "peft" in side:
        import peft  # noqa: F401
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    used = time.process_time()
    more = (arguments.kohya,) if side.endswith("-kohya") else ()
    check = CASES[case][side](arguments.folder, arguments.small, *more)
    seconds, cpu = time.monotonic() - start, time.process_time() - used
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    error = max(check().values(), default=None)
    print(json.dumps({"side": side, "seconds": seconds, "cpu": cpu, "peak": peak, "error": error}))


def _in_process(case: str, side: str, arguments: argparse.Namespace) -> dict[str, Any]:
    words = [sys.executable, __file__, "--folder", str(arguments.folder), "--side", f"{case}/{side}"]
    words += ["--threads", str(arguments.threads), *(["--small"] if arguments.small else [])]
    words += ["--kohya", str(arguments.kohya)] if arguments.kohya else []
    done = subprocess.run(
        words,
        text=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "GOMP_SPINCOUNT": "3000"},
    )
    if done.returncode:
        print(done.stderr)
        raise SystemExit(f"{case}/{side} failed")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{case}: {found['side']}: {found['seconds']:.1f} s, {found['cpu']:.1f} of CPU, {found['peak'] / GIB:.2f} GiB",
        flush=True,
    )
    return {"case": case, **found}


def _table(results: list[dict[str, Any]]) -> Iterator[str]:
    yield "| case | side | seconds | of CPU | memory beyond the import | error / least possible |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for one in results:
        error = "" if one["error"] is None else f"{one['error']:.5f}"
        side = one["side"].removesuffix("-kohya")
        yield f"| {one['case']} | {side} | {one['seconds']:.1f} | {one['cpu']:.1f} | {one['peak'] / GIB:.2f} GiB | {error} |"


if __name__ == "__main__":
    main()
