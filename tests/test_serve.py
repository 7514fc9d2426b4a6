"""The server, asked by A1111's public client ``webuiapi``, in a process of its own that all these tests share."""

import base64
import io
import json
import os
import re
import shutil
import signal
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import requests
import torch
import webuiapi
from conftest import make_pipe, make_xl_pipe
from little import STEPS
from making import environment, make_adapter
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file

from peft_diffusion import GenerateConfig, UserError, generate, load_base
from peft_diffusion.bases import denoiser_of, describe
from peft_diffusion.bases.base import BaseInfo, checkpoint_sha256
from peft_diffusion.core.settings import settings_of
from peft_diffusion.fast import drawing as fast_drawing
from peft_diffusion.formats import plan
from peft_diffusion.generation import memory
from peft_diffusion.generation.adapters import Adapters
from peft_diffusion.generation.kept import Kept
from peft_diffusion.generation.settings import Choice
from peft_diffusion.library import Library
from peft_diffusion.serve import drawing, inpainting, names, pictures
from peft_diffusion.serve.bodies import ImageToImage, TextToImage
from peft_diffusion.serve.drawing import Held, config_of
from peft_diffusion.serve.engine import Engine
from peft_diffusion.serve.settings import ServeConfig
from peft_diffusion.serve.wording import FIELDS, PLACE, as_request
from peft_diffusion.serve.worker import Job

TOKEN = "a token of the tests"
INFO = BaseInfo("b", "sd1", "epsilon", 64, 8, "0" * 16)
SIDE = {"width": 64, "height": 64}


def own(**told: Any) -> dict[str, Any]:
    """What a request says to us alone."""
    return {"alwayson_scripts": {"peft_diffusion": {"args": [told]}}}


