"""What ``evaluate`` can be told. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, field, replace
from pathlib import Path

from ..bases.asked import AskedPrediction
from ..core.errors import UserError
from ..core.files import at_home
from ..core.parsing import number_in
from ..core.settings import (
    COUNT,
    NATURAL,
    PARAMETERS,
    Flag,
    OnePath,
    OptionalPath,
    Paths,
    Range,
    Texts,
    about,
    explained,
    setting,
    settings_class,
    settle,
)
from ..data.folder import check_folders
from ..data.prompts import refuse_files
from ..generation.compositions import Compose, explanation
from ..generation.recipe import check_folder
from ..generation.settings import SEEDS, NamesAdapters, Precision, Quantize, Sampling
from . import judges


@explained
@settings_class()
class EvaluateConfig(NamesAdapters):
    """Which adapters ``evaluate`` measures, and by what.

    Raises:
        UserError: Folders do not fit the adapters, or a value is one that nothing can be done with.
    """

    adapter: Texts = field(
        metadata=about(
            "Adapters, each as FILE or FILE=STRENGTH: what --strengths says is multiplied by it.",
            PARAMETERS,
            flag=Flag(default_shown=False),
        )
    )
    _: KW_ONLY
    data: Texts = setting(
        (),
        "A folder of real pictures with captions for each adapter, in their order, or as NAME=FOLDER by the names of their "
        "files. They have to be pictures that the adapter was not trained on.",
        PARAMETERS,
        flag=Flag(greedy=True, default_shown=False),
    )
    trained: Texts = setting(
        (),
        "The folders that the adapters were trained on, in the same way: tells how near what is drawn comes to training "
        "pictures, and leaves pictures of --data out that are there too.",
        PARAMETERS,
        flag=Flag(greedy=True, default_shown=False),
    )
    against: Paths = setting(
        (),
        "Folders of other styles that pictures may be taken for; by default, for --judge icons, the sample styles that are "
        "not those of --data.",
        PARAMETERS,
        flag=Flag(greedy=True, default_shown=False),
    )
    strengths: str = setting(
        "0,0.25,0.5,0.75,1,1.25", "At which strengths, with commas between; 0 is always one.", PARAMETERS
    )
    seeds: int = setting(4, "How many noises each prompt is drawn from: intervals are over these.", PARAMETERS, COUNT)
    seed: int = setting(0, "The first of the seeds.", PARAMETERS, SEEDS)
    prompts: int = setting(4, "How many captions of --data are drawn, spread over all.", PARAMETERS, COUNT)
    pictures: int = setting(64, "Real pictures of each folder that count, spread over all.", PARAMETERS, Range(2))
    leak_prompts: Texts = setting(
        (),
        "Prompts without the words that call the adapters, to measure what these change unasked; by default the captions "
        "without trigger and without the words that all share.",
        PARAMETERS,
        flag=Flag(default_shown=False),
    )
    alone: bool = setting(False, "Measure each adapter alone, and not also with each other one on.", PARAMETERS)
    judge: judges.JudgeKind = setting("icons", judges.explanation(), PARAMETERS)
    judge_model: str | None = setting(None, judges.explanation_of_models(), PARAMETERS)
    output: OnePath = setting(
        Path("evaluation"),
        "The folder for report.html, figures.json and a sheet for each adapter.",
        PARAMETERS,
        flag=Flag(aliases=("-o",)),
    )
    compose: Compose = setting("add", explanation(), PARAMETERS)
    compose_file: OptionalPath = setting(
        None, "What compose train wrote of these adapters: how much of each there is where all are on.", PARAMETERS
    )
    steps: int | None = setting(
        None, "Denoising steps; by default 25, or what an adapter for few steps needs.", PARAMETERS, COUNT
    )
    guidance: float | None = setting(
        None, "Classifier-free guidance; by default 5, or what an adapter for few steps needs.", PARAMETERS, NATURAL
    )
    scheduler: str | None = setting(None, "The sampler, as for generate; by default the base's own.", PARAMETERS)
    batch_size: int = setting(8, "Pictures computed at once.", PARAMETERS, COUNT)
    base: str = setting("icons", 'The embedded base "icons", a diffusers folder, a checkpoint file or a hub id.', PARAMETERS)
    prediction: AskedPrediction = setting(
        "auto", "What the base predicts, epsilon or v, where its files do not say it or say it wrongly.", PARAMETERS
    )
    device: str = setting("auto", "Such as cpu, cuda or mps; by default the fastest there is.", PARAMETERS)
    precision: Precision = setting(
        "auto", "Of the base; by default float32 on a CPU and a half precision elsewhere.", PARAMETERS
    )
    quantize: Quantize | None = setting(None, "Hold the base's linear layers in fewer bits: int8 or nf4.", PARAMETERS)

    def __post_init__(self) -> None:
        settle(self)
        way = self.sampling().composition
        self.all_strengths()
        if not self.adapter:
            raise UserError("there is no adapter to evaluate; name its file")
        if self.judge_model is not None and not judges.JUDGES[self.judge].model:
            taking = " and ".join(one.name for one in judges.JUDGES.values() if one.model)
            raise UserError(f"--judge-model is for --judge {taking}; the judge of {self.judge} comes with the package")
        if way != "add" and (self.alone or len(self.adapter) < 2):
            raise UserError(f"--compose {way} is for adapters that meet; give two or more, without --alone")

    def all_strengths(self) -> tuple[float, ...]:
        """The strengths, rising, 0 among them.

        Raises:
            UserError: One is no number.
        """
        found = {0.0}
        for text in self.strengths.split(","):
            value = number_in(text.strip())
            if value is None or not math.isfinite(value):
                raise UserError(f"--strengths {self.strengths}: {text.strip()!r} is no number; write 0,0.5,1")
            found.add(float(value))
        return tuple(sorted(found))

    def all_seeds(self) -> tuple[int, ...]:
        """The seeds, in order."""
        return tuple(range(self.seed, self.seed + self.seeds))

    def sampling(self) -> Sampling:
        """How pictures are drawn: captions are read as they stand, brackets and all."""
        return Sampling(
            (),
            compose=self.compose,
            compose_file=self.compose_file,
            steps=self.steps,
            guidance=self.guidance,
            scheduler=self.scheduler,
            prompt_weights="none",
            batch_size=self.batch_size,
            base=self.base,
            prediction=self.prediction,
            device=self.device,
            precision=self.precision,
            quantize=self.quantize,
        )

    def check(self) -> None:
        """Find out what can be told without the base.

        Raises:
            UserError: Files or folders cannot be read or written, or do not fit the adapters.
        """
        names = [choice.name for choice in self.choices()]
        if len(replace(self.sampling(), adapter=self.adapter).choices()) > len(names):
            raise UserError(f"{self.compose_file} composes an adapter that is not given; name all of them to be evaluated")
        if not self.data:
            raise UserError("give real pictures to judge by with --data, a folder for each adapter")
        folders = [*self.folders("data").values(), *self.folders("trained").values(), *self.against]
        if missing := [name for name in names if name not in self.folders("data")]:
            raise UserError(f"--data has no folder for {missing[0]}; give one for each adapter")
        for folder in folders:
            check_folders([folder])
        refuse_files(self.leak_prompts)
        check_folder(self.output)

    def folders(self, of: str) -> Mapping[str, Path]:
        """Find the folder of each adapter.

        Args:
            of: ``data`` or ``trained``.

        Returns:
            By the names of their files; those of ``trained`` may be fewer.

        Raises:
            UserError: There are more than adapters, an adapter has two, or two adapters have one name.
        """
        texts: Sequence[str] = self.data if of == "data" else self.trained
        names = [choice.name for choice in self.choices()]
        if len(set(names)) < len(names):
            raise UserError(
                f"two adapters have the name {next(one for one in names if names.count(one) > 1)}; rename a file"
            )
        found: dict[str, Path] = {}
        for place, text in enumerate(texts):
            # Names have = in them too: of a and a=b the longer one is meant.
            name = max((one for one in names if text.startswith(f"{one}=")), key=len, default=None)
            folder = text if name is None else text[len(name) + 1 :]
            if name is None or at_home(Path(text)).is_dir():
                if place >= len(names):
                    raise UserError(f"--{of} {text}: there are {len(names)} adapters, and this is folder {place + 1}")
                name, folder = names[place], text
            if name in found:
                raise UserError(
                    f"--{of} {text} is a second folder for {name}; give one for each adapter, all of them as NAME="
                )
            found[name] = at_home(Path(folder))
        return found
