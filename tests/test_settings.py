"""Settings: what stands once in a field, and everything that is made from it."""

import json
import pydoc
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np
import pytest
from making import command, environment
from torch import nn

import peft_diffusion as pd
from peft_diffusion import api, methods
from peft_diffusion.bases import family
from peft_diffusion.cli.app import main
from peft_diffusion.cli.parser import app
from peft_diffusion.cli.runs import RunsConfig
from peft_diffusion.core import site
from peft_diffusion.core.errors import did_you_mean
from peft_diffusion.core.settings import (
    NATURAL,
    PARAMETERS,
    Range,
    Settings,
    describe,
    pick,
    portable,
    setting,
    settings_of,
    settle,
    to_json,
)
from peft_diffusion.core.settings_file import load
from peft_diffusion.formats import layout
from peft_diffusion.generation.settings import MAX_SEED, DemoConfig, InspectConfig
from peft_diffusion.serve.settings import ServeConfig
from peft_diffusion.tools.tool_settings import MetadataGetConfig, MetadataRemoveConfig, MetadataSetConfig
from peft_diffusion.training.settings.choices import Scheduler
from peft_diffusion.training.settings.derive import resolve, resolve_language
from peft_diffusion.training.settings.placements import blocks
from peft_diffusion.training.settings.shared import FindLr
from peft_diffusion.training.settings.toml import to_toml

COMMANDS: dict[str, tuple[type[Settings], ...]] = {
    "train": (pd.TrainConfig, FindLr),
    "text train": (pd.TextTrainConfig, FindLr),
    "generate": (pd.GenerateConfig,),
    "text generate": (pd.TextGenerateConfig,),
    "blend": (pd.BlendConfig,),
    "grid": (pd.GridConfig,),
    "evaluate": (pd.EvaluateConfig,),
    "inspect": (InspectConfig,),
    "serve": (ServeConfig,),
    "runs": (RunsConfig,),
    "merge": (pd.MergeConfig,),
    "extract": (pd.ExtractConfig,),
    "resize": (pd.ResizeConfig,),
    "strength": (pd.StrengthConfig,),
    "split": (pd.SplitConfig,),
    "join": (pd.JoinConfig,),
    "rename-trigger": (pd.RenameTriggerConfig,),
    "metadata get": (MetadataGetConfig,),
    "metadata set": (MetadataSetConfig,),
    "metadata remove": (MetadataRemoveConfig,),
    "convert": (pd.ConvertConfig,),
    "demo": (DemoConfig,),
}
KINDS = [kind for kinds in COMMANDS.values() for kind in kinds]


def train_config(**values: Any) -> pd.TrainConfig:
    """A configuration whose values need not be of their types."""
    return pd.TrainConfig(**{"folder": "pictures", **values})


def test_every_field_is_a_setting_with_help_and_a_group() -> None:
    for kind in KINDS:
        told = settings_of(kind)
        assert [one.name for one in told] == [one.name for one in fields(kind)]
        for one in told:
            assert one.setting.help.endswith((".", ").")) and one.setting.group.title, one.name
            assert one.setting.help == " ".join(one.setting.help.split()), one.name
            assert not (one.setting.range and one.single not in (int, float)), one.name


def test_every_number_has_a_range() -> None:
    assert not [f"{kind.__name__}.{one.name}" for kind in KINDS for one in settings_of(kind)
                if one.single in (int, float) and one.setting.range is None]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_says_what_the_fields_say(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*name.split(), "--help"]) == 0
    shown = " ".join("".join(letter for letter in capsys.readouterr().out if letter not in "│╭╮╰╯─").split())
    for kind in COMMANDS[name]:
        for one in settings_of(kind):
            assert one.setting.help in shown, one.name
            assert all(flag in shown for flag in (one.flag, *one.setting.flag.aliases, one.setting.group.title)), one.name


# The nearest choice.


def config(**given: Any) -> pd.TrainConfig:
    return pd.TrainConfig(**{"folder": "pictures", **given})