@pytest.fixture(scope="module")
def shelf(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters, and beside it one that no request may reach."""
    folder = tmp_path_factory.mktemp("serving") / "Lora"
    folder.mkdir()
    for number, name in enumerate(("ink", "flat", "line")):
        make_adapter(folder / f"{name}.safetensors", tiny_base, number)
    save_file(
        load_file(folder / "flat.safetensors"), folder / "x1.safetensors", {"ss_output_name": "paper", "a": '{"b": 1}'}
    )
    save_file(load_file(folder / "ink.safetensors"), folder.parent / "outside.safetensors")
    return folder


@pytest.fixture(scope="module")
def address(shelf: Path, tiny_base: Path, other_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a server listens; at the end Ctrl-C must end it."""
    token, saved = shelf.parent / "token", shelf.parent / "saved"
    token.write_text(f"{TOKEN}\n")
    words = shelf.parent / "words"
    words.mkdir()
    save_file({"emb_params": torch.randn(2, 32, generator=torch.Generator().manual_seed(0))}, words / "zork.safetensors")
    flags: list[object] = [
        "--base", tiny_base, "--bases-dir", other_base.parent, "--lora-dir", shelf,
        "--embeddings-dir", shelf.parent / "words", "--device", "cpu", "--port", 0,
        "--token-file", token, "--max-request-mb", 1, "--max-pixels", 128 * 128, "--max-pictures", 40, "--output", saved,
    ]  # fmt: skip
    started = forked.Started(["-m", "peft_diffusion", "serve", *map(str, flags)], None, environment())
    line = started.first_line()
    assert line.startswith("serving at http://127.0.0.1:"), line
    yield line.split()[2].rstrip(";")
    os.kill(started.pid, signal.SIGINT)
    assert started.wait(60).returncode == 130


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return webuiapi.WebUIApi(baseurl=f"{address}/sdapi/v1", username="anybody", password=TOKEN, steps=2)


@pytest.fixture(scope="module")
def pipe(tiny_base: Path) -> Any:
    return load_base(str(tiny_base), device="cpu")


def alone(pipe: Any, base: Path, shelf: Path, where: Path, prompt: str, **options: Any) -> list[Image.Image]:
    """What ``generate`` draws of the same."""
    told = {"steps": 2, "guidance": 7.0, "scheduler": "Euler a", **SIDE, **options}
    config = GenerateConfig(prompt, base=str(base), adapters_dir=shelf, output=where / "drawn", device="cpu", **told)
    return [one.image for one in generate(config, pipe=pipe)]


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.convert("RGB").tobytes() == other.convert("RGB").tobytes()


def near(one: Image.Image, other: Image.Image) -> bool:
    """Whether two are the same but for how a byte is rounded: products in larger batches add up in another order."""
    apart = np.abs(np.asarray(one.convert("RGB"), int) - np.asarray(other.convert("RGB"), int))
    return one.size == other.size and int(apart.max()) <= 1 and float(apart.mean()) < 0.05


def ask(address: str, path: str, body: Any = None, **headers: str) -> requests.Response:
    """A request without the client, with the token unless a header says otherwise."""
    sent = {"Authorization": f"Bearer {TOKEN}", **headers}
    url = f"{address}/sdapi/v1/{path}"
    return (
        requests.get(url, headers=sent, timeout=60)
        if body is None
        else requests.post(url, json=body, headers=sent, timeout=60)
    )


# Pictures.


@pytest.mark.slow
def test_requests_side_by_side_each_get_the_pictures_of_their_own_generate(
    client: Any, pipe: Any, tiny_base: Path, shelf: Path, tmp_path: Path
) -> None:
    loras = ["", "<lora:ink:1>", "<lora:flat:0.7>", "<lora:line:0.4:1>", "<lora:ink:0.5> <lora:paper:-0.3>"]
    wanted = [(f"a red cat {loras[number % 5]}", number, 1 + number % 2) for number in range(16)]

    def request(one: tuple[str, int, int]) -> Any:
        prompt, seed, count = one
        return client.txt2img(prompt=prompt, seed=seed, batch_size=count, negative_prompt="blue", **SIDE)

    def refused(_: int) -> str:
        with pytest.raises(RuntimeError) as told:
            client.txt2img(prompt="a cat <lora:nothing:1>", **SIDE)
        return str(told.value)

    with ThreadPoolExecutor(20) as threads:
        errors = [threads.submit(refused, number) for number in range(4)]
        answers = list(threads.map(request, wanted))
        assert all("there is no adapter" in error.result() for error in errors)
    drawn = set()
    for (prompt, seed, count), answer in zip(wanted, answers, strict=True):
        own = alone(pipe, tiny_base, shelf, tmp_path, prompt, seed=seed, count=count, batch_size=count, negative="blue")
        assert len(answer.images) == count and all(near(*pair) for pair in zip(answer.images, own, strict=True)), prompt
        assert answer.info["all_seeds"] == [seed + number for number in range(count)]
        drawn.add(answer.image.tobytes())
    assert len(drawn) == 16  # or a comparison of equals would tell nothing


@pytest.mark.slow
def test_a_base_is_let_go_before_another_is_loaded(
    tiny_base: Path, other_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks: list[weakref.ref[torch.nn.Module]] = []
    alive: list[int] = []
    fails = threading.Event()

    def noted(*told: Any) -> Any:
        alive.append(sum(one() is not None for one in networks))
        pipe = memory.loaded(*told)
        networks.append(weakref.ref(pipe.unet))
        return pipe

    def digest(pipe: Any) -> str:
        if fails.is_set():
            raise MemoryError
        return checkpoint_sha256(pipe)

    monkeypatch.setattr("peft_diffusion.serve.engine.loaded", noted)
    monkeypatch.setattr("peft_diffusion.serve.engine.checkpoint_sha256", digest)
    engine = Engine(ServeConfig(base=str(tiny_base), bases_dir=other_base.parent, device="cpu"), lambda _: None)
    bases = [engine.base_called(one.name).title for one in (tiny_base, other_base)]
    start = threading.Event()
    engine.worker.submit(Job("hold", lambda _: start.wait()))
    told: dict[str, Any] = {"prompt": "a cat", "steps": 1, **SIDE}
    jobs = [engine.draw(TextToImage(override_settings={"sd_model_checkpoint": one}, **told), "txt2img") for one in bases]
    start.set()
    assert all(job.future.result().drawn for job in jobs)  # of two bases, one after the other
    again, last = (TextToImage(override_settings={"sd_model_checkpoint": one}, **told) for one in bases)
    fails.set()  # once the weights are there
    with pytest.raises(MemoryError):
        engine.draw(again, "txt2img").future.result()
    fails.clear()
    assert engine.draw(last, "txt2img").future.result().drawn
    assert len(alive) >= 4 and not any(alive)
    engine.close()


@pytest.mark.slow
def test_requests_that_wait_together_are_drawn_in_one_batch(tiny_base: Path, shelf: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(shelf, tmp_path / "Lora"))
    make_adapter(own / "called.safetensors", tiny_base, 9, ("[zork]",))
    engine = Engine(ServeConfig(base=str(tiny_base), adapters_dir=own, device="cpu"), lambda _: None)
    engine.load().future.result()
    held = engine._held
    assert held is not None
    rows: list[int] = []
    denoiser_of(held.pipe).network.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    prompts = ["a dog <lora:ink:0.8>", "a cat <lora:flat:1>", "a dog", "a cat <lora:nothing:1>", "[dog] <lora:called:0.5>"]
    told: dict[str, Any] = {
        "steps": 2, "cfg_scale": 7.0, "sampler_name": "Euler a", "negative_prompt": "blue", **SIDE,
    }  # fmt: skip
    twice = {"a dog": {**told, "batch_size": 2}}
    bodies = [TextToImage(prompt=prompt, seed=seed, **twice.get(prompt, told)) for seed, prompt in enumerate(prompts)]

    def asked(several: list[TextToImage]) -> list[Job[Any]]:
        """Requests that all wait behind another job."""
        start = threading.Event()
        engine.worker.submit(Job("hold", lambda _: start.wait()))
        jobs = [engine.draw(body, "txt2img") for body in several]
        start.set()
        wait([job.future for job in jobs])
        return jobs

    together = asked(bodies[:3])
    assert rows == [8, 8]  # four pictures with their negatives, in two steps
    rows.clear()
    failing = asked(bodies[2:])
    assert "there is no adapter 'nothing'" in str(failing[1].future.exception())
    by_itself = [asked([body])[0] for body in (*bodies[:3], bodies[4])]
    for one, other in zip((*together, failing[2]), by_itself, strict=True):
        pairs = list(zip(one.future.result().drawn, other.future.result().drawn, strict=True))
        assert all(near(a.image, b.image) and a.recipe == b.recipe for a, b in pairs) and pairs
        assert one.future.result().notes == other.future.result().notes  # nobody is told of the prompt of another
    rows.clear()
    asked([bodies[0], bodies[4], TextToImage(prompt="a cat", seed=1, **{**told, "steps": 3})])
    assert rows == [6, 6, 2]  # also brackets of a trigger, which others read as weights, and other steps
    engine.close()


@pytest.mark.slow
def test_a_request_joins_those_under_way_at_their_next_step(tiny_base: Path, shelf: Path, tmp_path: Path) -> None:
    """Each with its own adapters, which are off the base again when it is done; and in its turn what cannot join."""
    engine = Engine(ServeConfig(base=str(tiny_base), adapters_dir=shelf, device="cpu"), lambda _: None)
    engine.load().future.result()
    held = engine._held
    assert held is not None and held.kept is not None
    kept = held.kept
    told: dict[str, Any] = {"cfg_scale": 7.0, "sampler_name": "DPM++ 2M", **SIDE}
    bodies = [
        TextToImage(prompt="a dog <lora:ink:0.8>", seed=1, steps=6, **told),
        TextToImage(prompt="a cat <lora:flat:1> <lora:ink:0.3>", seed=2, steps=2, **{**told, "sampler_name": "Euler a"}),
        TextToImage(prompt="a cat", seed=3, steps=3, **told),
        TextToImage(prompt="a dog", seed=4, steps=30, **told),
        TextToImage(prompt="a cat <lora:nothing:1>", seed=5, steps=1, **told),
        TextToImage(prompt="a cat", seed=6, steps=2, **told),
    ]
    jobs: list[Job[Any]] = []
    calls: list[tuple[int, tuple[str, ...]]] = []

    def come(_: Any, given: Any) -> None:
        """One at the first step, two at the fourth, one that fails at the fifth, one more where one is given up."""
        calls.append((len(given[0]), kept.adapters.names))
        for body in {1: bodies[1:2], 4: bodies[2:4], 5: bodies[4:5], 6: bodies[5:]}.get(len(calls), ()):
            jobs.append(engine.draw(body, "txt2img"))
        if len(calls) == 6:
            engine.worker.drop(jobs[3])

    hook = denoiser_of(held.pipe).network.register_forward_pre_hook(come)
    jobs.append(engine.draw(bodies[0], "txt2img"))
    jobs[0].future.result()  # at its last step all have come
    wait([job.future for job in jobs])
    hook.remove()
    ink, both = ("ink",), ("ink", "flat")
    assert calls[:6] == [(2, ink), (4, both), (4, both), (2, ink), (6, ink), (6, ink)]
    assert [rows for rows, _ in calls[6:]] == [2, 2, 2]  # the third ends by itself, as one that failed waits for its turn
    assert jobs[3].future.result().drawn == [] and "no adapter 'nothing'" in str(jobs[4].future.exception())
    for number in (0, 1, 2, 5):
        own = engine.draw(bodies[number], "txt2img").future.result().drawn
        drawn = jobs[number].future.result().drawn
        assert len(drawn) == 1 and near(drawn[0].image, own[0].image) and drawn[0].recipe == own[0].recipe
    assert not kept._users and jobs[2].total == 3
    engine.close()


@pytest.fixture(scope="module")
def once(pipe: Any, tiny_base: Path) -> Any:
    """What ``generate`` alone draws of a prompt; of the same prompt and files it is drawn once."""
    drawn: dict[object, Image.Image] = {}

    def draw(prompt: str, folder: Path, where: Path, adapter: tuple[str, ...]) -> Image.Image:
        key = prompt, *((file.name, hash(file.read_bytes())) for file in sorted(folder.iterdir()))
        if key not in drawn:
            (drawn[key],) = alone(pipe, tiny_base, folder, where, prompt, seed=1, adapter=adapter)
        return drawn[key]

    return draw


@pytest.fixture
def asked(once: Any, tiny_base: Path, shelf: Path, tmp_path: Path) -> Iterator[Any]:
    """A server's engine over files that may be changed: it draws a prompt, and compares with ``generate`` alone."""
    own, words = Path(shutil.copytree(shelf, tmp_path / "Lora")), tmp_path / "words"
    words.mkdir()
    save_file({"emb_params": torch.randn(2, 32, generator=torch.Generator().manual_seed(0))}, words / "zork.safetensors")
    engine = Engine(ServeConfig(base=str(tiny_base), adapters_dir=own, embeddings_dir=words, device="cpu"), lambda _: None)
    engine.load().future.result()

    def draw(prompt: str) -> int:
        """Draw; tell how many files were read for it."""
        before = engine.loads
        told: dict[str, Any] = {"steps": 2, "cfg_scale": 7.0, "sampler_name": "Euler a", **SIDE}
        drawn = engine.draw(TextToImage(prompt=prompt, seed=1, **told), "txt2img").future.result().drawn[0]
        given = (str(words / "zork.safetensors"),) if "zork" in prompt else ()
        assert same(drawn.image, once(prompt, own, tmp_path, given)), prompt
        settled: Job[None] = Job("nothing", lambda _: None)  # the answer comes before adapters leave
        engine.worker.submit(settled)
        settled.future.result()
        return engine.loads - before

    draw.engine, draw.folder = engine, own  # type: ignore[attr-defined]
    yield draw
    engine.close()


@pytest.mark.slow
def test_a_second_request_reads_no_file_but_one_that_was_replaced(asked: Any, tiny_base: Path) -> None:
    """Whatever was drawn between, in whichever order files are named; and each is drawn to the bit as alone."""
    both, turned = "a cat <lora:ink:0.8> <lora:flat:0.5>", "a cat <lora:flat:0.5> <lora:ink:0.8>"
    prompts = ["a cat <lora:ink:1>", "a dog <lora:ink:0.5>", "a cat", both, turned, "a cat <lora:flat:1>", both]
    assert [asked(prompt) for prompt in prompts] == [1, 0, 0, 1, 0, 0, 0]
    make_adapter(asked.folder / "flat.safetensors", tiny_base, 20)
    assert [asked(both), asked(turned)] == [1, 0]
    (asked.folder / "ink.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"ink\.safetensors"):
        asked(both)
    assert asked("a cat <lora:flat:1>") == 0
    (asked.folder / "flat.safetensors").unlink()
    with pytest.raises(UserError, match="there is no adapter 'flat'"):
        asked("a cat <lora:flat:1>")


@pytest.mark.slow
def test_adapters_are_kept_within_a_budget_those_used_last(asked: Any) -> None:
    kept = asked.engine._held.kept
    assert kept.budget == 1024 * 2**20 and kept.stay
    kept.budget = 2 * (asked.folder / "ink.safetensors").stat().st_size
    prompts = [f"a cat <lora:{name}:1>" for name in ("ink", "flat", "ink", "line", "ink", "flat")]
    assert [asked(prompt) for prompt in prompts] == [1, 1, 0, 1, 0, 1]
    assert len({*kept.adapters.names, *kept.adapters.waiting}) == 2
    kept.budget = 0
    assert [asked(prompt) for prompt in prompts[:2] + prompts[:1]] == [0, 1, 1]
    assert not kept.adapters.names and not kept.adapters.waiting


@pytest.mark.slow
def test_modules_of_other_methods_are_kept_while_no_other_request_comes(asked: Any) -> None:
    """They have been computed with on the base, so they do not wait in memory."""
    generator, tensors = torch.Generator().manual_seed(5), load_file(asked.folder / "flat.safetensors")
    made = {
        f"{name.removesuffix('.lora_up.weight')}.hada_{part}": torch.randn(shape, generator=generator) / 2
        for name, up in tensors.items()
        if name.startswith("lora_unet") and name.endswith("attn1_to_q.lora_up.weight")
        for part, shape in {
            f"w{n}_{side}": (len(up), 4) if side == "a" else (4, len(up)) for n in "12" for side in "ab"
        }.items()
    }
    save_file(made, asked.folder / "hada.safetensors")
    prompts = ["a cat <lora:hada:1>", "a dog <lora:hada:0.5>", "a cat <lora:ink:1>", "a cat <lora:hada:1> <lora:ink:1>"]
    assert [asked(prompt) for prompt in prompts] == [1, 0, 1, 1]
    assert asked.engine._held.kept.adapters["hada"].report.found == len(made) > 0


@pytest.mark.slow
def test_what_is_kept_does_nothing_to_requests_that_do_not_name_it(asked: Any, tiny_base: Path) -> None:
    """Neither words that one teaches, nor numbers that are not finite, which times a strength of 0 are not either."""
    assert [asked(prompt) for prompt in ("a zork", "a cat <lora:ink:1>", "a zork <lora:ink:1>", "a zork")] == [1, 1, 1, 1]
    tensors = load_file(asked.folder / "flat.safetensors")
    save_file({name: tensor * 1e30 for name, tensor in tensors.items()}, asked.folder / "huge.safetensors")
    with pytest.raises(UserError, match="NaN"):
        asked("a cat <lora:huge:1>")
    assert [asked(prompt) for prompt in ("a cat", "a cat <lora:ink:1>")] == [0, 0]


@pytest.mark.slow
def test_adapters_do_not_stay_on_a_base_whose_parts_are_moved(pipe: Any, shelf: Path, tmp_path: Path) -> None:
    """They wait in memory; and what is to be known of their file is told to each request."""
    file = tmp_path / "odd.safetensors"
    save_file({**load_file(shelf / "ink.safetensors"), "lora_unet_nowhere.lora_up.weight": torch.ones(2, 2)}, file)
    kept, choice = Kept(pipe, 2**30, stay=False), Choice(file)
    told: list[list[str]] = [[], []]
    for warnings in told:
        kept.begin([choice])
        assert kept.load(choice, strict=False, warn=warnings.append) == "odd" and kept.adapters.names == ("odd",)
        kept.end()
        assert not kept.adapters.names and kept.adapters.waiting == ("odd",) and kept.adapters.loads == 1
    assert told[0] == told[1] and len(told[0]) == 1


@pytest.mark.slow
def test_a_request_has_the_adapters_of_a_library_and_the_regions_of_generate(
    pipe: Any, tiny_base: Path, shelf: Path, tmp_path: Path
) -> None:
    place, mine = tmp_path / "library.sqlite3", tmp_path / "mine"
    mine.mkdir()
    for seed, word in enumerate(("ship", "moon"), 30):
        make_adapter(mine / f"{word}.safetensors", tiny_base, seed, (word,), size=0.5)
    with Library(place) as library:
        library.add([mine])
    white = Image.new("L", (64, 64))
    white.paste(255, (32, 0, 64, 64))
    white.save(tmp_path / "mask.png")
    left: dict[str, Any] = {"box": (0, 0, 0.5, 1), "prompt": "a cat <lora:ink:0.8>"}
    mask: dict[str, Any] = {"prompt": "a moon"}
    given = [left, mask | {"mask": webuiapi.raw_b64_img(white)}]
    ways: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"auto": 1, "region": given}, {"auto": 1, "region": (left, mask | {"mask": tmp_path / "mask.png"}), **SIDE}),
        ({"auto": 2, "regions": "auto"}, {"auto": 2, "regions": "auto", **SIDE}),
    ]
    serving = ServeConfig(base=str(tiny_base), adapters_dir=shelf, device="cpu", max_auto=2, library=place)
    serving.check()
    engine = Engine(serving, lambda _: None)
    for (told, options), prompt in zip(ways, ("a ship", "a ship moon"), strict=True):
        body = TextToImage.model_validate({"prompt": prompt, "seed": 1, "steps": 2, **SIDE, **own(**told)})
        result = engine.draw(body, "txt2img").future.result()
        config = GenerateConfig(prompt, seed=1, steps=2, base=str(tiny_base), adapters_dir=shelf, device="cpu",
                                library=place, output=tmp_path / "drawn", **options)  # fmt: skip
        (alone,) = generate(config, pipe=pipe)
        ((image, recipe),) = result.drawn
        assert same(image, alone.image) and recipe.adapters == alone.recipe.adapters
        assert recipe.divided == alone.recipe.divided and len(recipe.divided) == 2
        info = json.loads(drawing.info_of(body, result, ""))
        (chosen,) = info["auto"]
        names_of = [one["name"] for one in chosen["adapters"]]
        assert sorted(names_of) == ["moon", "ship"][-told["auto"] :] and chosen["drawn"] == recipe.prompt
        assert all(f"<lora:{name}:" in info["infotexts"][0] for name in names_of)
        assert any(one.startswith(f'for "{prompt}" ') for one in info["comments"])
        repeated = body.repeated()["alwayson_scripts"]["peft_diffusion"]["args"][0]
        assert repeated["auto"] == told["auto"] and not any(one["mask"] for one in repeated["region"])
    with pytest.raises(UserError, match="auto is at most 2 here, not 3"):
        engine.draw(TextToImage.model_validate({"prompt": "a", **own(auto=3)}), "txt2img").future.result()
    engine.close()
    engine.worker.join()
    engine.files.close()


