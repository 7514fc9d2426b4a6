"""Several processes that learn one adapter, as a launcher starts them: gloo, on the CPU."""

import json
import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from language import save_lm
from little import PLOTS, SIGNALS
from PIL import Image
from safetensors.torch import load_file
from test_training import draw_pictures

from peft_diffusion.training.machine.processes import Processes, join

pytestmark = pytest.mark.slow

RUN = "import sys; from peft_diffusion.cli.app import main; sys.exit(main(sys.argv[1:]))"


def launch(processes: int, *arguments: object, expected: int = 0, code: str = RUN) -> list[subprocess.CompletedProcess[str]]:
    """The command, or other code, in so many processes; raises where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    group = {**os.environ, **(common if processes > 1 else {})}
    started = [
        forked.Started(["-c", code, *map(str, arguments)], None, {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    done = [process.wait() for process in started]
    for one in done:
        assert one.returncode == expected, one.stderr
    return done


def assert_same(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=2e-6)


def test_two_processes_learn_what_one_does_with_twice_the_batch(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    flags = [
        "--base", tiny_base, "--device", "cpu", "--rank", 2, "--steps", 4, "--warmup", 0, "--preview-steps", 1,
        "--save-every", 2, "--log-every", 2, "--held-out", 0.2, "--components", "unet,text_encoder", "--accumulation", 2,
    ]  # fmt: skip

    def command(name: str, batch: int) -> list[object]:
        return ["train", pictures, "--output", tmp_path / f"{name}.safetensors", "--run-dir", tmp_path / name,
                "--batch-size", batch, *flags]  # fmt: skip

    monkeypatch.setenv(SIGNALS, "1")
    with monkeypatch.context() as patched:
        patched.setenv(PLOTS, "1")
        launch(1, *command("one", 4))
    for plot in ("loss.png", "signals.png"):
        with Image.open(tmp_path / "one" / plot) as drawn:
            assert min(drawn.size) > 100
    told = launch(2, *command("two", 2))
    assert_same(tmp_path / "one.safetensors", tmp_path / "two.safetensors")
    assert "4 steps of 8 pictures (4 in each of 2 processes)" in told[0].stderr + told[0].stdout
    assert "wrote" not in told[1].stderr + told[1].stdout
    lines = {name: _metrics(tmp_path / name) for name in ("one", "two")}
    assert [line["step"] for line in lines["one"]] == [line["step"] for line in lines["two"]]
    for one, two in zip(lines["one"], lines["two"], strict=True):
        for key in one.keys() & {"loss", "held_out_loss"}:
            assert one[key] == pytest.approx(two[key], rel=1e-4)
    assert sorted(p.name for p in (tmp_path / "two" / "previews").iterdir()) == sorted(
        p.name for p in (tmp_path / "one" / "previews").iterdir()
    )
    (alone,) = launch(1, *command("two", 2), "--resume", "--overwrite", expected=1)
    assert "had 2 processes, and there are 1 now" in alone.stderr
    # Going on, in as many processes, is as if nothing had been.
    for newer in (tmp_path / "two" / "checkpoints").glob("step_000004*"):
        newer.unlink()
    (tmp_path / "two.safetensors").rename(tmp_path / "whole.safetensors")
    launch(2, *command("two", 2), "--resume")
    whole, resumed = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "two.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_two_processes_learn_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SIGNALS, "1")
    save_lm(tmp_path / "lm")
    words = tmp_path / "words.txt"
    words.write_text("the red cat and the blue dog sat in the house of ink. " * 40)
    flags = ["--base", tmp_path / "lm", "--device", "cpu", "--rank", 2, "--steps", 3, "--context", 24]
    for name, processes, batch in (("one", 1, 4), ("two", 2, 2)):
        place = ["--output", tmp_path / f"{name}.safetensors", "--run-dir", tmp_path / name]
        launch(processes, "text", "train", words, *place, "--batch-size", batch, *flags)
    assert_same(tmp_path / "one.safetensors", tmp_path / "two.safetensors")


def test_alone_one_leads_and_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    alone, device = join("cpu")
    assert alone == Processes() and alone.leads and device == "cpu"
    tensor = torch.ones(3)
    alone.mean(tensor)
    alone.wait()
    assert tensor.tolist() == [1.0] * 3 and alone.any(True, torch.device("cpu"))


def accelerate(*flags: str, folder: Path, code: str, command: Sequence[object] = ()) -> subprocess.CompletedProcess[str]:
    """Code that takes a command, through ``accelerate launch`` as a person types it, which starts Pythons of its own."""
    (folder / "run.py").write_text(code)
    launcher = ["-m", "accelerate.commands.launch", *flags, "--num_processes", "2", folder / "run.py"]
    hidden = {"WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | {"CUDA_VISIBLE_DEVICES": ""}
    return forked.python([*map(str, (*launcher, *command))], None, environment, forks=True)


def test_accelerate_launches_the_same_command_or_is_found_not_to_have(tiny_base: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pictures = draw_pictures(tmp_path / "pictures", 2)
    command = [
        "train", pictures, "--base", tiny_base, "--device", "cpu", "--rank", 2, "--steps", 2, "--batch-size", 1,
        "--preview-steps", 0, "--held-out", 0, "--output", tmp_path / "a.safetensors", "--run-dir", tmp_path / "run",
    ]  # fmt: skip
    done = accelerate("--multi_gpu", "--main_process_port", port, folder=tmp_path, code=RUN, command=command)
    assert done.returncode == 0, done.stderr
    assert "2 steps of 2 pictures (1 in each of 2 processes)" in done.stdout
    # The command asks so before it reads a base; here nothing else is imported.
    asks = "from peft_diffusion.training.machine.processes import join; join('cpu')"
    done = accelerate("--cpu", folder=tmp_path, code=asks)
    assert done.returncode != 0 and "asked for several processes and started one" in done.stderr


def test_parts_cover_the_batch_once() -> None:
    rows = list(range(12))
    assert [row for rank in range(3) for row in rows[Processes(rank, 3).part(4)]] == rows
    assert [Processes(rank, 3).seed_parts() for rank in range(3)] == [(), (1,), (2,)]


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