def attached() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    site.attach(model, "ink", methods.method("lora", rank=1), "all-linear")
    return model


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        (lambda: config(optimizer="adamW"), "adamw"),
        (lambda: config(components=("Unet",)), "unet"),
        (lambda: blocks(config(block=("unte attention lora",))), "unet"),
        (lambda: methods.find("lorra"), "lora"),
        (lambda: methods.method("lora", dropuot=0.5), "dropout"),
        (lambda: blocks(config(option=("intt=pissa",))), "init"),
        (lambda: layout.find("koyha"), "kohya"),
        (lambda: site.served(attached(), methods.method("lora"), "all_linear"), "all-linear"),
        (lambda: site.detach(attached(), "inc"), "ink"),
        (lambda: family.rate_setting("text_encodr"), "text_encoder"),
        (lambda: pd.load_base("icons", device="cpu", dtype="bfloat_16"), "bfloat16"),
    ],
)
def test_a_wrong_choice_is_told_the_nearest(wrong: Callable[[], object], near: str) -> None:
    with pytest.raises(pd.UserError, match=re.escape(f"; did you mean {near!r}?")):
        wrong()


def test_nothing_is_suggested_where_nothing_is_near() -> None:
    for given in ("magic", "", 3, None, ["adamw"]):
        assert did_you_mean(given, ("adamw", "prodigy")) == ""


# The same words on all ways in.

WRONG = {
    "steps": (0, "--steps must be 1 or more, not 0"),
    "guidance": (-1.5, "--guidance must be 0 or more, not -1.5"),
    "guidance_stop": (1.5, "--guidance_stop must be 0 or more, at most 1, not 1.5".replace("_", "-")),
    "seed": (MAX_SEED + 1, f"--seed must be 0 or more, at most {MAX_SEED}, not {MAX_SEED + 1}"),
    "strength": (0.0, "--strength must be above 0, at most 1, not 0.0"),
    "precision": ("half", "--precision is one of auto, float32, bfloat16, float16, not 'half'"),
    "quantize": ("int3", "--quantize is one of nf4, int8, not 'int3'; did you mean 'int8'?"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_told_in_the_same_words_as_flag_in_a_file_and_in_python(name: str, tmp_path: Path) -> None:
    value, said = WRONG[name]
    (tmp_path / "run.toml").write_text(f"{name} = {json.dumps(value)}\n")
    by_flag = command("generate", "a cat", f"--{name.replace('_', '-')}={value}", cwd=tmp_path)
    by_file = command("generate", "a cat", "--config", "run.toml", cwd=tmp_path)
    values: dict[str, Any] = {"prompts": "a cat", name: value}
    with pytest.raises(pd.UserError) as in_python:
        pd.GenerateConfig(**values)
    assert by_flag.stderr == by_file.stderr == f"error: {said}\n"
    assert str(in_python.value) == said


def test_ranges_hold_at_their_ends() -> None:
    for limits, inside, outside in (
        (Range(0, 1), (0, 0.5, 1), (-1e-9, 1 + 1e-9)),
        (Range(0, 1, above=True), (1e-9, 1), (0,)),
        (Range(0, 1, below=True), (0, 1 - 1e-9), (1,)),
        (NATURAL, (0, 10**400), (-1, float("inf"), float("nan"))),
    ):
        assert all(value in limits for value in inside)
        assert not any(value in limits for value in outside)


# Values are brought to their types.


def test_values_are_brought_to_their_types() -> None:
    found = train_config(output="x.safetensors", alpha=3, steps=np.int64(7), unet_lr=np.float32(0.5), base=Path("some/base"),
                         components="unet,text_encoder", option=["bias=none"], regularisation=Path("class"))  # fmt: skip
    assert found.folder == (Path("pictures"),) and found.output == Path("x.safetensors")
    assert (found.alpha, type(found.alpha), found.steps, type(found.steps)) == (3.0, float, 7, int)
    assert (found.unet_lr, type(found.unet_lr), found.base) == (0.5, float, str(Path("some/base")))
    assert found.components == ("unet", "text_encoder") and found.option == ("bias=none",)
    assert found.regularisation == (Path("class"),)
    assert train_config(folder=["a", Path("b")]).folder == (Path("a"), Path("b"))
    prompts: Any = "a cat"
    assert pd.GenerateConfig(prompts).prompts == ("a cat",)
    assert pd.TextGenerateConfig(prompts).prompts == ("a cat",)
    text: dict[str, Any] = {"texts": "words.txt", "held_out_text": "more.txt"}
    assert pd.TextTrainConfig(**text).held_out_text == (Path("more.txt"),)
    blend: dict[str, Any] = {"prompts": prompts, "adapter": [Path("a.safetensors"), "b.safetensors=0.5"]}
    assert pd.BlendConfig(**blend).adapter == ("a.safetensors", "b.safetensors=0.5")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rank": "8"}, "--rank must be a whole number, not '8'"),
        ({"timesteps": "900-1200"}, "--timesteps '900-1200': the last is at most 1000, which is noise"),
        (
            {"scheduler": "constant_with_warmup"},
            f"--scheduler is one of {', '.join(get_args(Scheduler))}, not 'constant_with_warmup'; here that is 'constant',"
            " with --warmup STEPS",
        ),
        (
            {"precision": "bf16"},
            "--precision is one of auto, float32, bfloat16, float16, not 'bf16'; here that is 'bfloat16'",
        ),
        ({"save_dtype": "float16"}, "--save-dtype is one of fp16, bf16, float32, not 'float16'; here that is 'fp16'"),
        ({"rank": 8.0}, "--rank must be a whole number, not 8.0"),
        ({"rank": True}, "--rank must be a whole number, not True"),
        ({"alpha": "1"}, "--alpha must be a number, not '1'"),
        ({"clip": 10**400}, "--clip must be a finite number, 0 or more, not inf"),
        ({"flip": 1}, "--flip must be true or false, not 1"),
        ({"seed": None}, "--seed must be a whole number, not None"),
        ({"folder": 3}, "--folder must be a path, or several, not 3"),
        ({"folder": {"a": "b"}}, "--folder must be a path, or several, not {'a': 'b'}"),
        ({"output": ["a.safetensors"]}, "--output must be a path, not ['a.safetensors']"),
        ({"trigger": 3}, "--trigger must be a text, not 3"),
        ({"preview_prompts": ("a", 3)}, "--preview-prompts must be a text, or several, not 3"),
        (
            {"scheduler": 3},
            f"--scheduler is one of {', '.join(get_args(Scheduler))}, not 3",
        ),
        (
            {"scheduler": ["cosine"]},
            f"--scheduler is one of {', '.join(get_args(Scheduler))}, not ['cosine']",
        ),
    ],
)
def test_a_value_of_another_type_names_its_setting(values: dict[str, Any], said: str) -> None:
    with pytest.raises(pd.UserError) as caught:
        train_config(**values)
    assert str(caught.value) == said


