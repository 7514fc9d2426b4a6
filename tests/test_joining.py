"""Pictures that join others under way, each against the pipeline by itself with the adapters of that one alone."""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_pipe, make_xl_pipe
from diffusers import DiffusionPipeline
from test_batching import FADED, HOW, alone, files, loaded, numbers
from test_formats import write_adapter

from peft_diffusion import Queue, Region, Request, Sampling, Schedule, Ticket, UserError
from peft_diffusion.bases import denoiser_of
from peft_diffusion.bases.schedulers import SCHEDULERS
from peft_diffusion.core.events import Event, Noted
from peft_diffusion.generation import Adapters

__all__ = ["files"]  # a fixture

# Steps, schedulers with and without memory and chance, guidance and its end: all of a request's own.
REQUESTS = [
    Request("a red cat", {"ink": 0.8}, 1, "blue", HOW),
    Request("a dog", {"ink": -0.3, "flat": 1.0}, 2, "", replace(HOW, steps=7, guidance=2.0, scheduler="dpm++")),
    Request("a house", {"flat": FADED}, 4, "", replace(HOW, scheduler="euler-a", steps=4)),
    Request("a dog", {"flat": Schedule([0.0, 1.0])}, 1, "", replace(HOW, guidance=1.0, scheduler="heun")),
    Request("", {}, 6, "red", replace(HOW, scheduler="lcm", guidance_stop=0.5)),
    Request("a cat", {"ink": 0.5}, 7, "", replace(HOW, scheduler="dpm++-2m-sde-karras", steps=6)),
]  # fmt: skip


def rows_of(pipe: Any) -> list[int]:
    """How many rows each call of the network has from now on."""
    rows: list[int] = []
    denoiser_of(pipe).network.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    return rows


def drawn(queue: Queue, requests: list[Request], every: int = 1) -> tuple[list[Ticket], list[Ticket]]:
    """Pictures of requests of which one more comes at every so many steps: as they came, and as they were done."""
    tickets: list[Ticket] = []
    done: list[Ticket] = []
    steps = 0
    while len(tickets) < len(requests) or queue.busy:
        if steps % every == 0 and len(tickets) < len(requests):
            tickets.append(queue.submit(requests[len(tickets)]))
        done += queue.step()
        steps += 1
    return tickets, done


def check_near(adapters: Adapters, requests: list[Request], came: list[Ticket], done: list[Ticket], kept: list[Any]) -> None:
    """Each picture is that of its own run, by the numbers before they are rounded to bytes."""
    shared = dict(zip(done, kept, strict=True))
    for ticket, request in zip(came, requests, strict=True):
        kept.clear()
        (own,) = adapters.batch([request])
        assert ticket.image.size == own.size and ticket.alone is None
        assert np.abs(shared[ticket] - kept[0]).max() < 1e-5
    assert len({one.tobytes() for one in shared.values()}) == len(requests)


