"""Adapter files on the way of a run, and the adapter in a checkpoint as a file."""

import json
from pathlib import Path

import pytest
import torch
from language import save_lm
from safetensors import safe_open
from safetensors.torch import load_file
from test_training import draw_pictures, small

import peft_diffusion as pd
from peft_diffusion.api import train, train_text
from peft_diffusion.cli.app import main
from peft_diffusion.formats.container import read_header
from peft_diffusion.formats.spec import Spec
from peft_diffusion.training import TextTrainConfig, TrainResult

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_measurements", "no_signals", "no_plots")]

MORE = {"steps": 5, "save_every": 2, "ema": 0.5, "trigger": "ink style", "keep": "last", "held_out": 0.2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> TrainResult:
    """A run of five steps with an average of its weights, and a checkpoint at every second."""
    where = tmp_path_factory.mktemp("run")
    return train(small(draw_pictures(where / "pictures"), where, base=str(tiny_base), keep_checkpoints=9, **MORE))


def spec_of(path: Path) -> Spec:
    with safe_open(path, "pt") as file:
        found = Spec.from_metadata(file.metadata(), str(path))
    assert found is not None
    return found


def same(one: Path, two: Path) -> bool:
    first, second = load_file(one), load_file(two)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_leaves_adapter_files_that_load_and_say_their_step(run: TrainResult, tiny_base: Path) -> None:
    files = sorted((run.run_dir / "adapters").iterdir())
    assert [path.name for path in files] == ["a-000002.safetensors", "a-000004.safetensors", "a-000005.safetensors"]
    assert same(files[-1], run.output) and not same(files[0], run.output)
    told = spec_of(files[0])
    assert (
        told.training["steps_done"] == 2 and told.triggers == ("ink style",) and told.methods == spec_of(run.output).methods
    )
    counted = told.training["tag_frequency"]["captions"]  # of captions from the pictures' names
    assert list(counted.values()) == [1] * told.training["images"]
    lines = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    measured = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    assert told.training["held_out_loss"] == measured[2] != measured[4]
    pipe = pd.load_base(str(tiny_base), device="cpu")
    assert pd.Adapters(pipe).load(files[0]) == "a-000002"


def test_without_a_wish_for_them_there_are_none_and_only_as_many_as_were_wished_for_stay(
    run: TrainResult, tmp_path: Path, tiny_base: Path
) -> None:
    (folder,) = run.config.folder
    config = small(folder, tmp_path, base=str(tiny_base), keep_last=2, **MORE)
    done = train(config)
    assert sorted(path.name[2:8] for path in (done.run_dir / "adapters").iterdir()) == ["000004", "000005"]
    default = small(folder, tmp_path / "b", base=str(tiny_base), steps=1, save_every=None)
    assert not (train(default).run_dir / "adapters").exists()


def test_export_gives_what_the_run_would_have_given_at_a_step(
    run: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "two.safetensors"
    assert main(["runs", "export", str(run.run_dir), "--step", "2", "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"wrote {output}\n"
    there = run.run_dir / "adapters" / "a-000002.safetensors"
    assert same(output, there)
    ours, theirs = spec_of(output), spec_of(there)
    differing = {"created": None, "seconds": None}
    assert {**ours.training, **differing} == {**theirs.training, **differing}
    assert ours.training["images"] == run.images > 0 == ours.training["class_pictures"]
    told = read_header(output).metadata
    assert told["ss_num_train_images"] == str(run.images) and told["ss_num_reg_images"] == "0"
    assert (ours.methods, ours.base, ours.triggers) == (theirs.methods, theirs.base, theirs.triggers)
    newest = pd.export(pd.ExportConfig(run.run_dir, output=tmp_path / "newest.safetensors"))
    assert same(newest, run.output)


def test_a_checkpoint_given_as_an_adapter_is_told_how_to_export_it(
    run: TrainResult, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = run.run_dir / "checkpoints" / "step_000004.safetensors"
    for command in (["generate", "a cat", "--base", str(tiny_base), "--adapter"], ["inspect"], ["convert"]):
        given = [*command, str(checkpoint), *(["x.safetensors"] if command == ["convert"] else [])]
        assert main(given) == 1
        told = capsys.readouterr().err
        assert f"{checkpoint} is a checkpoint" in told and f"peft-diffusion runs export {checkpoint}" in told
    monkeypatch.chdir(tmp_path)
    assert main(["runs", "export", str(checkpoint)]) == 0  # as it was told, in the present directory
    assert same(tmp_path / "a-000004.safetensors", run.run_dir / "adapters" / "a-000004.safetensors")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--step", "3"], "no checkpoint of step 3; those kept are of the steps 2, 4, 5"),
        (["--base", "icons"], "had another base"),
        (["--save-as", "kohyaa"], "kohya"),
    ],
)
def test_what_cannot_be_exported_is_told(
    run: TrainResult, tmp_path: Path, given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", "export", str(run.run_dir), *given, "--output", str(tmp_path / "x.safetensors")]) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "x.safetensors").exists()


def test_a_run_on_text_is_exported_too(tmp_path: Path) -> None:
    base, text = save_lm(tmp_path / "lm"), tmp_path / "text.txt"
    text.write_text("a cat is a cat and a dog is a dog " * 40, "utf-8")
    config = TextTrainConfig(
        texts=text, base=str(base), output=tmp_path / "t.safetensors", run_dir=tmp_path / "run", steps=2, save_every=1,
        context=16, device="cpu", optimizer="schedule-free", rank=2,
    )  # fmt: skip
    done = train_text(config)
    found = pd.export(pd.ExportConfig(done.run_dir, step=1, output=tmp_path / "one.safetensors"))
    assert same(found, done.run_dir / "adapters" / "t-000001.safetensors")


def test_a_run_whose_file_has_one_name_in_any_folder_is_exported_as_its_files_on_the_way_are(
    run: TrainResult, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = run.config.folder
    places = {"save_as": "peft", "output": tmp_path / "ink" / "adapter_model.safetensors", "base": str(tiny_base)}
    done = train(small(folder, tmp_path, steps=1, save_every=1, **places))
    monkeypatch.chdir(tmp_path)
    made = pd.export(pd.ExportConfig(done.run_dir))
    assert made == Path("ink-000001.safetensors") and same(made, done.run_dir / "adapters" / made)
