"""Problems in an image folder, in words that say how to fix them."""

from dataclasses import dataclass

from peft_diffusion.core.errors import UserError


@dataclass(frozen=True)
class Problem:
    """One problem in a folder.

    Attributes:
        where: The file as the user named it.
        kind: The heading that groups problems of one sort.
        message: What is wrong.
        fix: What to do.
        line: The line in the file, from 1; None for the whole file.
        stops: Whether it must be fixed, or waived, before training.
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
    """A file that cannot be used as an image.

    Attributes:
        problem: Why, and what to do.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem
