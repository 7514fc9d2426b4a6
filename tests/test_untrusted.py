"""Numbers, expressions and containers of files that nobody vouches for: one line each, from the command and from Python."""

import json
import math
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pipe
from safetensors.torch import save, save_file

import peft_diffusion as pd
from peft_diffusion import TextTrainConfig, TrainConfig, UserError, formats
from peft_diffusion.bases import describe, load_base
from peft_diffusion.cli.app import main
from peft_diffusion.core import parsing, settings_file, targets
from peft_diffusion.core.parsing import Patterns, matching
from peft_diffusion.data.caption_files import read_captions
from peft_diffusion.generation import Adapters
from peft_diffusion.methods.shared.affine import WeightChange
from peft_diffusion.training.record.run_record import Record

PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
STEM = f"lora_unet_{PATH.replace('.', '_')}"
PAIR = {"lora_A.weight": torch.ones(2, 32), "lora_B.weight": torch.ones(32, 2)}
DIFFUSERS = {f"unet.{PATH}.{end}": one for end, one in PAIR.items()}
PEFT = {f"base_model.model.{PATH}.{end}": one for end, one in PAIR.items()}
KOHYA = {f"{STEM}.lora_down.weight": torch.ones(2, 32), f"{STEM}.lora_up.weight": torch.ones(32, 2)}


def one_line(run: Callable[[], object]) -> str:
    """The one line of the error that this ends in."""
    with pytest.raises(UserError) as raised:
        run()
    message = str(raised.value)
    assert message and "\n" not in message
    message.encode()
    return message


