"""A base that is sharded over processes: gloo, on the CPU."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from little import SIGNALS
from safetensors.torch import load_file
from test_processes import assert_same, launch
from test_training import draw_pictures

from peft_diffusion.api import find_rates, train
from peft_diffusion.core.errors import UserError
from peft_diffusion.core.events import Event
from peft_diffusion.core.sharded import local_part, whole
from peft_diffusion.training import TrainConfig
from peft_diffusion.training.machine.memory_plan import Load, MemoryPlan
from peft_diffusion.training.machine.processes import Processes
from peft_diffusion.training.machine.sharding import sharing
from peft_diffusion.training.settings.resumption import free_on_resume

pytestmark = pytest.mark.slow

# Several commands, and code in between, one after the other in the same processes, which so read their imports but once.
COMMANDS = """
import json, sys
from pathlib import Path
import torch
from peft_diffusion.cli.app import main

for one in map(json.loads, sys.argv[1:]):
    if isinstance(one, str):
        exec(one)
    elif main(one):
        sys.exit(1)
"""
PARTS = """
from peft_diffusion.bases import checksum, components, fingerprint, load_base
from peft_diffusion.core.sharded import local_part
from peft_diffusion.training.machine.processes import join
from peft_diffusion.training.machine.sharding import shard

join("cpu")
pipe = load_base({base!r}, device="cpu")
before, size = checksum(dict(unet=pipe.unet)), sum(one.nbytes for one in pipe.unet.parameters())
known = fingerprint(components(pipe))
shard(pipe, ["unet"], torch.device("cpu"))
own = sum(local_part(one).untyped_storage().nbytes() for one in pipe.unet.parameters())
others = set(type(one) for part in (pipe.text_encoder, pipe.vae) for one in part.parameters())
# One process alone is asked which base it is: none waits for another.
same = torch.distributed.get_rank() == 1 or fingerprint(components(pipe)) == known
print("held", own / size, checksum(dict(unet=pipe.unet)) == before, others == set([torch.nn.Parameter]), same)
"""
# As if the run had been killed after the checkpoint before the last.
KILLED = """
if torch.distributed.get_rank() == 0:
    Path({checkpoint!r}).unlink()
    Path({output!r}).rename({aside!r})
torch.distributed.barrier()
"""


@pytest.fixture(autouse=True)
def signals_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes measure their signals, which ask the whole network and read its weights."""
    monkeypatch.setenv(SIGNALS, "1")


def run(*commands: str | list[object]) -> list[subprocess.CompletedProcess[str]]:
    """Commands and code, in two processes."""
    told = [one if isinstance(one, str) else [str(word) for word in one] for one in commands]
    return launch(2, *map(json.dumps, told), code=COMMANDS)


def trainings(base: Path, folder: Path, name: str, *flags: object) -> list[list[object]]:
    """Two that shall come to the same: with a whole base, and with a sharded one."""
    common = ["train", folder / "pictures", "--base", base, "--device", "cpu", "--steps", 2, "--warmup", 0]
    common += ["--batch-size", 4, *flags]
    return [
        [*common, "--output", folder / f"{kind}_{name}.safetensors", "--run-dir", folder / kind / name, *more]
        for kind, more in (("plain", []), ("sharded", ["--shard-base"]))
    ]


def test_a_sharded_base_teaches_what_a_whole_one_does(tiny_base: Path, tmp_path: Path) -> None:
    draw_pictures(tmp_path / "pictures")
    plain, sharded = trainings(
        tiny_base, tmp_path, "lora", "--rank", 2, "--components", "unet,text_encoder", "--held-out", 0.2, "--save-every", 1,
        "--log-every", 1, "--preview-steps", 1, "--preview-every", 1, "--preview-prompts", "a red apple", "--ema", 0.9,
        "--keep", "best",
    )  # fmt: skip
    run_dir, output, aside = tmp_path / "sharded" / "lora", tmp_path / "sharded_lora.safetensors", tmp_path / "aside"
    killed = KILLED.format(
        checkpoint=str(run_dir / "checkpoints" / "step_000002.safetensors"), output=str(output), aside=str(aside)
    )
    first, other = run(plain, "print('AND NOW', flush=True)", sharded, killed, [*sharded, "--resume"])
    told = first.stdout.partition("AND NOW")[2]
    assert told.count("unet, text_encoder sharded over 2 processes: each holds") == 2  # trained, and gone on with
    prints = [line.rpartition(" ")[2] for line in first.stdout.splitlines() if line.startswith("checksum of its weights")]
    assert len(prints) == 6 and len(set(prints)) == 1
    assert told.count("suggested strength") == 2 and other.stdout.strip() == "AND NOW"
    assert_same(tmp_path / "plain_lora.safetensors", aside)
    # Going on is as if nothing had been, and all was measured and drawn once.
    whole_run, resumed = load_file(aside), load_file(output)
    assert whole_run.keys() == resumed.keys() and all(torch.equal(whole_run[name], resumed[name]) for name in whole_run)
    lines = [_metrics(tmp_path / kind / "lora") for kind in ("plain", "sharded")]
    assert [sorted(line) for line in lines[0]] == [sorted(line) for line in lines[1]]
    for one, two in zip(*lines, strict=True):
        for key in one.keys() & {"step", "loss", "held_out_loss", "seen_loss"}:
            assert one[key] == pytest.approx(two[key], rel=1e-4)
    drawn = [{path.name for path in (tmp_path / kind / "lora" / "previews").iterdir()} for kind in ("plain", "sharded")]
    assert drawn[0] == drawn[1] and "step_000001_0.png" in drawn[0]