# What is told of them.


def test_help_tells_type_default_range_and_help_of_every_setting() -> None:
    for kind in KINDS[:5]:
        if kind is FindLr:
            continue
        shown = " ".join(pydoc.plain(pydoc.render_doc(kind)).replace("|", " ").split())
        for one in settings_of(kind):
            assert " ".join(one.line().replace("|", " ").split()) in shown, one.name
    lines = {one.name: one.line() for one in settings_of(pd.TrainConfig)}
    assert lines["unet_lr"].startswith("unet_lr (float; default None; 0 or more): Learning rate of the UNet.")
    assert lines["folder"].startswith("folder (path, one or several; default []): Image folders")
    assert lines["loss"].startswith("loss ('l2' | 'huber' | 'smooth-l1'; default 'l2'): ")


def test_a_class_describes_itself_as_json() -> None:
    for kind in KINDS:
        found = json.loads(json.dumps(describe(kind)))
        assert [one["name"] for one in found] == [one.name for one in fields(kind)]
        assert all(one["help"] and one["group"] and one["type"] for one in found)
        for one, own in zip(found, fields(kind), strict=True):
            if get_origin(own.type) is tuple and get_args(own.type)[0] is Path:
                assert (one["type"], one["several"]) == ("path", True)
    told = {one["name"]: one for one in describe(pd.TrainConfig)}
    assert not told["folder"]["required"] and told["folder"]["default"] == [] and told["folder"]["several"]
    assert (told["dataset"]["type"], told["dataset"]["several"]) == ("table", True)
    assert told["init_from"]["default"] is None and not told["init_from"]["several"]
    assert told["output"]["flags"] == ["--output", "-o"] and told["output"]["type"] == "path"
    assert told["masks"]["choices"] == ["files", "alpha", "off"] and told["masks"]["default"] == "files"
    assert told["held_out"]["range"] == {"low": 0, "low_included": True, "high": 1, "high_included": False}
    assert told["alpha"]["range"] == {"low": 0, "low_included": False, "high": None, "high_included": True}
    assert (told["seed"]["type"], told["seed"]["group"], told["resolution"]["unit"]) == ("int", "Learning", "pixels")


@pytest.mark.slow
def test_settings_import_neither_torch_nor_the_command_line() -> None:
    code = "import sys, peft_diffusion as pd; pd.TrainConfig, pd.TextTrainConfig, pd.BlendConfig, pd.TextGenerateConfig;"
    code += "sys.exit(repr({'torch', 'cyclopts', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.stderr.strip() == "set()"


# What a run derives, and what its file of settings keeps.


@dataclass(frozen=True)
class Base:
    name: str
    family: str
    resolution: int


ICONS, TINY, LARGE = Base("icons", "other", 128), Base("tiny", "other", 64), Base("sd15", "sd1", 512)


def asked(monkeypatch: pytest.MonkeyPatch, file: Path, *flags: str) -> pd.TrainConfig:
    """What ``train`` is asked for with a file of settings and flags."""
    seen: list[pd.TrainConfig] = []
    monkeypatch.setattr("peft_diffusion.api.train", lambda config, **_: seen.append(config))
    monkeypatch.setattr(app, "config", app.config)  # main sets it; put back afterwards
    assert main(["train", "--config", str(file), *flags]) == 0
    return seen[0]


def kept(where: Path, base: Base, **values: Any) -> Path:
    """The file of settings of a run on a base."""
    file = where / "config.toml"
    file.write_text(to_toml(resolve(train_config(**values), base, 30, "cpu", 15)), "utf-8")
    return file


def test_a_file_of_settings_has_what_was_chosen_and_what_was_derived_in_comments(tmp_path: Path) -> None:
    lines = kept(tmp_path, ICONS, rank=4, steps=12, seed=7, block=("unet attention lora",)).read_text("utf-8").splitlines()
    for line in (
        "rank = 4",
        "steps = 12",
        "seed = 7",
        "clip = 1.0",  # the same for every run, and a later version may have another
        'block = ["unet attention lora"]',
        '# block = ["unet attention lora lr=0.001"]  (with the rates of this run)',
        "# unet_lr = 0.001  (from preset style for icons)",
        '# components = ["unet"]  (from preset style)',
        "# resolution = 128  (from base icons)",
        "# held_out = 0.1  (from 30 pictures)",
        "# save_every = 2  (from 12 steps)",
        "# warmup = 2  (from 12 steps)",
        "# preview_every = 0  (from device cpu)",
    ):
        assert line in lines, line
    chosen = {line.split(" = ")[0] for line in lines if not line.startswith("#")}
    assert not {"unet_lr", "resolution", "save_every", "warmup", "components", "debiased", "resume", "overwrite"} & chosen
    assert "# rank" not in "\n".join(lines)
    rates = "\n".join(kept(tmp_path, ICONS, method="ia3", optimizer="prodigy").read_text("utf-8").splitlines())
    assert "# unet_lr = 1.0  (from optimizer prodigy)" in rates and "rank" not in rates
    assert "(from method ia3, from preset style for icons)" in kept(tmp_path, ICONS, method="ia3").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("other", [TINY, LARGE], ids=["tiny", "large"])