@pytest.mark.slow
def test_adapters_of_calls_that_join_are_shared_and_leave_with_the_last(pipe: Any, shelf: Path, tmp_path: Path) -> None:
    files = {name: Path(shutil.copy(shelf / f"{name}.safetensors", tmp_path)) for name in ("ink", "flat", "line")}
    kept, (ink, flat, line) = Kept(pipe, 2**30), (Choice(file, plan=plan(file)) for file in files.values())
    adapters = kept.adapters

    def join(*choices: Choice) -> list[str]:
        return kept.join(choices, strict=False, warn=lambda _: None)

    def on_the_base() -> list[str]:
        return list(adapters.names)

    kept.begin([ink])
    assert join(ink) == ["ink"] and join(flat, ink) == ["flat", "ink"]
    kept.leave([ink])
    assert on_the_base() == ["ink", "flat"] and adapters.loads == 2
    assert join(line) == ["line"]
    kept.leave([flat, ink])
    assert on_the_base() == ["line"] and set(adapters.waiting) == {"ink", "flat"}
    shutil.copy(files["ink"], files["line"])
    with pytest.raises(UserError, match="was replaced while"):
        join(flat, Choice(files["line"]))
    assert on_the_base() == ["line"]  # also without what was to come with it
    kept.leave([line])
    assert on_the_base() == ["line"]  # where no other is under way it stays for the next
    kept.end()
    kept.begin([])
    for name in (*adapters.names, *adapters.waiting):
        adapters.remove(name)


@pytest.mark.slow
def test_an_answer_tells_what_clients_read_of_it(client: Any, address: str) -> None:
    answer = client.txt2img(
        prompt="a cat <lora:ink:0.5>",
        negative_prompt="dog",
        seed=3,
        n_iter=2,
        batch_size=2,
        sampler_name="DPM++ 2M",
        steps=3,
        **SIDE,
    )
    info = answer.info
    assert info["all_prompts"] == ["a cat <lora:ink:0.5>"] * 4 and info["all_seeds"] == [3, 4, 5, 6]
    assert (info["sampler_name"], info["cfg_scale"], info["steps"], info["batch_size"]) == ("DPM++ 2M", 7.0, 3, 2)
    assert info["sd_model_name"] == "tiny" and info["index_of_first_image"] == 0
    for seed, image, text in zip(info["all_seeds"], answer.images, info["infotexts"], strict=True):
        assert image.info["parameters"] == text == client.png_info(image).info
        told = ask(address, "png-info", {"image": webuiapi.b64_img(image)}).json()["parameters"]
        expected = {"Prompt": "a cat <lora:ink:0.5>", "Negative prompt": "dog", "Steps": "3", "Seed": str(seed),
                    "Sampler": "DPM++ 2M Karras", "CFG scale": "7", "Size-1": "64", "Size-2": "64"}  # fmt: skip
        assert expected.items() <= told.items()
    assert answer.parameters["prompt"] == "a cat <lora:ink:0.5>"


@pytest.mark.slow
def test_a_learned_word_is_called_by_the_name_of_its_file(
    client: Any, pipe: Any, tiny_base: Path, shelf: Path, tmp_path: Path
) -> None:
    prompt, word = "a Zork cat <lora:ink:0.5>", shelf.parent / "words" / "zork.safetensors"
    answer = client.txt2img(prompt=prompt, seed=1, **SIDE)
    own = alone(pipe, tiny_base, shelf, tmp_path, prompt, seed=1, adapter=f"{word}@word:zork")
    assert same(answer.image, own[0]) and not same(answer.image, alone(pipe, tiny_base, shelf, tmp_path, prompt, seed=1)[0])
    answer = client.txt2img(prompt="a cat", negative_prompt="zork", seed=1, **SIDE)
    own = alone(pipe, tiny_base, shelf, tmp_path, "a cat", negative="zork", seed=1, adapter=f"{word}@word:zork")
    assert same(answer.image, own[0])


@pytest.mark.slow
def test_variations_keep_the_seed_and_count_the_second_one(
    client: Any, pipe: Any, tiny_base: Path, shelf: Path, tmp_path: Path
) -> None:
    answer = client.txt2img(prompt="a cat", seed=5, subseed=8, subseed_strength=0.4, batch_size=2, **SIDE)
    assert answer.info["all_seeds"] == [5, 5] and answer.info["all_subseeds"] == [8, 9]
    for image, second in zip(answer.images, (8, 9), strict=True):
        told: dict[str, Any] = {"seed": 5, "variation_seed": second, "variation_strength": 0.4}
        assert near(image, alone(pipe, tiny_base, shelf, tmp_path, "a cat", **told)[0])
    assert not near(*answer.images)


@pytest.mark.slow
def test_a_second_pass_and_a_texture_are_those_of_generate(
    client: Any, pipe: Any, tiny_base: Path, shelf: Path, tmp_path: Path
) -> None:
    second: dict[str, Any] = {"hr_scale": 1.5, "hr_upscaler": webuiapi.HiResUpscaler.Lanczos, "hr_second_pass_steps": 3}
    answer = client.txt2img(prompt="a cat", seed=1, enable_hr=True, denoising_strength=0.6, **second, **SIDE)
    own: dict[str, Any] = {"hires": 1.5, "hires_upscaler": "lanczos", "hires_steps": 3, "hires_strength": 0.6}
    assert answer.image.size == (96, 96)
    assert same(answer.image, alone(pipe, tiny_base, shelf, tmp_path, "a cat", seed=1, **own)[0])
    answer = client.txt2img(prompt="a cat", seed=1, tiling=True, **SIDE)
    assert same(answer.image, alone(pipe, tiny_base, shelf, tmp_path, "a cat", seed=1, tile="both")[0])