def refused_by_command(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that ``inspect`` ends in."""
    assert main(["inspect", str(path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


# Numbers, wherever they come from.

NOT_FINITE = {"NaN": "NaN", "Infinity": "Infinity", "of 400 digits": "1" + "0" * 400, "beyond float32": "1e300"}


@pytest.mark.parametrize("case", NOT_FINITE)
@pytest.mark.parametrize("key", ["lora_alpha", "alpha_pattern"])
@pytest.mark.parametrize("where", ["metadata", "configuration"])
def test_an_alpha_that_is_no_number_never_reaches_the_weights(where: str, key: str, case: str, tmp_path: Path) -> None:
    value = NOT_FINITE[case] if key == "lora_alpha" else f'{{"to_q": {NOT_FINITE[case]}}}'
    path = tmp_path / "adapter_model.safetensors"
    if where == "metadata":
        save_file(DIFFUSERS, path, {"lora_adapter_metadata": f'{{"unet.r": 2, "unet.{key}": {value}}}'})
    else:
        save_file(PEFT, path)
        (tmp_path / "adapter_config.json").write_text(f'{{"r": 2, "{key}": {value}}}')
    pipe = make_pipe()
    assert f"alpha of unet.{PATH} is NaN or infinite" in one_line(lambda: Adapters(pipe).load(path))
    assert Adapters(pipe).names == ()


@pytest.mark.parametrize("alpha", [torch.tensor(1e300, dtype=torch.float64), torch.tensor(-1e39, dtype=torch.float64)])
def test_a_number_that_is_finite_in_the_file_and_not_as_it_is_used(alpha: torch.Tensor, tmp_path: Path) -> None:
    save_file({**KOHYA, f"{STEM}.alpha": alpha}, tmp_path / "a.safetensors")
    assert "alpha of unet" in one_line(lambda: formats.load(tmp_path / "a.safetensors", make_pipe()))
    wide = {name: tensor.double() * 1e300 for name, tensor in KOHYA.items()}
    save_file(wide, tmp_path / "b.safetensors")
    assert "is NaN or infinite" in one_line(lambda: formats.load(tmp_path / "b.safetensors", make_pipe()))


def test_an_alpha_that_is_beyond_16_bits_and_scales_nothing_is_left_alone(tmp_path: Path) -> None:
    """LyCORIS keeps the rank that was asked for, 100000, as the alpha of a LoKr of whole matrices, which has no rank."""
    whole = {f"{STEM}.lokr_w1": torch.ones(4, 4), f"{STEM}.lokr_w2": torch.ones(8, 8)}
    save_file({**whole, f"{STEM}.alpha": torch.tensor(1e5).half()}, tmp_path / "a.safetensors")
    ((adapter,),) = (one.values() for one in formats.load(tmp_path / "a.safetensors", make_pipe()).components.values())
    assert isinstance(adapter, WeightChange) and torch.equal(adapter.change(), torch.ones(32, 32))


@pytest.mark.parametrize("value", ['"four"', "true", "[4]"])
def test_an_alpha_of_another_type_is_told(value: str, tmp_path: Path) -> None:
    save_file(DIFFUSERS, tmp_path / "a.safetensors", {"lora_adapter_metadata": f'{{"unet.lora_alpha": {value}}}'})
    (warning,) = formats.load(tmp_path / "a.safetensors", make_pipe()).warnings
    assert "is no number, so it is taken to be the rank" in warning
    save_file(DIFFUSERS, tmp_path / "a.safetensors", {"lora_adapter_metadata": "{"})
    (warning,) = formats.load(tmp_path / "a.safetensors", make_pipe()).warnings
    assert "lora_adapter_metadata cannot be read" in warning


# Expressions.


@pytest.mark.parametrize("pattern", [r"(a+)+b", "(.*.*.*.*)*x", r"(\w+\.?)*\d"])
def test_a_pattern_of_a_file_that_never_ends_ends(pattern: str, tmp_path: Path) -> None:
    told = {"unet.lora_alpha": 4, "unet.r": 2, "unet.alpha_pattern": {pattern: 8, "to_q": 6}}
    save_file(DIFFUSERS, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    began = time.monotonic()
    loaded = formats.load(tmp_path / "a.safetensors", make_pipe())
    assert time.monotonic() - began < 5
    assert float(loaded.components["unet"][PATH].state()["alpha"]) == 6.0
    assert Patterns({pattern: 1}, r"(.*\.)?", "a").value("a" * 100 + "!", 0) == 0


@pytest.mark.parametrize(
    "pattern", ["a{1001}", "(" * 999, "[" * 500, "(?=a)b", r"(a)\1", "x" * 2000, "\ud800"],
    ids=["repeats", "brackets", "classes", "lookahead", "reference", "long", "half a letter"],
)  # fmt: skip
def test_a_pattern_that_cannot_be_matched_in_linear_time_is_refused(pattern: str, tmp_path: Path) -> None:
    assert "the pattern" in one_line(lambda: Patterns({pattern: 1}, "", "a.safetensors"))
    save_file(PEFT, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, "alpha_pattern": {pattern: 1}}))
    assert "adapter_config.json" in one_line(lambda: formats.load(tmp_path / "adapter_model.safetensors", make_pipe()))


def test_more_patterns_than_sites_can_need_are_refused() -> None:
    many = {f"a{number}": 1 for number in range(Patterns.MOST + 1)}
    assert "more than the 4096 that are read" in one_line(lambda: Patterns(many, "", "a"))


def test_patterns_mean_what_they_mean_to_peft() -> None:
    from peft.utils.other import get_pattern_key

    paths = [PATH, "mid_block.attentions.0.proj_in", "to_q", "xto_q", "a.to_q.b", "layers.10.to_q", "layersX1"]
    for pattern in (
        "to_q",
        r".*\.to_q",
        "^to_q",
        r"layers\.\d+\.to_q",
        "(to_q|proj_in)",
        "layers.1",
        "attn1.to_[qk]",
        "to_q$",
    ):
        ours = Patterns({pattern: True}, r"(.*\.)?", "a")
        assert [ours.value(path, False) for path in paths] == [get_pattern_key([pattern], path) == pattern for path in paths]


@pytest.mark.slow
def test_a_target_of_the_users_that_never_ends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parsing._TIME_LIMIT == 2
    monkeypatch.setattr(parsing, "_TIME_LIMIT", 0.25)
    began = time.monotonic()
    said = one_line(lambda: matching("(a|aa)+b", ["a" * 200] * 50, "target"))
    assert "takes longer than 0.25 seconds" in said and time.monotonic() - began < 10


@pytest.mark.slow
@pytest.mark.parametrize("target", ["a{99999999999}", "(" * 1000, "(" * 1000 + ")" * 1000, "[" * 1000, "\ud800("])
def test_a_target_that_is_no_expression_is_told(target: str) -> None:
    assert "neither a name nor a regular expression" in one_line(lambda: targets.match(make_pipe().unet, target))
    if target.isascii():
        train = ["train", "nowhere", "--target", target, "--output", "a.safetensors"]
        assert main(train) == 1


# Containers.


def with_header(header: str, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header.encode())) + header.encode() + data


ENTRY = '{"dtype": "F32", "shape": [%s], "data_offsets": [0, %s]}'
HEADERS = {
    "65 dimensions": with_header(f'{{"{STEM}.alpha": {ENTRY % (", ".join(["1"] * 65), 4)}}}', b"\0" * 4),
    "infinite offset": with_header(f'{{"a.alpha": {ENTRY % ("1", "Infinity")}}}'),
    "400 digits": with_header(f'{{"a.alpha": {ENTRY % ("1" + "0" * 400, 4)}}}', b"\0" * 4),
    "5000 digits": with_header(f'{{"a.alpha": {ENTRY % ("1" + "0" * 5000, 4)}}}', b"\0" * 4),
    "true for a size": with_header(f'{{"a.alpha": {ENTRY % ("true", 4)}}}', b"\0" * 4),
    "half a letter": with_header('{"\\ud800.alpha": %s}' % (ENTRY % ("1", 4)), b"\0" * 4),
    "half a letter in metadata": with_header('{"__metadata__": {"a": "\\udfff"}}'),
    "a name without end": with_header(f'{{"lora_unet_{"a." * 1000}alpha": {ENTRY % ("1", 4)}}}', b"\0" * 4),
    "metadata that is no table": with_header('{"__metadata__": 5}'),
    "a spec nested too deep": with_header(json.dumps({"__metadata__": {"peft_diffusion": "[" * 5000}})),
    "a spec of infinity": with_header(json.dumps({"__metadata__": {"peft_diffusion": '{"version": Infinity}'}})),
    "words of infinity": with_header(
        json.dumps({"__metadata__": {"peft_diffusion.words": '{"text_encoder": {"a": [Infinity]}}'}})[:-1]
        + f', "bundle_emb.a.clip_l": {ENTRY % ("1, 1", 4)}}}',
        b"\0" * 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_no_program_writes_is_refused_in_a_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(HEADERS[case])
    assert "a.safetensors" in one_line(lambda: formats.load(path, make_pipe()))
    assert "a.safetensors" in refused_by_command(path, capsys)


@pytest.mark.parametrize("shape", [(4, 0), (0, 32), (0,), (2, 3, 4)])
@pytest.mark.parametrize("name", ["emb_params", "clip_l", "bundle_emb.cat.clip_l", "<cat>"])
def test_an_embedding_of_no_size_is_refused_in_a_line(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    save_file({name: torch.ones(shape)}, tmp_path / "a.safetensors")
    assert "a.safetensors" in one_line(lambda: formats.load(tmp_path / "a.safetensors", make_pipe()))


STRANGE: dict[str, Callable[[], Any]] = {
    "sparse": lambda: torch.ones(2, 32).to_sparse(),
    "compressed": lambda: torch.ones(2, 32).to_sparse_csr(),
    "meta": lambda: torch.ones(2, 32, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(1, 2), torch.ones(2, 2)]),
    "expanded": lambda: torch.ones(1, 1).expand(2**20, 2**20),
    "complex": lambda: torch.ones(2, 32, dtype=torch.complex64),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2, 32), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("name", [f"{STEM}.lora_down.weight", "emb_params"])
def test_a_pickled_tensor_that_is_no_plain_one_is_refused_in_a_line(
    name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({**KOHYA, name: STRANGE[kind]()} if "." in name else {name: STRANGE[kind]()}, tmp_path / "a.pt")
    assert name in one_line(lambda: formats.load(tmp_path / "a.pt", make_pipe()))
    assert name in refused_by_command(tmp_path / "a.pt", capsys)


@pytest.mark.slow
def test_a_number_in_a_pickle_is_an_alpha(tmp_path: Path) -> None:
    torch.save({**KOHYA, f"{STEM}.alpha": 8}, tmp_path / "a.pt")
    (adapter,) = formats.load(tmp_path / "a.pt", make_pipe()).components["unet"].values()
    assert float(adapter.state()["alpha"]) == 8.0
    torch.save({**KOHYA, f"{STEM}.alpha": 10**400}, tmp_path / "a.pt")
    one_line(lambda: formats.load(tmp_path / "a.pt", make_pipe()))


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    import zipfile

    torch.save({"emb_params": torch.zeros(2**20)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert (tmp_path / "a.pt").stat().st_size < 2**16
    assert "is compressed, as torch writes no file" in one_line(lambda: formats.plan(tmp_path / "a.pt"))


# Lines, settings, bases, runs.

LINES = {
    "deep": "[" * 5000,
    "infinite": '{"file_name": Infinity}',
    "digits": "9" * 5000,
    "half": '{"file_name": "a.png", "text": "\\ud800"}',
}


@pytest.mark.parametrize("case", LINES)
def test_a_line_of_captions_that_cannot_be_read_is_a_problem_of_that_line(case: str, tmp_path: Path) -> None:
    text = '{"file_name": "a.png", "text": "a cat"}\n' + LINES[case]
    (tmp_path / "metadata.jsonl").write_text(text, "utf-8")
    found = read_captions(tmp_path, ["a.png", "metadata.jsonl"], ["a.png"])
    assert found.of("a.png") == ("a cat", "metadata")
    assert [problem.line for problem in found.problems] == [2]


SETTINGS = ["steps = " + "[" * 3000, "a = " + "{a = " * 1000, "steps = " + "9" * 5000, 'trigger = "\\ud800"', "[" * 3000]


@pytest.mark.slow
@pytest.mark.parametrize("text", SETTINGS, ids=["lists", "tables", "digits", "half a letter", "headings"])
def test_settings_that_no_parser_survives_are_refused_in_a_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text(text)
    assert "run.toml" in one_line(lambda: settings_file.load(TrainConfig, tmp_path / "run.toml"))
    assert main(["train", "--config", str(tmp_path / "run.toml")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_settings_without_what_has_no_default_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text("steps = 3\n")
    assert "run.toml does not say texts" in one_line(lambda: settings_file.load(TextTrainConfig, tmp_path / "run.toml"))
    assert main(["train", "--config", str(tmp_path / "run.toml")]) == 1  # a data set may stand for it
    assert "no image folder was given" in capsys.readouterr().err


BASES = {
    "no size": ("unet/config.json", "sample_size", None, "has the sample_size None"),
    "a size of text": ("unet/config.json", "sample_size", "eight", "has the sample_size 'eight'"),
    "a list for a length": (
        "tokenizer/tokenizer_config.json",
        "model_max_length",
        [],
        "has a configuration that cannot be used",
    ),
    "modules without weights": ("unet/config.json", "dual_cross_attention", True, "and its weights hold none"),
    "endless steps": ("scheduler/scheduler_config.json", "num_train_timesteps", 10**9, "has num_train_timesteps 1000000000"),
    "endless layers": ("unet/config.json", "layers_per_block", 10**4, "has layers_per_block 10000"),
    "no layers": ("unet/config.json", "layers_per_block", -1, "has layers_per_block -1"),
    "endless blocks": ("vae/config.json", "block_out_channels", [8] * 10**5, "has block_out_channels"),
    "endless depth": ("text_encoder/config.json", "num_hidden_layers", 10**5, "has num_hidden_layers 100000"),
    "an endless size": ("unet/config.json", "sample_size", 10**9, "has sample_size 1000000000"),
    "a prediction of 5": ("scheduler/scheduler_config.json", "prediction_type", 5, "prediction_type '5'"),
    "a prediction of nothing": ("scheduler/scheduler_config.json", "prediction_type", None, "prediction_type 'None'"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BASES)
def test_a_base_whose_configuration_says_nothing_is_refused_in_a_line(case: str, tmp_path: Path) -> None:
    name, key, value, said = BASES[case]
    make_pipe().save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / name
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert said in one_line(lambda: describe(load_base(str(tmp_path / "base"), device="cpu")))
    assert main(["generate", "a", "--base", str(tmp_path / "base"), "-o", str(tmp_path / "a.png")]) == 1


def test_a_record_of_wrong_types_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "loss": "low", "seconds": [], "changes": 5}',
        '{"step": "two"}',
        '{"step": 2, "loss": 1' + "0" * 400 + "}",
    ]
    lines += ['{"step": 3, "loss": 0.5, "changes": {"a": "b", "c": 1}}', "[" * 5000]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "run.json").write_text('{"state": [], "process": 5, "figures": "x", "settings": [], "defaults": 7}')
    (tmp_path / "config.toml").write_text("steps = 3\n")
    record = Record(tmp_path)
    assert record.step == 3 and record.seconds is None and record.changes == {"c": 1.0}
    assert all(math.isfinite(value) for _, value in record.curve("loss")) and record.curve("loss")[-1] == (3, 0.5)
    assert record.state == "stopped" and record.changed() == {}


def test_a_file_that_is_right_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(save(KOHYA))
    assert formats.load(tmp_path / "a.safetensors", make_pipe(), strict=True).report.found == 2


@pytest.mark.parametrize(("name", "told"), [("a" * 300, "has 3.. bytes, and names"), ("\ud800", "half a character")])
def test_names_that_no_file_can_have_are_told_in_python_too(name: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        pd.inspect(f"{name}.safetensors")
    with pytest.raises(UserError, match=told):
        pd.train(TrainConfig(name, output="x.safetensors"))
