"""The endpoints, with the paths and shapes of A1111's ``modules/api/api.py``."""

import asyncio
import time
from dataclasses import asdict
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp

from ..core.errors import UserError, first_line
from ..core.parsing import json_value
from ..formats.container import is_pickle, read_header, title
from ..generation import hires
from . import drawing, names, pictures
from .bodies import OWN, Drawing, Extras, ImageToImage, PngInfo, TextToImage
from .engine import Engine, memory
from .guard import Guard, error_body
from .settings import ServeConfig
from .wording import as_request
from .worker import FullError, Job

T = TypeVar("T")
_ROOT = "/sdapi/v1"
_OWN_ARGUMENT = f"an object with any of {', '.join(Extras.model_fields)}"
# What clients ask for and is the same at all times, most of it because it is not there.
_FIXED: dict[str, Any] = {
    "sd-vae": [], "hypernetworks": [], "face-restorers": [], "realesrgan-models": [], "prompt-styles": [],
    "extensions": [], "scripts": {"txt2img": [OWN], "img2img": [OWN]},
    "script-info": [
        {"name": OWN, "is_alwayson": True, "is_img2img": of_picture, "args": [{"label": _OWN_ARGUMENT}]}
        for of_picture in (False, True)
    ],
}  # fmt: skip


def application(config: ServeConfig, engine: Engine) -> ASGIApp:
    """Make the ASGI application.

    FastAPI, which A1111's own interface is made with: so bodies are checked and errors of them told in the same shape.

    Args:
        config: The settings.
        engine: What draws.

    Returns:
        The application, behind its guard.
    """
    # Scripts send json.dumps(...) without saying what it is, which A1111 reads; the guard sees to pages of others.
    app = FastAPI(title="peft_diffusion", docs_url=None, redoc_url=None, strict_content_type=False)
    _errors(app)
    _drawing(app, config, engine)
    _control(app, engine)
    _lists(app, config, engine)
    return Guard(app, config.secret(), config.hosts, config.max_request_mb * 2**20)


def _errors(app: FastAPI) -> None:
    async def refused(request: Request, error: Exception) -> JSONResponse:
        status = error.status_code if isinstance(error, HTTPException) else 503 if isinstance(error, FullError) else 400
        detail = str(error.detail) if isinstance(error, HTTPException) else as_request(str(error))
        return JSONResponse(error_body(type(error).__name__, detail), status)

    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(type(error).__name__, first_line(error)), 500)

    for kind in (HTTPException, UserError, FullError):
        app.add_exception_handler(kind, refused)
    app.add_exception_handler(Exception, failed)


