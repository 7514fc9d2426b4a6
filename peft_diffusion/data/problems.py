"""What is wrong in an image folder, in words that say how to mend it."""

from dataclasses import dataclass

from peft_diffusion.core.errors import UserError


@dataclass(frozen=True)
class Problem:
    """One thing found in a folder: `where` is the file as the user named it, `line` counts from 1.

    `kind` groups problems of one sort. A problem that `stops` must be mended, or waived, before training.
    """

    where: str
    kind: str
    message: str
    fix: str
    line: int | None = None
    stops: bool = False

    def __str__(self) -> str:
        place = self.where if self.line is None else f"{self.where}, line {self.line}"
        return f"{place}: {self.message}. {self.fix}."


class PictureError(UserError):
    """A file that cannot be used as a picture; `problem` says why and what to do."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem
