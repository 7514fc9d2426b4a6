"""Steps from CUDA graphs, and what happens where they cannot be recorded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pipe, make_xl_pipe
from rich.console import Console
from safetensors.torch import load_file
from test_training import Line, draw_pictures, small, trainer
from torch import Tensor

from peft_diffusion.api import train
from peft_diffusion.cli.console import TrainingConsole
from peft_diffusion.fast.cuda_graph import Inputs, Recorder, cause, shapes

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
CASES: dict[str, dict[str, Any]] = {
    "plain": {"held_out": None},
    "accumulation": {"accumulation": 3},
    "copies": {"batch_size": 4},
    "average": {"ema": 0.9, "clip": 0.0},
    "text": {"components": ("unet", "text_encoder")},
    "min-snr": {"min_snr_gamma": 5.0, "noise_offset": 0.05},
    "dropout": {"dropout": 0.3},
    "bottleneck": {"method": "bottleneck", "rank": None},
    "dora": {"method": "dora"},
    "oft": {"method": "oft", "rank": None},
    "prefix": {"method": "prefix", "rank": None, "target": "attentions"},
    "convolutions": {"target": "conv"},
    "words": {"components": ("unet", "text_encoder"), "rank": None, "block": (
        "unet attention lora rank=2", "text_encoder tokens tokens placeholders=sks initial=cat"
    )},
    "int8": {"quantize": "int8"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Convolutions in float32 round as such, and sums have one order: else two runs without a graph differ as well."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_learned_alike(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Each tensor as a whole, but for one number in a hundred: where a gradient is nearly 0, Adam makes a step of what the
    products' last bits were, and they are other ones in a recording, whose products are given another workspace."""
    assert a.keys() == b.keys()
    for name, one in a.items():
        far, size = (one.float() - b[name].float()).abs().flatten(), b[name].float().norm()
        alike = far.sort().values[: len(far) - len(far) // 100]
        assert alike.norm() <= 1e-3 * size, f"{name}: {alike.norm() / size:.2g} of it differs"
        assert far.norm() <= 0.05 * size, f"{name}: single numbers differ by {far.max():.2g}"


@CUDA
@pytest.mark.parametrize("case", CASES)
def test_a_graph_gives_the_same_adapter(case: str, tmp_path: Path) -> None:
    folder = draw_pictures(tmp_path / "pictures")
    found = []
    for graph in (True, False):
        base = tmp_path / "base"
        make_pipe().save_pretrained(base)
        changes = {"device": "cuda", "precision": "float32", "cuda_graph": graph, "base": str(base), **CASES[case]}
        said = Console(record=True, width=1000, file=(tmp_path / "log").open("w"))
        result = train(small(folder, tmp_path / str(graph), **changes), observers=[TrainingConsole(said)])
        assert "no CUDA graph" not in said.export_text()
        found.append(load_file(result.output))
    assert_learned_alike(*found)


@CUDA
def test_pictures_of_several_shapes_have_a_graph_each(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, size in enumerate([(64, 64), (64, 64), (128, 64), (64, 128)] * 2):
        Image.new("RGB", size, (number * 30, 60, 200 - number * 20)).save(folder / f"red cat {number}.png")
    found = []
    for graph in (True, False):
        run = small(
            folder, tmp_path / str(graph), missing_captions="name", device="cuda", precision="float32", cuda_graph=graph,
            resolution=96,
        )  # fmt: skip
        found.append(load_file(train(run, pipe=make_xl_pipe().to("cuda")).output))
    assert_learned_alike(*found)


@CUDA
def test_a_pipeline_of_ones_own_is_left_where_it_was(tmp_path: Path) -> None:
    pipe = make_pipe().to("cuda")
    train(small(draw_pictures(tmp_path / "pictures"), tmp_path / "run", device="cuda"), pipe=pipe)
    assert {part.device.type for part in (pipe.vae, pipe.unet, pipe.text_encoder)} == {"cuda"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="what fails here is that there is no CUDA")
def test_what_cannot_be_recorded_runs_all_the_same_and_says_why() -> None:
    plain = Line()
    trainer(plain)[0].run()
    task = Line()
    loop, log = trainer(task)
    loop.records = True  # as on CUDA: without one, recording fails
    loop.run()
    assert log.unrecorded == [loop.unrecorded] and not loop.records
    assert torch.equal(task.weight, plain.weight)


def test_memory_that_runs_out_is_no_reason_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Recorder[None], inputs: Inputs) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Recorder, "__call__", full)
    loop, _ = trainer(Line())
    loop.records = True
    with pytest.raises(RuntimeError, match="out of memory"):
        loop.run()


@CUDA
def test_a_recording_that_breaks_off_leaves_chance_as_it_was() -> None:
    device = torch.device("cuda", 0)
    total = torch.zeros((), device=device)

    def work(inputs: Inputs) -> None:
        drawn = torch.rand(4, device=device).sum()
        if torch.cuda.is_current_stream_capturing():
            drawn.item()  # which asks the device, and cannot be recorded
        total.add_(drawn)

    torch.manual_seed(3)
    expected = torch.rand(4, device=device)
    torch.manual_seed(3)
    stream = torch.cuda.current_stream(device)
    with pytest.raises(RuntimeError) as caught:
        Recorder(work, lambda: [total], device)({"x": torch.zeros(1)})
    assert "captur" in cause(caught.value) and total.item() == 0
    assert torch.cuda.current_stream(device) == stream
    assert torch.equal(torch.rand(4, device=device), expected)


def test_the_cause_is_the_first_of_the_errors_that_followed_one_another() -> None:
    try:
        try:
            raise RuntimeError("operation not permitted\nwith more lines")
        except RuntimeError:
            raise RuntimeError("capture was invalidated")  # noqa: B904 -- as torch does
    except RuntimeError as error:
        assert cause(error) == "operation not permitted"
    assert cause(RuntimeError()) == "RuntimeError"


def test_a_recording_depends_on_shapes_and_dtypes_alone() -> None:
    one = {"b": torch.zeros(2, 3), "a": torch.zeros(1)}
    assert shapes(one) == shapes({"a": torch.ones(1), "b": torch.ones(2, 3)})
    assert shapes(one) != shapes({**one, "b": torch.zeros(3, 3)})
    assert shapes(one) != shapes({**one, "a": torch.zeros(1, dtype=torch.long)})
