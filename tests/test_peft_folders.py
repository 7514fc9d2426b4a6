"""Folders that peft saved mean what they mean there, of every kind that a method here can say; others are refused."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import make_pipe
from language import make_lm
from making import command
from safetensors.torch import load_file
from test_dotted_files import LM_LAYERS, text_output, unet_output
from test_formats import write_adapter

import peft_diffusion as pd
from peft_diffusion import formats
from peft_diffusion.core.errors import UserError
from peft_diffusion.generation import Adapters
from peft_diffusion.generation.settings import parse_choices
from peft_diffusion.tools.verify import verify

torch.set_num_threads(1)
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]
TEXT = "The ox is slow."
LM: dict[str, Any] = {"task_type": "CAUSAL_LM"}
KINDS: dict[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=LM_LAYERS, **LM),
    "loha": peft.LoHaConfig(r=4, alpha=6, target_modules=LM_LAYERS, **LM),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "o_proj", "down_proj"], feedforward_modules=["o_proj", "down_proj"], **LM
    ),
    "ia3 by an expression": peft.IA3Config(target_modules=LM_LAYERS, feedforward_modules=r".*(o_proj|down_proj)", **LM),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=LM_LAYERS, **LM),
    "oft, exact, limited and shared": peft.OFTConfig(
        r=0, oft_block_size=8, use_cayley_neumann=False, coft=True, eps=0.2, block_share=True, target_modules=LM_LAYERS, **LM
    ),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=LM_LAYERS, **LM),
    "modules": peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "norm", "up_proj"], **LM),
    "embedding": peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], **LM),
    "tokens beside pairs": peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 85], **LM),
    "tokens": peft.TrainableTokensConfig(token_indices=[1, 85], **LM),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=5, **LM),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, **LM),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3, **LM),
    "prefix of a network": peft.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16, **LM
    ),
}


def trained(model: Any, size: float = 0.3) -> Any:
    """A model of peft whose adapter has values that matter."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_peft_means_the_same_on_a_language_model(kind: str, tmp_path: Path) -> None:
    theirs, base = trained(peft.get_peft_model(make_lm().lm, KINDS[kind])), make_lm()
    plain = torch.tensor([base.tokenizer(TEXT).input_ids])
    theirs.save_pretrained(tmp_path / "slow")
    name = Adapters(base).load(tmp_path / "slow", strict=True)
    assert name == "slow"
    led = torch.tensor([base.tokenizer(TEXT).input_ids])
    with torch.no_grad():
        expected = theirs(input_ids=plain).logits
        ours = base.lm(led).logits
        before = make_lm().lm(plain).logits
    assert ours.shape == expected.shape and (expected[:, -plain.shape[1] :] - before).abs().max() > 1e-2
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    assert formats.inspect(tmp_path / "slow").unknown == ()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [one for one in KINDS if "oft" in one])
def test_rotations_of_inputs_come_back_to_peft_as_they_were(kind: str, tmp_path: Path) -> None:
    theirs, base, ids = trained(peft.get_peft_model(make_lm().lm, KINDS[kind])), make_lm(), torch.arange(2, 30)[None]
    theirs.save_pretrained(tmp_path / "a")
    adapters = Adapters(base)
    adapters.load(tmp_path / "a", name="a")
    written = tmp_path / "b" / "adapter_model.safetensors"
    formats.save(written, {"lm": base.lm}, "a", formats.Spec(), layout="peft")
    first, second = load_file(tmp_path / "a" / written.name), load_file(written)
    assert first.keys() == second.keys() and all(torch.equal(first[name], one) for name, one in second.items())
    again = peft.PeftModel.from_pretrained(make_lm().lm, tmp_path / "b").eval()
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        torch.testing.assert_close(again(input_ids=ids).logits, expected)
        formats.save(tmp_path / "own.safetensors", {"lm": base.lm}, "a", formats.Spec())
        adapters.remove("a")
        adapters.load(tmp_path / "own.safetensors", strict=True)
        torch.testing.assert_close(base.lm(ids).logits, expected, atol=1e-5, rtol=1e-4)


IMAGES = {
    "unet": peft.IA3Config(
        target_modules=r".*(to_k|to_v|ff\.net\.2|resnets\.\d+\.conv[12]|to_out\.0)",
        feedforward_modules=r".*(ff\.net\.2|conv1)",
    ),
    "text_encoder": peft.IA3Config(target_modules=["q_proj", "v_proj", "fc2"], feedforward_modules=["fc2"]),
    "unet, modules": peft.LoraConfig(
        r=2, target_modules=["to_q", "conv1"], bias="all", modules_to_save=["conv_in", "norm1", "time_embedding"]
    ),
    "text_encoder, biases": peft.LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only"),
    "text_encoder, decomposed embedding": peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["token_embedding", "q_proj"], use_dora=True
    ),
    "text_encoder, tokens": peft.LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices={"token_embedding": [3, 5]}
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", IMAGES)
def test_a_folder_of_peft_means_the_same_on_a_part_of_a_pipeline(case: str, tmp_path: Path) -> None:
    """The factors of (IA)3 multiply the bias too. On convolutions with as many inputs as outputs, only the configuration
    tells their side."""
    component = case.partition(",")[0]
    pipe, ours = make_pipe(), make_pipe()
    for one in (pipe, ours):
        for parameter in (*one.unet.named_parameters(), *one.text_encoder.named_parameters()):
            if parameter[0].endswith("bias"):
                parameter[1].data.normal_(0, 0.2, generator=torch.Generator().manual_seed(4))
    output = unet_output if component == "unet" else text_output
    plain = output(ours)
    model = trained(peft.get_peft_model(getattr(pipe, component), IMAGES[case]), 0.2)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    adapters = Adapters(ours)
    name = adapters.load(tmp_path, strict=True)
    expected = output(pipe)
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(output(ours), expected, atol=1e-5, rtol=1e-4)
    part = getattr(ours, component)
    formats.save(tmp_path / "own.safetensors", {component: part}, name, formats.Spec())
    adapters.remove(name)
    adapters.load(tmp_path / "own.safetensors", strict=True)
    torch.testing.assert_close(output(ours), expected, atol=1e-5, rtol=1e-4)
    adapters.merge()
    torch.testing.assert_close(output(ours), expected, atol=1e-5, rtol=1e-4)


REFUSED: dict[str, tuple[peft.PeftConfig, str]] = {
    "vera": (peft.VeraConfig(r=2, target_modules=["q_proj"], **LM), r"peft's VERA, and no method here"),
    "tasks": (peft.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=2, **LM), "has a prompt for each task"),
    "near words": (
        peft.CPTConfig(cpt_token_ids=[5, 6, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3], **LM),
        "holds its tokens near words",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_method_says_is_refused_with_its_kind(kind: str, tmp_path: Path) -> None:
    config, why = REFUSED[kind]
    trained(peft.get_peft_model(make_lm().lm, config)).save_pretrained(tmp_path)
    for look in (formats.inspect, lambda path: formats.load(path, make_lm())):
        with pytest.raises(UserError, match=why):
            look(tmp_path)


def test_virtual_tokens_without_a_configuration_are_refused(tmp_path: Path) -> None:
    peft.get_peft_model(make_lm().lm, KINDS["prompt"]).save_pretrained(tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**told, "num_transformer_submodules": 2}))
    with pytest.raises(UserError, match="on an encoder and a decoder"):
        formats.inspect(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"no adapter_config\.json is beside the file"):
        formats.inspect(tmp_path)


@pytest.mark.slow
def test_a_folder_is_a_path_wherever_a_file_is(tmp_path: Path) -> None:
    own = write_adapter(tmp_path / "own.safetensors", make_pipe())
    (tmp_path / "style").mkdir()
    own.rename(tmp_path / "style" / "pytorch_lora_weights.safetensors")
    (choice,) = parse_choices([f"{tmp_path / 'style'}=0.5"])
    assert choice.name == "style" and choice.strength == 0.5 and choice.plan is not None
    told = json.loads(command("inspect", tmp_path / "style", "--json").stdout)
    assert told["files"][0]["components"]["unet"] == len(choice.plan.sites["unet"])
    with pytest.raises(UserError, match="holds several adapters, in the folders style; name one"):
        parse_choices([str(tmp_path)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is a folder without an adapter"):
        formats.load(tmp_path / "empty", make_pipe())


@pytest.mark.slow
def test_a_decomposed_embedding_is_converted_and_verified_as_peft_computes_it(tiny_base: Path, tmp_path: Path) -> None:
    config = IMAGES["text_encoder, decomposed embedding"]
    trained(peft.get_peft_model(make_pipe().text_encoder, config), 0.2).save_pretrained(tmp_path / "a")
    kohya, back = tmp_path / "own.safetensors", tmp_path / "b" / "adapter_model.safetensors"
    pd.convert(pd.ConvertConfig(tmp_path / "a", output=kohya, base=str(tiny_base)))
    back.parent.mkdir()
    pd.convert(pd.ConvertConfig(kohya, output=back, to="peft", base=str(tiny_base), component=("text_encoder",)))
    first, second = (load_file(one) for one in (tmp_path / "a" / back.name, back))
    assert all(torch.equal(first[name], one) for name, one in second.items())
    assert first.keys() - second.keys() == {name for name in first if name.endswith("base_layer.weight")}
    (found,) = (one for one in verify(back, base=str(tiny_base)) if one.program == "peft")
    assert found.measured == 3 and found.error == pytest.approx(0, abs=1e-5)