@pytest.mark.slow
def test_what_is_left_out_is_as_generate_has_it(
    address: str, pipe: Any, tiny_base: Path, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_diffusion.generation.settings._STEPS", STEPS)  # as in the server's process
    told = ask(address, "txt2img", {"prompt": "a cat", "seed": 1}).json()
    image = Image.open(io.BytesIO(base64.b64decode(told["images"][0])))
    own = alone(
        pipe, tiny_base, shelf, tmp_path, "a cat", seed=1, steps=None, guidance=None, scheduler=None, width=None, height=None
    )
    assert same(image, own[0])
    options = {
        "prompt": "a dog --w 128 --s 90",
        "steps": 1,
        "send_images": False,
        "unheard_of": 1,
        "cfg_scale": 1,
        "negative_prompt": "x",
    }
    info = json.loads(ask(address, "txt2img", options).json()["info"])
    assert (info["width"], info["steps"]) == (64, 1) and info["all_prompts"] == ["a dog --w 128 --s 90"]  # words, as there
    assert [note.partition(" ")[0] for note in info["comments"]] == ["not", "the"] and "unheard_of" in info["comments"][0]


@pytest.mark.slow
def test_pictures_of_a_picture_are_those_of_generate(
    client: Any, pipe: Any, tiny_base: Path, shelf: Path, tmp_path: Path
) -> None:
    begin = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    begin.save(tmp_path / "begin.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 40, 32))
    mask.save(tmp_path / "mask.png")
    common: dict[str, Any] = {"steps": 4, "seed": 2}
    answer = client.img2img([begin], prompt="a cat <lora:ink:1>", denoising_strength=0.5, **common, **SIDE)
    own: dict[str, Any] = {"image": tmp_path / "begin.png", "strength": 0.5, **common}
    assert same(answer.image, alone(pipe, tiny_base, shelf, tmp_path, "a cat <lora:ink:1>", **own)[0])
    plain: dict[str, Any] = {"mask_image": mask, "mask_blur": 0, "inpaint_full_res": False, "inpainting_fill": 1}
    answer = client.img2img([begin], prompt="a cat", denoising_strength=1.0, **plain, **common, **SIDE)
    own |= {"mask": tmp_path / "mask.png", "strength": 1.0}
    assert same(answer.image, alone(pipe, tiny_base, shelf, tmp_path, "a cat", **own)[0])


@pytest.mark.slow
@pytest.mark.parametrize("fill", [0, 1])
def test_only_what_a_mask_shows_is_painted_at_the_full_size(client: Any, fill: int) -> None:
    begin = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 120, 3), dtype=np.uint8))
    mask = Image.new("L", begin.size)
    mask.paste(255, (60, 20, 90, 50))
    told: dict[str, Any] = {"mask_image": mask, "mask_blur": 2, "inpainting_fill": fill, "inpaint_full_res_padding": 4}
    answer = client.img2img([begin], prompt="a cat", steps=3, seed=1, **told, **SIDE)
    assert answer.image.size == begin.size
    changed = (np.asarray(answer.image) != np.asarray(begin)).any(2)
    assert changed[25:45, 65:85].mean() > 0.9 and not changed[:, :45].any() and not changed[65:].any()


@pytest.mark.slow
def test_pictures_are_kept_where_the_server_keeps_them(client: Any, shelf: Path) -> None:
    answer = client.txt2img(prompt="a cat", seed=77, save_images=True, override_settings={"samples_format": "jpg"}, **SIDE)
    (kept,) = (shelf.parent / "saved").glob("*-77.png")
    with Image.open(kept) as image:
        assert image.info["parameters"] == answer.info["infotexts"][0]
    assert answer.image.format == "JPEG" and client.png_info(answer.image)


# What is there.


@pytest.mark.slow
def test_the_lists_are_those_of_the_folders(client: Any, address: str, shelf: Path) -> None:
    loras = {one["name"]: one for one in client.get_loras()}
    assert list(loras) == ["flat", "ink", "line", "x1"]
    assert loras["x1"]["alias"] == "paper" and loras["x1"]["metadata"]["a"] == {"b": 1}
    (shelf / "new.safetensors").write_bytes((shelf / "ink.safetensors").read_bytes())
    assert ask(address, "refresh-loras", {}).json() is None and len(client.get_loras()) == 5
    assert {"Euler a", "DPM++ 2M", "DDIM"} <= set(client.util_get_sampler_names())
    assert {"automatic", "karras", "sgm_uniform"} <= set(client.util_get_scheduler_names())
    assert client.util_get_model_names() == ["other", "tiny"]
    assert client.get_memory()["ram"]["total"] > client.get_memory()["ram"]["used"] > 0
    assert client.get_cmd_flags()["port"] == 0 and TOKEN not in json.dumps(client.get_cmd_flags())
    assert client.get_embeddings()["loaded"]["zork"].items() >= {"shape": 32, "vectors": 2}.items()
    assert client.get_scripts() == {"txt2img": ["peft_diffusion"], "img2img": ["peft_diffusion"]}
    told = ask(address, "script-info").json()
    assert {(one["name"], one["is_img2img"]) for one in told} == {("peft_diffusion", False), ("peft_diffusion", True)}
    assert "region_feather" in told[0]["args"][0]["label"]
    assert {"name": "Latent (bicubic antialiased)"} in client.get_latent_upscale_modes()
    for empty in (client.get_sd_vae, client.get_hypernetworks, client.get_prompt_styles, client.get_face_restorers):
        assert empty() == []
    assert [one["name"] for one in client.get_upscalers()] == ["None", "Lanczos"] and client.refresh_checkpoints() is None


@pytest.mark.slow
def test_another_base_is_loaded_when_it_is_asked_for(client: Any) -> None:
    plain = client.txt2img(prompt="a cat", seed=1, **SIDE)
    with pytest.raises(RuntimeError, match="do not fit a Linear"):
        client.txt2img(prompt="a cat <lora:ink:1>", override_settings={"sd_model_checkpoint": "other"}, **SIDE)
    once = client.txt2img(prompt="a cat", seed=1, override_settings={"sd_model_checkpoint": "other"}, **SIDE)
    assert once.info["sd_model_name"] == "other" and not same(once.image, plain.image)
    assert client.util_get_current_model() == "tiny"
    assert same(client.txt2img(prompt="a cat", seed=1, **SIDE).image, plain.image)
    client.util_set_model("other")
    assert client.util_get_current_model() == "other"
    assert same(client.txt2img(prompt="a cat", seed=1, **SIDE).image, once.image)
    client.set_options({"sd_model_checkpoint": "tiny", "CLIP_stop_at_last_layers": 2})
    skipped = client.txt2img(prompt="a cat", seed=1, **SIDE)
    assert skipped.info["clip_skip"] == 2 and not same(skipped.image, plain.image)
    client.set_options({"CLIP_stop_at_last_layers": 1})
    assert "not found" in client.set_options({"sd_model_checkpoint": "../tiny"})["detail"]
    assert "not known" in client.set_options({"no_such_option": 1})["detail"]