async def _done(engine: Engine, request: Request, job: Job[T], *, kept: bool = False) -> T:
    """Wait for a job; without whoever asked for it, it is dropped, unless its pictures are kept."""
    coming = asyncio.wrap_future(job.future)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({coming, *(() if kept else (gone,))}, return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            engine.worker.drop(job)
        return await coming
    except asyncio.CancelledError:
        if job.future.cancelled():
            raise FullError("the server ends") from None
        raise
    finally:
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _drawing(app: FastAPI, config: ServeConfig, engine: Engine) -> None:
    async def answer(request: Request, body: Drawing, name: str) -> dict[str, Any]:
        form, job = engine.form(body), engine.draw(body, name)
        result = await _done(engine, request, job, kept=body.save_images)
        shown = result.drawn if body.send_images else []
        images = await asyncio.to_thread(lambda: [pictures.encoded(*one, form) for one in shown])
        return {"images": images, "parameters": body.repeated(), "info": drawing.info_of(body, result, job.timestamp)}

    @app.post(f"{_ROOT}/txt2img")
    async def txt2img(request: Request, body: TextToImage) -> dict[str, Any]:
        return await answer(request, body, "txt2img")

    @app.post(f"{_ROOT}/img2img")
    async def img2img(request: Request, body: ImageToImage) -> dict[str, Any]:
        return await answer(request, body, "img2img")

    @app.post(f"{_ROOT}/png-info")
    async def png_info(body: PngInfo) -> dict[str, Any]:
        content = pictures.decoded(body.image, "image")
        text, items = await asyncio.to_thread(pictures.told_by, content, "image", config.max_given_pixels)
        return {"info": text, "items": items, "parameters": pictures.parse(text) if text else {}}


def _control(app: FastAPI, engine: Engine) -> None:
    @app.get(f"{_ROOT}/progress")
    async def progress(skip_current_image: bool = False) -> dict[str, Any]:
        job = engine.worker.present
        idle: Job[None] = Job("", lambda _: None)
        state = (job or idle).state()
        share = 0.0 if job is None else min(0.01 + job.progress, 1.0)
        passed = 0.0 if job is None or job.began is None else time.monotonic() - job.began
        eta = passed / share - passed if share else 0.0
        waiting = f"{engine.worker.waiting} waiting" if engine.worker.waiting else None
        return {"progress": share, "eta_relative": eta, "state": state, "current_image": None, "textinfo": waiting}

    @app.post(f"{_ROOT}/interrupt")
    async def interrupt() -> dict[str, Any]:
        engine.worker.interrupt()
        return {}

    @app.post(f"{_ROOT}/skip")
    async def skip() -> None:
        engine.worker.skip()

    @app.get(f"{_ROOT}/options")
    async def options() -> dict[str, Any]:
        return engine.options()

    @app.post(f"{_ROOT}/options")
    async def set_options(request: Request, told: dict[str, Any]) -> None:
        await _done(engine, request, engine.set_options(told), kept=True)

    @app.post(f"{_ROOT}/unload-checkpoint")
    async def unload(request: Request) -> dict[str, Any]:
        await _done(engine, request, engine.unload(), kept=True)
        return {}

    @app.post(f"{_ROOT}/reload-checkpoint")
    async def reload(request: Request) -> dict[str, Any]:
        await _done(engine, request, engine.load(), kept=True)
        return {}

    @app.post(f"{_ROOT}/refresh-loras")
    async def refresh_loras() -> None:
        await asyncio.to_thread(engine.files.shelf, again=True)

    @app.post(f"{_ROOT}/refresh-embeddings")
    @app.post(f"{_ROOT}/refresh-checkpoints")
    @app.post(f"{_ROOT}/refresh-vae")
    async def refresh() -> None:
        """These folders are read whenever they are asked for."""


def _lists(app: FastAPI, config: ServeConfig, engine: Engine) -> None:
    @app.get(f"{_ROOT}/loras")
    async def loras() -> list[dict[str, Any]]:
        return await asyncio.to_thread(_loras, engine)

    @app.get(f"{_ROOT}/embeddings")
    async def embeddings() -> dict[str, Any]:
        return await asyncio.to_thread(_embeddings, engine)

    @app.get(f"{_ROOT}/sd-models")
    async def models() -> list[dict[str, Any]]:
        return [
            {
                "title": one.title,
                "model_name": one.name,
                "hash": one.sha256[:10] or None,
                "sha256": one.sha256 or None,
                "filename": one.source,
                "config": None,
            }
            for one in engine.bases()
        ]

    @app.get(f"{_ROOT}/samplers")
    async def samplers() -> list[dict[str, Any]]:
        return names.samplers()

    @app.get(f"{_ROOT}/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        return names.schedulers()

    @app.get(f"{_ROOT}/upscalers")
    async def upscalers() -> list[dict[str, Any]]:
        told = {"model_name": None, "model_path": None, "model_url": None, "scale": 4.0}
        return [{"name": name, **told} for name in ("None", hires.label(hires.LANCZOS))]

    @app.get(f"{_ROOT}/latent-upscale-modes")
    async def modes() -> list[dict[str, Any]]:
        return [{"name": hires.label(name)} for name in hires.UPSCALERS if name != hires.LANCZOS]

    @app.get(f"{_ROOT}/cmd-flags")
    async def flags() -> dict[str, Any]:
        return {name: value for name, value in asdict(config).items() if not name.startswith("token")}

    @app.get(f"{_ROOT}/memory")
    async def tell_memory() -> dict[str, Any]:
        return memory()

    for name, value in _FIXED.items():
        app.add_api_route(f"{_ROOT}/{name}", _always(value), methods=["GET"], name=name)


def _always(value: Any) -> Any:
    async def answer() -> Any:
        return value

    return answer


def _loras(engine: Engine) -> list[dict[str, Any]]:
    """The adapter files, with what A1111 shows of each."""
    found = []
    for path in engine.files.shelf().files:
        try:
            metadata = {} if is_pickle(path) else dict(read_header(path).metadata)
        except UserError:  # which whoever draws with it is told
            metadata = {}
        alias = metadata.get("ss_output_name") or title(path)
        found.append({"name": title(path), "alias": alias, "path": str(path), "metadata": _parsed(metadata)})
    return found


def _parsed(metadata: dict[str, str]) -> dict[str, Any]:
    """Metadata whose values are JSON objects as these, as A1111 reads them."""
    found: dict[str, Any] = {}
    for name, value in metadata.items():
        found[name] = value
        if value.startswith("{"):
            try:
                found[name] = json_value(value)
            except ValueError:
                continue
    return found


def _embeddings(engine: Engine) -> dict[str, Any]:
    """The learned words, with the sizes of their vectors; "skipped" where a file holds none."""
    known: dict[str, dict[str, Any]] = {"loaded": {}, "skipped": {}}
    for choice in engine.files.words().by_name.values():
        try:
            shapes = [entry.shape for entry in choice.parsed().header.tensors.values()]
        except UserError:
            continue
        fits = [shape for shape in shapes if len(shape) in (1, 2)]
        vectors, width = (1, fits[0][0]) if fits and len(fits[0]) == 1 else fits[0] if fits else (0, 0)
        told = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None, "shape": width, "vectors": vectors}
        known["loaded" if fits else "skipped"][choice.path.stem] = told
    return known
