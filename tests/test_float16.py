"""Training in float16: the loss is scaled, and steps that overflow are left out and told."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from test_export import same
from test_training import draw_pictures, last_state, lines, small

from peft_diffusion.api import train
from peft_diffusion.core.events import Event
from peft_diffusion.training import Interrupted
from peft_diffusion.training.events import Step, StepLeftOut
from peft_diffusion.training.loop import loss_scale
from peft_diffusion.training.loop.loss_scale import LossScale

pytestmark = pytest.mark.usefixtures("few_measurements", "no_signals", "no_plots")


def test_the_scale_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "_GROWS_AFTER", 3)
    theirs, ours = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3), LossScale(torch.device("cpu"))
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    for overflows in (True, False, False, False, False, True, False, False, False, True, True, False):
        theirs.scale(torch.zeros(()))
        scaled = torch.full((4,), 3.0 * ours.scale)
        scaled[1] = torch.inf if overflows else scaled[1]
        parameter.grad, gradients = scaled.clone(), scaled.clone()
        before = parameter.detach().clone()
        theirs.step(optimizer)
        theirs.update()
        assert ours.unscale(gradients) == (not overflows)
        assert ours.scale == theirs.get_scale() == float(ours.factor)
        assert torch.equal(parameter.detach(), before if overflows else before - gradients)
    assert ours.left_out == 4


@pytest.mark.slow
def test_a_run_leaves_steps_out_that_overflow_and_goes_on_to_the_same_bits(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "_FIRST", 2.0**25)  # too much at first
    pictures = draw_pictures(tmp_path / "p")
    common: dict[str, Any] = {"base": str(tiny_base), "precision": "float16", "steps": 5, "save_every": 5, "log_every": 1}
    told: list[StepLeftOut] = []
    stop = threading.Event()

    def watch(event: Event) -> None:
        told.extend([event] if isinstance(event, StepLeftOut) else [])

    def cut(event: Event) -> None:
        if isinstance(event, Step) and event.step == 4:
            stop.set()

    whole = train(small(pictures, tmp_path / "whole", **common), observers=[watch])
    assert 1 < len(told) < 4 and [event.count for event in told] == list(range(1, len(told) + 1))
    assert told[0].step == 1 and told[0].scale == 2.0**24 and "beyond float16" in told[0].lines()[0]
    losses = [line["step"] for line in lines(whole) if "loss" in line]
    assert losses == [step for step in range(1, 6) if step not in {event.step for event in told}]
    state = last_state(whole)
    assert state.tensors["loss_scale"].tolist() == [told[-1].scale, 5 - told[-1].step, len(told)]
    assert state.tensors["parameters"].dtype == torch.float32 and bool(state.tensors["first_moment"].any())
    with pytest.raises(Interrupted):
        train(small(pictures, tmp_path / "cut", **common), observers=[cut], stop=stop)
    resumed = train(small(pictures, tmp_path / "cut", resume=True, **common))
    assert same(whole.output, resumed.output)