@pytest.mark.slow
def test_drawing_is_followed_skipped_and_interrupted(client: Any) -> None:
    with ThreadPoolExecutor(2) as threads:
        coming = threads.submit(lambda: client.txt2img(prompt="a cat", n_iter=30, steps=40, **SIDE))
        while (told := client.get_progress())["progress"] < 0.02:
            assert not coming.done()
        assert told["state"]["job"] == "txt2img" and told["state"]["job_count"] == 30
        client.skip()
        while client.get_progress()["state"]["job_no"] < 3:
            assert not coming.done()
        waiting = threads.submit(lambda: client.txt2img(prompt="a dog", seed=1, **SIDE))
        client.interrupt()
        assert 1 <= len(coming.result().images) < 29 and len(waiting.result().images) == 1
    assert client.get_progress()["progress"] == 0


# Who may ask, and for what.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Authorization": ""}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Basic !"}, 401),
        ({"Authorization": f"Basic {base64.b64encode(f'me:{TOKEN}'.encode()).decode()}"}, 200),
        ({"Authorization": f"Basic {base64.b64encode(TOKEN.encode()).decode()}"}, 401),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost:1"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://203.0.113.5"}, 403),
    ],
)
def test_who_may_ask(address: str, headers: dict[str, str], status: int) -> None:
    answer = ask(address, "options", None, **headers)
    assert answer.status_code == status and "access-control-allow-origin" not in answer.headers
    if status != 200:
        assert answer.json()["error"] == "HTTPException" and answer.json()["detail"]


@pytest.mark.slow
def test_a_request_that_is_too_large_is_not_read_to_its_end(address: str) -> None:
    large = b'{"prompt": "' + b"a" * 2**20 + b'"}'
    sent = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    for body in (large, iter([large])):  # the second tells no length
        answer = requests.post(f"{address}/sdapi/v1/txt2img", data=body, headers=sent, timeout=60)
        assert answer.status_code == 413 and "1 MiB" in answer.json()["detail"]


@pytest.mark.slow
def test_what_changes_nothing_is_taken_as_scripts_send_it(address: str) -> None:
    """Scripts that are off, options that act elsewhere, and JSON that does not say that it is JSON."""
    off = {
        "controlnet": {"args": [{"enabled": False}, {"enabled": False, "module": "canny"}]}, "ADetailer": {"args": [False]},
        "ControlNet": {"args": []}, "Tiled Diffusion": {"args": [False, "MultiDiffusion", 96]},
    }  # fmt: skip
    idle = {"samples_save": False, "live_previews_enable": False, "eta_noise_seed_delta": 0, "randn_source": "CPU"}
    body = {"prompt": "a cat", "steps": 1, "seed": 1, **SIDE}
    wanted = ask(address, "txt2img", body).json()["images"]
    told = json.dumps({**body, "alwayson_scripts": off, "override_settings": idle, "script_name": None})
    sent = {"Authorization": f"Bearer {TOKEN}"}
    answer = requests.post(f"{address}/sdapi/v1/txt2img", data=told, headers=sent, timeout=60)
    assert answer.status_code == 200 and answer.json()["images"] == wanted, answer.text
    info = json.loads(answer.json()["info"])
    assert f"Sampler: {info['sampler_name']}" in info["infotexts"][0]


@pytest.mark.slow
def test_options_may_be_sent_back_as_they_were_told(address: str) -> None:
    """As the wiki of A1111 does to change one of them; what is told as 1 stays what the base says."""
    told = ask(address, "options").json()
    assert ask(address, "options", told).status_code == 200
    assert ask(address, "options").json() == told
    picture = ask(address, "txt2img", {"prompt": "a cat", "steps": 1, "seed": 1, **SIDE}).json()["images"][0]
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        assert json.loads(image.info["peft_diffusion"])["recipe"]["clip_skip"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"prompt": "a <lora:../outside:1>"}, "there is no adapter '../outside'"),
        ({"prompt": "a <lora:/etc/passwd:1>"}, "there is no adapter '/etc/passwd'"),
        ({"prompt": "a __../token__"}, "is a wildcard, and there are no lists"),
        ({"prompt": "a" * 10_001}, "prompt is at most"),
        ({"steps": 151}, "steps is at most 150"),
        ({"steps": 0}, "steps must be"),
        ({"width": 256, "height": 256}, "over the limit of 16,384 pixels"),
        ({"width": 60}, "no multiple of 16"),
        ({"batch_size": 9}, "batch_size is at most 8"),
        ({"batch_size": 8, "n_iter": 6}, "at most 40"),
        ({"n_iter": 0}, "n_iter must be 1 or more"),
        ({"seed": -5}, "seed must be -1"),
        ({"subseed_strength": 2}, "subseed_strength must be"),
        ({"sampler_name": "no such"}, "there is no scheduler"),
        ({"sampler_name": "Euler", "scheduler": "align_your_steps"}, "there is no scheduler 'align_your_steps'"),
        ({"restore_faces": True}, "restore_faces "),
        ({"enable_hr": True, "hr_scale": 4}, "256x256 is over the limit"),
        ({"enable_hr": True, "hr_resize_x": 96, "hr_resize_y": 128}, "hr_resize_x and hr_resize_y"),
        ({"enable_hr": True, "hr_upscaler": "R-ESRGAN 4x+"}, "there is no upscaler"),
        ({"enable_hr": True, "hr_prompt": "a dog"}, "hr_prompt 'a dog' is not done here"),
        ({"eta": 0.5, "sampler_name": "DDIM"}, "eta 0.5 of DDIM is not done"),
        ({"eta": 0, "sampler_name": "DPM++ SDE"}, "take DPM++ 2M"),
        ({"styles": ["x"]}, "styles "),
        ({"script_name": "X/Y/Z plot"}, "script_name "),
        ({"alwayson_scripts": {"ControlNet": {"args": [{"image": "x"}]}}}, "the script 'ControlNet' of alwayson_scripts"),
        ({"alwayson_scripts": {"ADetailer": {"args": [True, {"ad_model": "x"}]}}}, "the script 'ADetailer'"),
        (own(auto=2), "start serve with --max-auto"),
        ({"alwayson_scripts": {"Peft_Diffusion": {"args": [{"auto": 2}]}}}, "start serve with --max-auto"),
        (own(region=[{"box": [0.5, 0, 0.2, 1]}]), f"{PLACE}.region[0]: box 0.5,0,0.2,1 is none"),
        (own(region=[{"box": [0, 0, 1, 1]}, {}]), f"{PLACE}.region[1]: a region has nothing that says where it is"),
        (own(region=[{"mask": "/etc/passwd"}]), f"{PLACE}.region[0].mask is no picture in base64"),
        (own(region=[{"painted": webuiapi.raw_b64_img(Image.new("RGB", (8, 8))), "color": "#ff0000"}]),
         f"{PLACE}.region[0].painted has nothing of the colour #ff0000"),
        (own(region=[{"box": [0, 0, 1, 1], "prompt": "a <lora:../outside:1>"}]), "there is no adapter '../outside'"),
        (own(region=[{"box": [0, 0, 1, 1], "prompt": "a" * 10_001}]), f"{PLACE}.region[0].prompt is at most"),
        (own(region=[{"box": [0, 0, 1, 1]}], regions="auto"),
         f"{PLACE}.regions auto finds the regions by itself; leave each region away"),
        (own(regions="auto"), f"or say where regions are with {PLACE}.region"),
        (own(region=[{"box": [64, 0, 96, 64]}]), "region 1 of 1 holds nothing of a picture of"),
        (own(region_feather=0.2), f"of {PLACE} are of regions; send region"),
        (own(region_isolation=0.5), f"of {PLACE} are of regions; send region"),
        ({"override_settings": {"eta_noise_seed_delta": 31337}}, "the option eta_noise_seed_delta"),
        ({"override_settings": {"sd_vae": "x.pt"}}, "the option sd_vae"),
        ({"override_settings": {"samples_format": "exe"}}, "samples_format"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_told_in_words(address: str, body: dict[str, Any], told: str) -> None:
    answer = ask(address, "txt2img", {"prompt": "a cat", "steps": 1, **body})
    assert answer.status_code == 400, answer.text
    assert told in answer.json()["detail"] and answer.json()["errors"] == answer.json()["detail"]
    assert not re.search(r"(?<!serve with )(?<!serve's )--[a-z]", answer.json()["detail"])  # no request has flags


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, "starts from one picture"),
        ({"init_images": ["http://127.0.0.1/x.png"]}, "addresses are not fetched"),
        ({"init_images": ["/etc/passwd"]}, "init_images[0]"),
        ({"init_images": [base64.b64encode(b"no picture").decode()]}, "init_images[0]: the content is no picture"),
        ({"denoising_strength": 0}, "denoising_strength must be above 0"),
        ({"denoising_strength": 0.01}, "denoising_strength 0.01 leaves none of 1 steps; raise it, or steps"),
        ({"resize_mode": 3}, "resize_mode 3"),
        ({"mask": "", "inpainting_fill": 2}, "inpainting_fill 2"),
        ({"mask": "x", **own(region=[{"box": [0, 0, 1, 1]}])}, "inpaint_full_res draws the part around the mask alone"),
    ],
)
def test_what_cannot_be_drawn_from_is_told_in_words(address: str, body: dict[str, Any], told: str) -> None:
    picture = {"init_images": [webuiapi.raw_b64_img(Image.new("RGB", (64, 64)))]} if body else {}
    answer = ask(address, "img2img", {"prompt": "a cat", "steps": 1, **picture, **body})
    assert answer.status_code == 400 and told in answer.json()["detail"], answer.text