@pytest.mark.slow
def test_a_picture_that_joins_is_that_of_its_own_run(
    files: dict[str, Path], tiny_pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters, kept = loaded(tiny_pipe, files, "ink", "flat"), numbers(tiny_pipe, monkeypatch)
    adapters.set(ink=0.25, flat=Schedule([0.0, 1.0]))
    rows = rows_of(tiny_pipe)
    with adapters.queue(at_most=3) as queue:
        came, done = drawn(queue, REQUESTS)
    strengths = next(iter(adapters._registry.states().values())).strengths
    assert strengths.images == 1 and strengths.kept("ink") == 0.25 and "flat" in adapters.schedules
    assert max(rows) == 6 and len(rows) < sum(ticket.steps for ticket in came)
    assert done[0] is came[0] and done != came  # one with fewer steps leaves before those that came first
    check_near(adapters, REQUESTS, came, done, kept)
    assert np.abs(kept[-1] - alone(make_pipe, files, replace(REQUESTS[-1], sampling=HOW))).max() > 1e-2


@pytest.mark.slow
def test_every_scheduler_takes_its_own_steps_beside_others(
    tiny_pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters, kept = Adapters(tiny_pipe), numbers(tiny_pipe, monkeypatch)
    how = replace(HOW, guidance=1.0)
    names = [name for name in SCHEDULERS if name != "lms" or find_spec("scipy")]
    requests = [Request("a cat", {}, seed, "", replace(how, scheduler=name)) for seed, name in enumerate(names)]
    with adapters.queue(at_most=len(requests)) as queue:
        came, done = drawn(queue, requests)
    check_near(adapters, requests, came, done, kept)


@pytest.mark.slow
def test_pictures_of_xl_join_too_and_the_rows_of_recorded_steps_are_powers_of_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the fused network, which computes on a CPU as it does where it records."""
    pipe = make_xl_pipe()
    parts = ("unet", "text_encoder", "text_encoder_2")
    names = {name: write_adapter(tmp_path / f"{name}.safetensors", pipe, seed=3, parts=parts) for name in ("ink", "flat")}
    adapters, kept = loaded(pipe, names, *names), numbers(pipe, monkeypatch)
    adapters.fast(True)
    monkeypatch.setattr("peft_diffusion.generation.joining.records_on", lambda device: True)
    requests = [
        Request("a red cat", {"ink": 0.8}, 1, "blue", replace(HOW, steps=4)),
        Request("a dog", {"flat": Schedule([0.0, 1.0])}, 2, "", HOW),
        Request("a house", {"ink": 0.5}, 3, "", replace(HOW, guidance=1.0)),
    ]
    rows = rows_of(pipe)
    with adapters.queue(at_most=3) as queue:
        came, done = drawn(queue, requests)
    assert set(rows) == {1, 2, 4, 6} and adapters.plain_because is None  # of five rows one is free; at most twice three
    check_near(adapters, requests, came, done, kept)


@pytest.mark.slow
def test_what_cannot_join_is_drawn_by_itself_in_its_turn_and_told(
    files: dict[str, Path], tiny_pipe: DiffusionPipeline
) -> None:
    adapters, told = loaded(tiny_pipe, files, "ink"), list[Event]()
    wide = replace(HOW, width=128, steps=1)
    part = Region(box=(0, 0, 0.5, 1), prompt="a dog", adapter="ink=0.8")
    requests = [
        Request("a red cat", {"ink": 0.8}, 1, "", replace(HOW, steps=2)),
        Request("a cat", seed=2, sampling=wide),
        Request("a house", seed=3, sampling=replace(HOW, steps=1), regions=[part]),
        Request("a dog", {}, 4, "", replace(HOW, steps=1, hires=2.0, hires_steps=1)),
        Request("a dog", {}, 5, "", replace(HOW, steps=1)),
    ]
    with adapters.queue() as queue:
        tickets = [queue.submit(request, told.append) for request in requests]
        assert queue.room == 3 and queue.run() == tickets and not queue.busy
    assert [ticket.alone for ticket in tickets] == [None, None, "it has regions", "it has a second pass", None]
    assert [event.message for event in told if isinstance(event, Noted)] == [
        "a picture is drawn by itself: it has regions", "a picture is drawn by itself: it has a second pass"
    ]  # fmt: skip
    for ticket, request in zip(tickets, requests, strict=True):
        (own,) = adapters.batch([request])
        assert np.abs(np.asarray(ticket.image, int) - np.asarray(own, int)).max() <= 1


@pytest.mark.slow
def test_one_that_is_given_up_or_fails_leaves_the_others_as_they_are(
    files: dict[str, Path], tiny_pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters, rows = loaded(tiny_pipe, files, "ink"), rows_of(tiny_pipe)
    with adapters.queue() as queue:
        for wrong, why in (
            ("a cat", r"make one, as Request\('a cat'\)"),
            (Request("a cat", {"nobody": 1.0}), "no adapter 'nobody'"),
            (Request("a cat", sampling=Sampling(width=63)), "width 63 is no multiple"),
            (Request("a cat", {"ink": float("nan")}, sampling=HOW), "finite"),
        ):
            with pytest.raises(UserError, match=why):
                queue.submit(wrong)  # type: ignore[arg-type]
        first, second, third = (queue.submit(Request("a cat", {"ink": 0.5}, seed, "", HOW)) for seed in range(3))
        with pytest.raises(UserError, match="not drawn yet"):
            _ = first.image
        queue.step()
        first.cancel()
        queue._under_way[1].latents *= float("nan")
        assert queue.run() == [first, second, third] and rows == [6, 4, 4]
        with pytest.raises(UserError, match="given up"):
            _ = first.image
        assert second.failed
        with pytest.raises(UserError, match="NaN"):
            _ = second.image
        (own,) = adapters.batch([Request("a cat", {"ink": 0.5}, 2, "", HOW)])
        assert np.abs(np.asarray(third.image, int) - np.asarray(own, int)).max() <= 1
        third.cancel()
        assert third.image is not None  # too late
        last = queue.submit(Request("a cat", {"ink": 0.5}, 0, "", HOW))
        monkeypatch.setattr(denoiser_of(tiny_pipe).network, "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            queue.step()
        assert last.failed and not queue.busy
        left = [queue.submit(Request("a cat", sampling=how)) for how in (HOW, replace(HOW, hires=2.0))]
    assert all(ticket.given_up for ticket in left) and not queue.busy
    for use in (queue.step, lambda: queue.submit(Request("a cat"))):  # which would write the strengths of the base
        with pytest.raises(UserError, match="the queue is closed"):
            use()
    with pytest.raises(UserError, match="at_most must be 1 or more"), adapters.queue(at_most=0):
        pass


@pytest.mark.slow
def test_adapters_that_have_left_the_base_come_back_for_pictures_under_way(
    files: dict[str, Path], tiny_pipe: DiffusionPipeline
) -> None:
    size = max(file.stat().st_size for file in files.values())
    adapters = Adapters(tiny_pipe, budget=size + size // 2)
    for name in ("ink", "line"):
        adapters.load(files[name], name, 0.0)
    requests = [Request("a cat", {"ink": 0.9}, 1, "", HOW), Request("a cat", {"line": 0.9}, 1, "", HOW)]
    with adapters.queue() as queue:
        tickets, _ = drawn(queue, requests)
    for ticket, request in zip(tickets, requests, strict=True):
        (own,) = adapters.batch([request])
        assert np.abs(np.asarray(ticket.image, int) - np.asarray(own, int)).max() <= 1


def test_what_somebody_changes_between_steps_is_not_drawn_with(files: dict[str, Path], tiny_pipe: DiffusionPipeline) -> None:
    """A picture is the one that nobody disturbed; where its adapter is another now, it fails."""
    adapters = loaded(tiny_pipe, files, "ink", "line")
    request = Request("a cat", {"ink": 0.9}, 1, "", replace(HOW, steps=2, guidance=1.0))
    (own,) = adapters.batch([request])

    def drawn_with(disturb: Callable[[], object]) -> Ticket:
        with adapters.queue() as queue:
            ticket = queue.submit(request)
            queue.step()
            disturb()
            assert queue.run() == [ticket]
        return ticket

    def swap() -> None:
        adapters.remove("ink")
        adapters.load(files["line"], "ink")

    disturbances: list[Callable[[], object]] = [
        lambda: adapters.set(ink=0.0, line=1.0),
        lambda: adapters.load(files["flat"], "flat"),  # at strength 1
    ]
    for disturb in disturbances:
        assert np.abs(np.asarray(drawn_with(disturb).image, int) - np.asarray(own, int)).max() <= 1
    with pytest.raises(UserError, match="'ink' is another now"):
        _ = drawn_with(swap).image
    with adapters.queue() as queue:
        merged = queue.submit(request)
        queue.step()
        adapters.merge()
        with pytest.raises(UserError, match="merged"):
            queue.step()
        adapters.unmerge()
    assert merged.failed
    with pytest.raises(UserError, match="no adapter 'ink'"):
        _ = drawn_with(lambda: adapters.remove("ink")).image


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="records steps on CUDA")
def test_joining_records_nothing_anew_after_the_first_of_a_shape(files: dict[str, Path]) -> None:
    pipe = make_pipe().to("cuda")
    adapters, rows = loaded(pipe, files, "ink", "flat"), rows_of(pipe)
    adapters.fast(True)
    others = [
        replace(one, seed=one.seed + 10, adapters={"flat": 0.4, "ink": number / 5}) for number, one in enumerate(REQUESTS)
    ]
    with adapters.queue(at_most=4) as queue:
        for _ in range(2):  # text encoders and VAE are recorded from the second picture on
            drawn(queue, REQUESTS)
        before = adapters.recordings
        came, _ = drawn(queue, others)
        assert adapters.recordings == before and adapters.plain_because is None
    assert set(rows) <= {1, 2, 4, 8}
    for ticket, request in zip(came, others, strict=True):
        (own,) = adapters.batch([request])
        assert np.abs(np.asarray(ticket.image, int) - np.asarray(own, int)).mean() < 0.5
