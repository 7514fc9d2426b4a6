"""What the server knows: the base that is loaded, the options, and what is asked of the worker."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..bases import denoiser_of
from ..bases.base import checkpoint_sha256
from ..bases.pipelines import Pipeline
from ..core.errors import UserError, did_you_mean
from ..core.events import Noted, Observer, Warned
from ..core.files import at_home
from ..data.picture_formats import PictureFormat
from ..generation.kept import Kept
from ..generation.memory import loaded
from . import drawing, names, pictures
from .bodies import Drawing
from .drawing import Files, Held, Result
from .settings import ServeConfig, sources
from .worker import Job, More, Worker

T = TypeVar("T")
_MODEL, _SKIP, _FORMAT, _VAE, _HASH = (
    "sd_model_checkpoint", "CLIP_stop_at_last_layers", "samples_format", "sd_vae", "sd_checkpoint_hash",
)  # fmt: skip
_OPTIONS = (_MODEL, _SKIP, _FORMAT, _VAE)
_NO_VAE = ("Automatic", "None", "", None)


class Known(NamedTuple):
    """A base that requests may choose.

    Attributes:
        source: As ``--base`` takes it.
        title: As A1111 shows it: with the beginning of the file's digest, once it was read.
        name: Without ending.
        sha256: The digest of its file; "" where it is none, or was not read yet.
    """

    source: str
    title: str
    name: str
    sha256: str

    def is_called(self, text: str) -> bool:
        """Whether a text means it, as one of A1111's aliases does.

        Args:
            text: Its title, its name, the name of its file, what ``--base`` takes, or the digest.

        Returns:
            Whether it does.
        """
        own = {self.source, self.title, self.name, Path(self.source).name, self.title.partition(" [")[0]}
        return text in own or bool(self.sha256 and len(text) >= 8 and self.sha256.startswith(text.lower()))


class Asked(NamedTuple):
    """Options that hold for a request.

    Attributes:
        source: The base.
        clip_skip: Which layer of the text encoder is taken, counted from the last; None for as the base says.
        form: The format of pictures.
    """

    source: str
    clip_skip: int | None
    form: PictureFormat


@dataclass(eq=False)
class _Request(Job[Result]):
    """The drawing of a request."""

    body: Drawing = field(kw_only=True)


class Engine:
    """A base that stays loaded, and one thread that draws with it.

    Args:
        config: The settings.
        tell: Is told what the person at the server should know.
    """

    def __init__(self, config: ServeConfig, tell: Observer) -> None:
        self.config = config
        self.worker = Worker(config.max_waiting, config.max_batch)
        self.files = Files(config)
        self._tell = tell
        self._held: Held | None = None
        self._has_loaded = False
        self._digests: dict[str, str] = {}
        self._lock = threading.Lock()
        self._options = Asked(config.base, None, "png")

    @property
    def loads(self) -> int:
        """How many times the file of an adapter was read for the base that is loaded."""
        held = self._held
        return 0 if held is None or held.kept is None else held.kept.adapters.loads

    def bases(self) -> list[Known]:
        """List the bases that requests may choose, with the folder as it is now."""
        found = []
        for source in sources(self.config):
            digest, file = self._digests.get(source, ""), Path(source).name
            found.append(Known(source, f"{file} [{digest[:10]}]" if digest else file, Path(source).stem, digest))
        return found

    def base_called(self, text: object) -> Known:
        """Find a base by its name.

        Args:
            text: Any of the names that `Known.is_called` knows.

        Returns:
            The base.

        Raises:
            UserError: There is none.
        """
        found = [one for one in self.bases() if isinstance(text, str) and one.is_called(text)]
        if not found:
            known = [one.title for one in self.bases()]
            raise UserError(f"model {str(text)[:100]!r} not found; there are: {', '.join(known)}{did_you_mean(text, known)}")
        return found[0]

    def options(self) -> dict[str, Any]:
        """Tell the options as ``/sdapi/v1/options`` does."""
        chosen = next(one for one in self.bases() if one.source == self._options.source)
        return {
            _MODEL: chosen.title,
            _HASH: chosen.sha256,
            _SKIP: self._options.clip_skip or 1,
            _FORMAT: self._options.form,
            _VAE: "Automatic",
        }

    def with_options(self, told: Mapping[str, Any]) -> Asked:
        """Read options, beside those that hold.

        Args:
            told: By A1111's names.

        Returns:
            All of them.

        Raises:
            UserError: There is no such option or value.
        """
        found = self._options
        for name, value in told.items():
            if name == _MODEL:
                found = found._replace(source=self.base_called(value).source)
            elif name == _HASH:  # which goes with the name, and comes back where all options are sent again
                continue
            elif name == _SKIP:
                if not isinstance(value, (int, float)) or not 1 <= value <= 12 or value != int(value):
                    raise UserError(f"{_SKIP} is a whole number from 1 to 12, not {str(value)[:20]}")
                found = found._replace(clip_skip=int(value) if value > 1 else None)  # 1 is what A1111 begins with
            elif name == _FORMAT:
                found = found._replace(form=pictures.format_of(value))
            elif (name != _VAE or value not in _NO_VAE) and not names.is_idle(name, value):
                asked = f"{name} {str(value)[:60]!r}"
                raise UserError(f"the option {asked} is not known here; there are: {', '.join(_OPTIONS)}")
        return found

    def set_options(self, told: Mapping[str, Any]) -> Job[None]:
        """Let options hold from now on, and load the base that they name.

        Args:
            told: By A1111's names.

        Returns:
            What is done when the base is there.

        Raises:
            UserError: There is no such option or value.
        """
        self.with_options(told)

        def work(job: Job[None]) -> None:
            with self._lock:
                asked = self.with_options(told)
            if asked.source != self._options.source:
                self._hold(asked.source)
            self._options = asked

        return self.worker.submit(Job("options", work))

    def draw(self, body: Drawing, name: str) -> "Job[Result]":
        """Draw what a request asks for.

        Args:
            body: The request.
            name: The name of the endpoint.

        Returns:
            What comes of it.

        Raises:
            UserError: The request cannot be drawn, as far as that can be told at once.
        """
        override = body.override_settings or {}
        self.with_options(override)
        if body.save_images and self.config.output is None:
            raise UserError("save_images needs a folder to save to: start serve with --output FOLDER")

        def work(job: "Job[Result]") -> Result:
            asked = self.with_options(override)
            result = drawing.run(body, self.config, self._hold(asked.source), self.files, asked.clip_skip, job)
            if lasting:
                self._options = asked
            return self._kept(job, result)

        lasting = bool(override) and body.override_settings_restore_afterwards is False
        shares = drawing.can_share(body) and not lasting
        joins = shares and drawing.can_join(body) and self.config.offload is None
        shared = self._joining if joins else self._together if shares else None
        return self.worker.submit(_Request(name, work, shared, joins, body.batch_size or 1, body=body))

    def _joining(self, jobs: "Sequence[Job[Result]]", more: More) -> "Iterator[tuple[Job[Result], Result]]":
        """Draw requests together, and those that come meanwhile, until one is for another base."""
        waiting = self._asking(jobs)

        def next_ones(pictures: int) -> list[drawing.Asking]:
            return [] if waiting else take(more(pictures))

        def take(came: "Sequence[Job[Result]]") -> list[drawing.Asking]:
            for source, several in self._asking(came).items():
                waiting.setdefault(source, []).extend(several)
            return waiting.pop(drawing_with, [])

        while waiting:
            drawing_with = next(iter(waiting))
            held, asking = self._hold(drawing_with), waiting.pop(drawing_with)
            if held.kept is None or not denoiser_of(held.pipe).steps_alike:
                drawn = drawing.run_together(asking, self.config, held, self.files)
            else:
                drawn = drawing.run_joining(asking, self.config, held, self.files, held.kept, next_ones)
            for job, result in drawn:
                yield job, self._kept(job, result)
            del held, drawn  # or the base would stay in memory while the next is loaded

    def _asking(self, jobs: "Sequence[Job[Result]]") -> dict[str, list[drawing.Asking]]:
        """Requests by the base that they are for."""
        found: dict[str, list[drawing.Asking]] = {}
        for one in jobs:
            if isinstance(one, _Request):
                asked = self.with_options(one.body.override_settings or {})
                found.setdefault(asked.source, []).append(drawing.Asking(one.body, asked.clip_skip, one))
        return found

    def _together(self, jobs: "Sequence[Job[Result]]", _: More) -> "Iterator[tuple[Job[Result], Result]]":
        """Draw requests together that wait together, those of one base after those of another."""
        for source, asking in self._asking(jobs).items():
            for job, result in drawing.run_together(asking, self.config, self._hold(source), self.files):
                yield job, self._kept(job, result)

    def _kept(self, job: "Job[Result]", result: Result) -> Result:
        """Tell the person at the server what was noted, and save the pictures where that was asked for."""
        for note in result.notes:
            self._tell(Noted(note))
        saves = isinstance(job, _Request) and job.body.save_images
        if saves and self.config.output is not None:
            for image, recipe in result.drawn:
                pictures.save(at_home(self.config.output), f"{job.timestamp}-{recipe.seed}", image, recipe)
        return result

    def load(self) -> Job[None]:
        """Load the base that the options name, where it is not there."""
        return self._do("load", lambda: self._hold(self._options.source))

    def unload(self) -> Job[None]:
        """Let the base go; the next picture loads it again."""

        def work() -> None:
            self._held = None
            _empty_cache()

        return self._do("unload", work)

    def form(self, body: Drawing) -> PictureFormat:
        """Tell the format of a request's pictures.

        Args:
            body: The request.

        Returns:
            The format.
        """
        return self.with_options(body.override_settings or {}).form

    def close(self) -> None:
        """Draw no more."""
        self.worker.close()

    def _do(self, name: str, work: Callable[[], object]) -> Job[None]:
        def done(job: Job[None]) -> None:
            work()

        return self.worker.submit(Job(name, done))

    def _hold(self, source: str) -> Held:
        """The base, loaded now where another is; in the worker's thread."""
        if self._held is not None and self._held.source == source:
            return self._held
        if self._has_loaded:  # or had begun to, where that failed
            self._held = None
            _empty_cache()
        self._has_loaded = True
        began = time.monotonic()
        pipe: Pipeline = loaded(self.config.drawing(source), None)
        kept = Kept(pipe, self.config.adapter_memory * 2**20, stay=self.config.offload is None)
        adapters = kept.adapters
        why = adapters.fast(self.config.fast)
        if why is not None and self.config.fast:
            self._tell(Warned(f"pictures are drawn without fast steps: {why}"))
        digest = checkpoint_sha256(pipe)
        self._digests[source] = digest
        self._held = Held(source, pipe, adapters.base, digest, kept)
        self._tell(Noted(f"loaded {source} in {time.monotonic() - began:.1f} s"))
        return self._held


def _empty_cache() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def memory() -> dict[str, Any]:
    """Tell of memory as ``/sdapi/v1/memory`` does.

    Returns:
        Bytes, of the process and of the card.
    """
    import psutil
    import torch

    used, total = psutil.Process().memory_info().rss, psutil.virtual_memory().total
    cuda: dict[str, Any] = {"error": "unavailable"}
    if torch.cuda.is_available():
        free, all_of_it = torch.cuda.mem_get_info()
        stats = torch.cuda.memory_stats()
        cuda = {"system": {"free": free, "used": all_of_it - free, "total": all_of_it}}
        for name, key in (("active", "active_bytes"), ("allocated", "allocated_bytes"), ("reserved", "reserved_bytes")):
            cuda[name] = {"current": stats[f"{key}.all.current"], "peak": stats[f"{key}.all.peak"]}
        split = "inactive_split_bytes.all"
        cuda["inactive"] = {"current": stats[f"{split}.current"], "peak": stats[f"{split}.peak"]}
        cuda["events"] = {"retries": stats["num_alloc_retries"], "oom": stats["num_ooms"]}
    return {"ram": {"free": total - used, "used": used, "total": total}, "cuda": cuda}