@pytest.mark.slow
def test_a_picture_of_any_size_is_drawn_from_at_the_nearest(address: str) -> None:
    picture = webuiapi.raw_b64_img(Image.new("RGB", (70, 45), "red"))
    for told, wanted in (({}, (64, 48)), ({"height": 64}, (64, 64))):
        answer = ask(address, "img2img", {"prompt": "a cat", "steps": 2, "init_images": [picture], **told})
        assert answer.status_code == 200, answer.text
        with Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]))) as image:
            assert image.size == wanted
    large = webuiapi.raw_b64_img(Image.new("RGB", (192, 128)))  # of --max-pixels, pictures in requests may have four times
    answer = ask(address, "img2img", {"prompt": "a cat", "steps": 2, "init_images": [large]})
    assert answer.status_code == 400 and "192x128 is over the limit of 16,384 pixels" in answer.json()["detail"]


@pytest.mark.slow
def test_a_body_of_other_types_is_told_as_a1111_tells_it(address: str) -> None:
    answer = ask(address, "txt2img", {"steps": "many"})
    assert answer.status_code == 422 and answer.json()["detail"][0]["loc"] == ["body", "steps"]
    assert ask(address, "no-such-endpoint").status_code == 404
    args = ["body", "alwayson_scripts", "peft_diffusion", "args", 0]
    for told, where in (
        (own(region=[{"box": [0, 1]}]), ["region", 0, "box"]), (own(region=[{"adapter": "a"}]), ["region", 0, "adapter"]),
        (own(auto=0), ["auto"]), (own(region=[{}] * 17), ["region"]), (own(region_isolation=2), ["region_isolation"]),
        (own(library="a"), ["library"]),
    ):  # fmt: skip
        answer = ask(address, "txt2img", told)
        assert answer.status_code == 422 and answer.json()["detail"][0]["loc"] == [*args, *where]


# Without a server.


def test_every_flag_of_generate_is_a_field_of_requests_or_one_of_serve_or_cannot_be_said() -> None:
    never = {
        "compose", "compose_file", "prompt_2", "prompt_weights", "zero_negative", "guidance_stop", "control",
        "control_scale", "format", "quality", "prompts_file", "sheet", "count", "seeds", "calibrate", "recipe",
    }  # fmt: skip
    of_generate, of_server = ({one.name for one in settings_of(kind)} for kind in (GenerateConfig, ServeConfig))
    assert of_generate - FIELDS.keys() - of_server == never and FIELDS.keys() <= of_generate
    known = [*TextToImage.model_fields, *ImageToImage.model_fields]
    for place in FIELDS.values():
        assert place.partition(".")[0] in known or "in the prompt" in place


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("--steps must be 1 or more", "steps must be 1 or more"),
        ("--regions auto finds; leave each --region away", f"{PLACE}.regions auto finds; leave each region away"),
        ("lower it, or take --precision float32", "lower it, or take serve's --precision float32"),
        ("start serve with --output FOLDER", "start serve with --output FOLDER"),
        (
            "library remove --missing, not --steps-a --hires-steps",
            "library remove --missing, not --steps-a hr_second_pass_steps",
        ),
        ("there is no adapter 'a --seed 3'; say --steps", "there is no adapter 'a --seed 3'; say steps"),
        (f"{'it isn' + chr(39) + 't --tile'!r}: the base's --tile", "\"it isn't --tile\": the base's tiling"),
        (f"{chr(39) + chr(34) + ' --tile'!r} and --tile", "'\\'\" --tile' and tiling"),
    ],
)
def test_what_drawing_says_is_told_in_the_words_of_requests(said: str, told: str) -> None:
    assert as_request(said) == told


@pytest.mark.parametrize(
    ("sampler", "schedule", "meant"),
    [
        ("Euler a", "automatic", "euler-a"),
        ("DPM++ 2M", "Automatic", "dpm++-karras"),
        ("DPM++ 2M Karras", None, "dpm++-karras"),
        ("k_dpmpp_2m", "SGM Uniform", "dpm++-trailing"),
        ("DPM++ 3M SDE", "", "dpm++-3m-sde-exponential"),
        ("Euler", "karras", "euler-karras"),
        ("Euler", "Simple", "euler-trailing"),
        ("Heun", "normal", "heun-uniform"),
        (None, "Karras", "euler-karras"),
        ("LCM", "SGM Uniform", "lcm"),
        (None, None, None),
    ],
)
def test_samplers_and_schedulers_mean_what_a1111_means(sampler: str | None, schedule: str | None, meant: str | None) -> None:
    assert names.scheduler(sampler, schedule) == meant


