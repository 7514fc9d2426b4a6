"""What a frozen base computes in fewer passes: the same numbers, and less kept.

Kernels run on CUDA, or on a CPU where Triton is installed and TRITON_INTERPRET=1 is set.
"""

import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from taped import Collecting
from torch import Tensor, nn
from torch.nn import functional as F

from peft_diffusion import fast
from peft_diffusion.fast import frozen_ops

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
RUNS = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
KERNELS = pytest.mark.skipif(not RUNS, reason="needs CUDA, or Triton's interpreter")
Norm = TypeVar("Norm", nn.GroupNorm, nn.LayerNorm)
WAYS = ["torch", pytest.param("kernels", marks=KERNELS)]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether torch or the kernels compute."""
    if request.param == "kernels":
        assert frozen_ops.kernels_on(DEVICE) is not None
    else:
        monkeypatch.setattr(frozen_ops, "kernels_on", lambda device: None)


def frozen(norm: Norm) -> Norm:
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm.requires_grad_(False).to(DEVICE)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).requires_grad_(True)


def check_same(found: Sequence[Tensor], expected: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Outputs, and gradients of a random sum of them."""
    weights = [torch.randn_like(one) for one in expected]

    def gradients(outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        sums = [(w * y).sum() for w, y in zip(weights, outputs, strict=True)]
        return torch.autograd.grad(torch.stack(sums).sum(), inputs)

    wanted = gradients(expected)
    for a, b in zip([*found, *gradients(found)], [*expected, *wanted], strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("shape", [(2, 40, 4, 5, 8), (1, 24, 30, 33, 2)], ids=["whole", "in stretches"])
def test_group_norm_is_that_of_torch(shape: tuple[int, ...], shifted: bool, silu: bool, way: None) -> None:
    *size, groups = shape
    torch.manual_seed(0)
    norm, x = frozen(nn.GroupNorm(groups, size[1])), drawn(*size)
    with torch.no_grad():
        x.mul_(0.1).add_(5)  # a mean that is far from 0
    shift = drawn(*size[:2]) if shifted else None
    z = norm(x if shift is None else x + shift[:, :, None, None])
    expected = F.silu(z) if silu else z
    found = frozen_ops.group_norm(x, norm, shift, silu)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    check_same(found, (expected, x), [x] if shift is None else [x, shift])


@KERNELS
@pytest.mark.parametrize("programs", [1, 5, 8])
def test_a_large_map_is_summed_up_in_long_stretches(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 tiles, in which the last stretch may be shorter than the others, or its last tiles beyond the map."""
    kernels = frozen_ops.kernels_on(DEVICE)
    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    torch.manual_seed(0)
    norm, x = frozen(nn.GroupNorm(2, 24)), drawn(1, 24, 45, 45)
    with torch.no_grad():
        x.add_(torch.linspace(-9, 9, 45, device=DEVICE)[:, None])  # so that stretches have other means
    check_same(frozen_ops.group_norm(x, norm), (norm(x), x), [x])


@pytest.mark.parametrize("images", [1, 3])
def test_shifts_may_lie_apart_or_be_one(images: int, way: None) -> None:
    torch.manual_seed(0)
    norm, wide = frozen(nn.GroupNorm(4, 16)), torch.randn(images, 50, device=DEVICE)
    for size in (4, 40):
        x = drawn(images, 16, size, size)
        for shift in (wide[:, 20:36], wide[:1, 3:19].expand(images, -1)):
            expected = F.silu(norm(x + shift[:, :, None, None]))
            check_same(frozen_ops.group_norm(x, norm, shift, silu=True), (expected, x), [x])


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("width", [40, 320])
def test_layer_norm_is_that_of_torch(width: int, added: bool, way: None) -> None:
    torch.manual_seed(0)
    norm, x = frozen(nn.LayerNorm(width)), drawn(2, 7, width)
    more = drawn(2, 7, width) if added else None
    total = x if more is None else x + more
    check_same(frozen_ops.layer_norm(x, norm, more), (norm(total), total), [x] if more is None else [x, more])


def test_a_layer_norm_of_a_sum_reads_rows_that_lie_apart(way: None) -> None:
    norm, wide, more = frozen(nn.LayerNorm(40)), drawn(2, 7, 56).detach(), drawn(2, 7, 40).detach()
    found, total = frozen_ops.layer_norm(wide[..., :40], norm, more)
    torch.testing.assert_close(total, wide[..., :40] + more)
    torch.testing.assert_close(found, norm(wide[..., :40] + more))
    assert total.is_contiguous() and found.is_contiguous()


def test_the_gate_is_that_of_torch(way: None) -> None:
    torch.manual_seed(0)
    x = drawn(2, 7, 80)
    value, gate = x.chunk(2, -1)
    check_same([frozen_ops.gated(x)], [value * F.gelu(gate)], [x])


def test_a_sum_with_a_bias_is_one(way: None) -> None:
    torch.manual_seed(0)
    a, b, bias = drawn(2, 8, 3, 5), drawn(2, 8, 3, 5), torch.randn(8, device=DEVICE)
    check_same([frozen_ops.sum_with_bias(a, b, bias)], [a + b + bias[:, None, None]], [a, b])


@pytest.mark.parametrize("geometry", [(3, 1, 1), (3, 2, 1), (1, 1, 0)])
def test_a_frozen_convolution_keeps_no_input(geometry: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(8, 12, *geometry).requires_grad_(False).to(DEVICE), drawn(2, 8, 9, 7)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        found = [frozen_ops.conv2d(x, conv)]
        found += [frozen_ops.pointwise(x, conv)] if geometry[0] == 1 else []
        linear = F.linear(x.permute(0, 2, 3, 1), torch.ones(3, 8, device=DEVICE))
    assert kept and all(tensor.numel() < x.numel() or tensor.data_ptr() == conv.weight.data_ptr() for tensor in kept)
    check_same(found, [conv(x)] * len(found), [x])
    assert linear.requires_grad


@pytest.mark.slow
def test_what_has_no_memory_is_given_to_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the memory of a step is predicted: a kernel would read at address 0. Peaks are of the kernels' results. Before
    training, all kernels of a step are compiled, once for a machine."""
    from conftest import make_xl_pipe
    from test_memory import short

    from peft_diffusion.fast.unet import swapped
    from peft_diffusion.training.machine.memory_plan import Load, MemoryPlan
    from peft_diffusion.training.machine.preflight import peak

    unet = short(make_xl_pipe()).unet
    inputs = {
        "latents": torch.randn(2, 4, 16, 16), "text": torch.randn(2, 77, unet.config.cross_attention_dim),
        "summary": torch.randn(2, 16), "sizes": torch.ones(2, 6),
    }  # fmt: skip

    def loss(given: Mapping[str, Tensor]) -> Tensor:
        added = {"text_embeds": given["summary"], "time_ids": given["sizes"]}
        latents = given["latents"].requires_grad_(True)
        found: Tensor = unet(latents, 500, given["text"], added_cond_kwargs=added).sample
        return found.square().mean()

    plain = peak(loss, inputs, torch.device("cpu"))
    with swapped(unet):
        in_torch = peak(loss, inputs, torch.device("cpu"))
        monkeypatch.setattr(frozen_ops, "kernels_on", lambda device: SimpleNamespace(compiling_ahead=lambda: False))
        of_kernels = peak(loss, inputs, torch.device("cpu"))
        assert 0 < of_kernels < in_torch and of_kernels < plain
        kernels = Collecting(tmp_path)
        monkeypatch.setattr(frozen_ops, "kernels_on", lambda device: kernels)
        load = Load([unet], [unet], lambda: inputs, dropout=False, savings=[])
        for _ in range(2):
            MemoryPlan("auto", load, loss, list, torch.device("cpu"), records=False, sharded=False).compile()
        loss(inputs).backward()
    assert kernels.ahead == 1 and kernels.noted[False] == kernels.noted[True]
    assert {"group_norm_back", "layer_norm_back", "gated_back"} <= {name for name, *_ in kernels.noted[True]}


class _Kernels:
    """What kernels give, by torch; one of them may be compiled wrongly."""

    def __init__(self, wrong: str | None) -> None:
        self.wrong = wrong

    def _told(self, name: str, found: Tensor) -> Tensor:
        return found + 0.01 if name == self.wrong else found

    def group_norm(self, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, rstd = frozen_ops._group_norm_in_torch(*given)
        return self._told("group_norm", y), mean, rstd

    def group_norm_back(self, *given: Any) -> Tensor:
        return self._told("group_norm_back", frozen_ops._group_norm_back_in_torch(*given))

    def layer_norm(self, x: Tensor, added: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x + added
        return total, self._told("layer_norm", F.layer_norm(total, total.shape[-1:], weight, bias, eps))

    def gated(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, -1)
        return self._told("gated", value * F.gelu(gate))

    def gated_back(self, dy: Tensor, x: Tensor) -> Tensor:
        return x

    def compiling_ahead(self) -> bool:
        return False


@pytest.mark.parametrize("wrong", [None, "group_norm", "group_norm_back", "layer_norm", "gated"])
def test_kernels_that_give_something_else_are_left_alone(
    wrong: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    there = _Kernels(wrong)
    monkeypatch.setitem(sys.modules, "peft_diffusion.fast.kernels", there)
    monkeypatch.setattr(fast, "kernels", there, raising=False)
    found = frozen_ops._seen(torch.device("cpu"))
    assert found is (there if wrong is None else None)
    assert [one.getMessage().rpartition(": ")[2].split()[0] for one in caplog.records] == ([] if wrong is None else [wrong])


def test_kernels_are_looked_for_once_also_while_another_thread_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, goes_on = [], threading.Event()

    def seen(device: torch.device) -> str:
        looked.append(device)
        assert goes_on.wait(10)
        return "kernels"

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(frozen_ops, "_found", {})
    monkeypatch.setattr(frozen_ops, "_seen", seen)
    thread = frozen_ops.look_ahead(torch.device("cpu"))
    while not looked:
        time.sleep(0.001)
    threading.Timer(0.05, goes_on.set).start()
    assert frozen_ops.kernels_on(torch.device("cpu")) == "kernels"
    thread.join(10)
    assert len(looked) == 1


def test_a_few_calls_are_computed_by_torch_without_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(device: torch.device) -> None:
        raise AssertionError("a kernel would be compiled")

    monkeypatch.setattr(frozen_ops, "kernels_on", refused)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    norm, x = frozen(nn.GroupNorm(4, 8)), drawn(1, 8, 3, 3)
    with frozen_ops.in_torch():
        torch.testing.assert_close(frozen_ops.group_norm(x, norm)[0], norm(x))
        assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark
    with pytest.raises(AssertionError, match="compiled"):
        frozen_ops.group_norm(x, norm)


def test_what_is_too_large_for_kernels_to_count_in_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_ops, "kernels_on", lambda device: "kernels")
    assert frozen_ops._kernels(torch.empty(7, 256, 1024, 1024, device="meta")) == "kernels"
    assert frozen_ops._kernels(torch.empty(8, 256, 1024, 1024, device="meta")) is None