def test_settings_of_a_run_on_another_base_are_derived_anew(
    other: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = asked(monkeypatch, kept(tmp_path, other, rank=4), "--base", "icons")
    found = resolve(again, ICONS, 30, "cpu")
    assert found == resolve(train_config(rank=4, output="pictures.safetensors", run_dir="runs/pictures"), ICONS, 30, "cpu")
    assert (found.resolution, found.unet_lr, found.rank) == (128, 1e-3, 4)
    chosen = asked(monkeypatch, kept(tmp_path, other, resolution=96, unet_lr=3e-4), "--base", "icons")
    assert (chosen.resolution, chosen.unet_lr) == (96, 3e-4)


@pytest.mark.slow
def test_a_run_of_more_steps_derives_what_follows_from_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve(train_config(steps=12), ICONS, 30, "cpu")
    again = resolve(asked(monkeypatch, kept(tmp_path, ICONS, steps=12), "--steps", "24"), ICONS, 30, "cpu")
    assert (first.save_every, first.warmup) == (2, 2)
    assert (again.steps, again.save_every, again.warmup) == (24, 4, 4)
    own = asked(monkeypatch, kept(tmp_path, ICONS, steps=12, save_every=3, warmup=1), "--steps", "24")
    assert (own.save_every, own.warmup) == (3, 1)


@pytest.mark.slow
def test_another_preset_adapts_its_own_components(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = asked(monkeypatch, kept(tmp_path, ICONS), "--preset", "subject")
    assert again.components == ("unet", "text_encoder")
    both = kept(tmp_path, ICONS, components=("unet", "text_encoder"))
    assert asked(monkeypatch, both, "--seed", "1").components == ("unet", "text_encoder")


@pytest.mark.slow
def test_steps_that_are_given_go_before_the_epochs_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = kept(tmp_path, ICONS, epochs=2.0)
    assert {"epochs = 2.0", "# steps = 30  (from 2 epochs of the pictures)"} <= set(file.read_text("utf-8").splitlines())
    assert (asked(monkeypatch, file).epochs, asked(monkeypatch, file).steps) == (2.0, None)
    again = asked(monkeypatch, file, "--steps", "7")
    assert (again.epochs, again.steps) == (None, 7)
    assert asked(monkeypatch, file, "--steps", "7", "--epochs", "3").epochs == 3.0
    file.write_text(file.read_text("utf-8") + "steps = 5\n", "utf-8")
    assert asked(monkeypatch, file).epochs == 2.0


@pytest.mark.slow
def test_python_reads_a_file_of_settings_as_the_command_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ("one, two", "a 🎨", "deleted\x7f")
    file = kept(tmp_path, ICONS, folder=["a", "b"], alpha=3, flip=True, preview_prompts=prompts, scheduler="linear")
    assert load(pd.TrainConfig, file) == asked(monkeypatch, file)
    table = '[[block]]\ncomponent = "unet"\ntarget = "attention"\nmethod = "lora"\nrank = 4\nuse_bias = true\n'
    (tmp_path / "run.toml").write_text(f"folder = 'a'\nunet-lr = 1\n{table}", "utf-8")
    found = load(pd.TrainConfig, str(tmp_path / "run.toml"))
    assert (found.folder, found.unet_lr, found.block) == ((Path("a"),), 1.0, ("unet attention lora rank=4 use_bias=true",))
    assert found == asked(monkeypatch, tmp_path / "run.toml")
    (tmp_path / "run.toml").write_text("prompts = 'a cat'\nfrom = 'old.png'\n", "utf-8")
    with pytest.raises(pd.UserError, match="a recipe brings its own prompt"):
        load(pd.GenerateConfig, tmp_path / "run.toml")
    (tmp_path / "run.toml").write_text("folder = 'a'\nstepz = 3\n", "utf-8")
    with pytest.raises(pd.UserError, match=r"run.toml: there is no setting 'stepz' of this command; did you mean 'steps'\?"):
        load(pd.TrainConfig, tmp_path / "run.toml")


def test_settings_of_a_text_run_are_derived_anew_too(tmp_path: Path) -> None:
    values: dict[str, Any] = {"texts": "words.txt", "steps": 12}
    lines = to_toml(resolve_language(pd.TextTrainConfig(**values), parameters=9, context=64)).splitlines()
    assert {"steps = 12", "warmup = 10", "# save_every = 2  (from 12 steps)", "# lr = 0.003  (for a base of 9 parameters)",
            "# context = 64  (from the base, which takes 64)"} <= set(lines)  # fmt: skip


def test_a_value_that_was_resolved_is_refused_where_no_run_can_use_it() -> None:
    with pytest.raises(pd.UserError, match="--resolution must be 1 or more, at most 8192, not 0"):
        resolve(train_config(), replace(ICONS, resolution=0), 30, "cpu")


# Settings from settings.


@dataclass(frozen=True)
class Whole:
    steps: int = setting(300, "Steps.", PARAMETERS, NATURAL)
    seed: int = 0
    folder: str = "pictures"

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class Narrower(Whole):
    steps: int


@dataclass(frozen=True)
class Part:
    seed: int
    steps: int = 1
    rates: Mapping[str, float] = field(default_factory=dict)


PLACES = ("output", "run_dir", "cache", "dataset_config", "init_from", "beside", "notify")


def test_what_is_told_to_others_says_nothing_of_where_things_lie() -> None:
    config = train_config(folder=["/home/me/ink", "b/pens"], output="/home/me/a.safetensors", cache="/home/me/cache",
                          regularisation="/home/me/others", resume=True)  # fmt: skip
    told = portable(config)
    assert told == {name: value for name, value in to_json(config).items() if name not in PLACES} | {
        "folder": ["ink", "pens"], "regularisation": ["others"],
    }  # fmt: skip
    assert "resume" not in told and told["held_out"] is None


def test_a_part_is_picked_from_a_whole_by_equal_names() -> None:
    assert pick(Part, Whole(), {"rates": {"unet": 0.1}}) == Part(0, 300, {"unet": 0.1})
    assert pick(Part, Whole(), {"rates": {}, "seed": 7}).seed == 7  # the later one counts


def test_a_field_that_no_source_has_is_refused_although_it_has_a_default() -> None:
    with pytest.raises(TypeError, match="Part needs rates, which none of its sources has"):
        pick(Part, Whole())


def test_a_field_that_is_declared_anew_keeps_what_is_told_of_it() -> None:
    assert [one.setting.help for one in settings_of(Narrower)] == ["Steps."]
    with pytest.raises(pd.UserError, match="--steps must be 0 or more, not -1"):
        Narrower(steps=-1)


def test_type_checkers_take_what_settings_take() -> None:
    """The tests are type-checked, and an ignore that nothing needs is an error: so each line here holds both."""
    config = pd.TrainConfig(folder="pictures", output="x.safetensors", regularisation=[Path("class")], components="unet")
    folder: tuple[Path, ...] = config.folder
    output: Path | None = config.output
    assert (folder, output, config.regularisation) == ((Path("pictures"),), Path("x.safetensors"), (Path("class"),))
    drawn = pd.GenerateConfig("a cat", seeds=range(2), output="drawn", adapter=["x.safetensors"])
    place: Path = drawn.output
    assert (drawn.prompts, drawn.seeds, place, drawn.adapter) == (("a cat",), (0, 1), Path("drawn"), ("x.safetensors",))
    assert pd.TextTrainConfig("words.txt").texts == (Path("words.txt"),)
    with pytest.raises(pd.UserError, match="--folder must be a path, or several, not 3"):
        pd.TrainConfig(folder=3)  # type: ignore[arg-type]
    with pytest.raises(pd.UserError, match="--seeds must be a whole number, or several, not 'a'"):
        pd.GenerateConfig("a cat", seeds="a")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        pd.TextTrainConfig()  # type: ignore[call-arg]
    assert pd.TrainConfig().folder == ()  # a [[dataset]] has its own


@pytest.mark.parametrize("function", ["train", "find_rates", "train_text", "generate", "blend", "generate_text"])
def test_what_is_no_settings_is_told_which_are_wanted(function: str) -> None:
    call: Any = getattr(pd, function, None) or getattr(api, function)
    with pytest.raises(
        pd.UserError, match=r"the settings are a \w+Config, not 'a cat'; make one, as \w+Config\('a cat', \.\.\.\)"
    ):
        list(call("a cat"))