@pytest.mark.slow
@pytest.mark.parametrize("skip", [None, 1, 2, 3])
def test_the_layer_that_clients_name_does_not_count_for_xl(skip: int | None) -> None:
    """A1111 reads hidden_states[layer_idx] there, whatever CLIP_stop_at_last_layers is, and clients send its 1."""
    pipe = make_xl_pipe()
    config = ServeConfig(device="cpu")
    held = drawing.Held("xl", pipe, describe(pipe), "")
    body = TextToImage(prompt="a red cat", seed=3, steps=2, cfg_scale=5.0, width=64, height=64)
    done = drawing.run(body, config, held, drawing.Files(config), skip, Job("draw", lambda job: None))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    own = pipe("a red cat", latents=noise, num_inference_steps=2, guidance_scale=5.0, height=64, width=64).images[0]
    assert np.abs(np.asarray(done.drawn[0].image, int) - np.asarray(own, int)).max() <= 1
    assert done.clip_skip == (skip or 1) and any("has no effect" in note for note in done.notes) == (skip == 3)


@pytest.mark.parametrize(
    ("name", "eta", "meant"),
    [
        ("euler-a", 0, "euler"), ("dpm2-a-karras", 0, "dpm2-karras"), ("euler-a", 1, "euler-a"),
        ("euler", 0.3, "euler"), ("dpm++-karras", 0, "dpm++-karras"), ("ddim", 0, "ddim"), ("dpm++-sde", 1, "dpm++-sde"),
        (None, 0, None), (None, 1, None),
    ],
)  # fmt: skip
def test_without_new_noise_a_sampler_is_the_one_that_adds_none(
    name: str | None, eta: float | None, meant: str | None
) -> None:
    """k-diffusion's sample_euler_ancestral and sample_dpm_2_ancestral with eta 0: ``sigma_up`` is 0."""
    assert names.with_eta(name, eta) == meant


def test_text_of_a1111_is_parted_into_its_fields() -> None:
    text = (
        "a cat,\nsecond line <lora:ink:1>\nNegative prompt: dog, (bad:1.2)\nSteps: 20, Sampler: Euler a, CFG scale: 7, "
        'Seed: 1, Size: 512x768, Lora hashes: "ink: 12ab, flat: 34cd", Version: v1.9'
    )
    found = pictures.parse(text)
    assert found["Prompt"] == "a cat,\nsecond line <lora:ink:1>" and found["Negative prompt"] == "dog, (bad:1.2)"
    assert (found["Size-1"], found["Size-2"], found["Version"]) == ("512", "768", "v1.9")
    assert found["Lora hashes"] == "ink: 12ab, flat: 34cd"
    assert pictures.parse("words: alone, and more") == {"Prompt": "words: alone, and more", "Negative prompt": ""}


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_a_picture_tells_of_itself_whatever_its_exif_and_pillows_own_limit(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, form, exif=b"Exif\0\0broken")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # of twice as many Pillow makes an error; the server has its own
    assert pictures.told_by(file.getvalue(), "image", 64) == ("", {})
    with pytest.raises(UserError, match="image: 8x8 is 64 pixels, more than the 63 allowed"):
        pictures.told_by(file.getvalue(), "image", 63)


def test_what_a_mask_shows_is_filled_from_around_it() -> None:
    image = Image.new("RGB", (50, 37), (200, 100, 0))
    mask = Image.new("L", image.size)
    mask.paste(255, (10, 10, 30, 30))
    image.paste((0, 0, 255), (10, 10, 30, 30))
    assert (np.asarray(inpainting.filled(image, mask)) == (200, 100, 0)).all()
    grey = inpainting.filled(image, Image.new("L", image.size, 255))
    assert set(np.asarray(grey).ravel().tolist()) <= {127, 128}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("fill", [0, 1])
def test_what_a_mask_hides_in_part_is_blended_with_the_picture_and_not_the_filling(whole: bool, fill: int) -> None:
    """A1111 lays the picture over what was painted, by the blurred mask, whatever the painting began with."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (24, 24, 40, 40))
    body = ImageToImage(
        prompt="a cat", init_images=[webuiapi.raw_b64_img(picture)], mask=webuiapi.raw_b64_img(mask), mask_blur=4,
        inpainting_fill=fill, inpaint_full_res=not whole, inpaint_full_res_padding=64, width=64, height=64,
    )  # fmt: skip
    config = GenerateConfig("a cat", width=64, height=64)
    begun = drawing.source_of(body, config, ServeConfig(), describe(make_pipe()))
    painted = Image.new("RGB", (64, 64), "blue")
    found = begun.ready.finished(begun.source(25).kept(painted))
    wanted = Image.composite(painted, picture, mask.filter(ImageFilter.GaussianBlur(4)))
    assert np.abs(np.asarray(found, int) - np.asarray(wanted, int)).max() <= 1


@pytest.mark.parametrize("padding", [0, 10, 500])
def test_the_part_around_a_mask_holds_it_in_proportion(padding: int) -> None:
    left, top, right, bottom = inpainting.around((70, 10, 90, 50), (300, 200), (64, 128), padding)
    assert 0 <= left <= 70 and 90 <= right <= 300 and 0 <= top <= 10 and 50 <= bottom <= 200
    if padding < 100:
        assert (right - left) * 2 == bottom - top


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"host": "0.0.0.0"}, "needs a token"),
        ({"host": "::"}, "needs a token"),
        ({"token": "short"}, "a token has 8 letters"),
        ({"token": "long enough", "token_file": "x"}, "either --token or --token-file"),
        ({"token_file": "missing"}, "cannot be read"),
        ({"adapters_dir": "missing"}, "there is no folder missing"),
        ({"offload": "model", "quantize": "int8"}, "leave --offload or --quantize away"),
    ],
)
def test_what_no_server_may_be_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        ServeConfig(**options).check()
    ServeConfig(host="0.0.0.0", token="long enough").check()


@pytest.mark.slow
def test_what_spares_memory_holds_for_every_request(pipe: Any) -> None:
    serving, held = ServeConfig(offload="group", vae_tiling=True, attention_slicing=True), Held("b", pipe, INFO, "")
    config = config_of(TextToImage(prompt="a cat"), serving, held, None)
    assert (config.offload, config.vae_tiling, config.attention_slicing, config.base) == ("group", True, True, "b")
    with pytest.raises(UserError, match="leave it or --tile away"):
        config_of(TextToImage(prompt="a cat", tiling=True), serving, held, None)


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "is_on"), [(None, False), (True, True)])
def test_steps_are_recorded_where_that_pays_or_is_asked_for(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, asked: bool | None, is_on: bool
) -> None:
    """By default on CUDA alone."""
    monkeypatch.setattr("peft_diffusion.serve.engine.loaded", lambda config, given: pipe)
    engine = Engine(ServeConfig(fast=asked), lambda event: None)
    try:
        engine.load().future.result(60)
        assert (fast_drawing.engine_of(pipe.unet) is not None) == is_on
    finally:
        engine.close()
        Adapters(pipe).fast(False)


@pytest.mark.slow
def test_without_its_libraries_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['fastapi'] = None; from peft_diffusion.cli.app import main; sys.exit(main(['serve']))"
    ended = forked.python(["-c", code], None, dict(os.environ))
    assert ended.returncode == 1 and "pip install 'peft_diffusion[serve]'" in ended.stderr