def test_each_process_holds_its_part_and_methods_that_read_weights_find_them(tiny_base: Path, tmp_path: Path) -> None:
    draw_pictures(tmp_path / "pictures")
    common = ["--preview-steps", 0, "--save-every", 2, "--held-out", 0]
    methods = [
        "--block", "unet attention dora rank=2", "--block", "unet conv oft", "--block", "unet norms bitfit",
        "--block", r"unet .*\.ff\.net\.0\.proj ia3 on_input=true", "--block", r"unet .*\.ff\.net\.2 lokr",
    ]  # fmt: skip
    low = ["--memory", "low", "--rank", 2, "--dropout", 0.2, "--class-prompt", "a cat", "--class-images", 1]
    both = [
        *trainings(tiny_base, tmp_path, "methods", *common, *methods),
        *trainings(tiny_base, tmp_path, "low", *common, *low, "--components", "unet,text_encoder"),
    ]
    for one in run(PARTS.format(base=str(tiny_base)), *both):
        held, *rest = next(line.split()[1:] for line in one.stdout.splitlines() if line.startswith("held"))
        assert 0.49 < float(held) < 0.52 and rest == ["True", "True", "True"]
    for name in ("methods", "low"):
        assert_same(tmp_path / f"plain_{name}.safetensors", tmp_path / f"sharded_{name}.safetensors")


def test_what_cannot_be_sharded_is_refused_in_words(tiny_base: Path, tmp_path: Path, tiny_pipe: DiffusionPipeline) -> None:
    config = TrainConfig((tmp_path,), base=str(tiny_base), device="cpu", run_dir=tmp_path / "run", shard_base=True)
    with pytest.raises(UserError, match="there is one; start them with torchrun --nproc-per-node N"):
        train(config)
    with pytest.raises(UserError, match="--shard-base cannot take a pipeline that is loaded already"):
        train(config, pipe=tiny_pipe)
    with pytest.raises(UserError, match="--find-lr runs in one process, which cannot shard a base"):
        find_rates(config)
    with pytest.raises(UserError, match="--shard-base cannot shard what --quantize packs"):
        replace(config, quantize="int8")


def test_a_crew_shares_a_base_only_if_told_to() -> None:
    two, config = Processes(1, 2), TrainConfig((Path("pictures"),))
    assert sharing(two, config, None) == two and not two.measures and Processes(0, 2).measures
    shared = sharing(two, replace(config, shard_base=True), None)
    assert shared == Processes(1, 2, True) and shared.measures and not shared.leads
    assert two.agreed(3) == 3
    assert "shard_base" in free_on_resume(TrainConfig)
    tensor = torch.ones(2)
    assert whole(tensor) is tensor and local_part(tensor) is tensor


def test_what_a_sharded_run_takes_is_not_predicted_and_memory_low_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_diffusion.training.machine.memory_plan.SMALL", 0)
    load = Load([], [torch.nn.Linear(1, 1)], dict, False, [])
    told: list[Event] = []
    for memory in ("auto", "low"):
        plan = MemoryPlan(memory, load, lambda inputs: torch.zeros(()), list, torch.device("cpu"), False, sharded=True)
        assert plan.recomputes(told.append) == (memory == "low")
    said = [line for event in told for line in event.lines()]
    assert "not predicted for a base that is sharded; should it not fit, --memory low takes less" in said[0]
    assert said[1].endswith("sharded")


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
