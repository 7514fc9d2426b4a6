"""What is learned from text: to say the next token."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from ...bases import LanguageModel, components
from ...bases.taught import learned
from ...core.errors import UserError
from ..attachment import NAME, at_strength, evaluating
from ..events import Signals
from ..loop.seeds import generator, global_seed
from ..machine.processes import Processes
from .layer_changes import layer_changes

_SEEN = 8  # windows of what is trained on that are measured too
# What no text that is learned should change much: plain words of everyday.
_SENTENCES = (
    "The train leaves at nine in the morning and arrives in the city before noon.",
    "She opened the window, looked at the garden and went back to her work.",
    "Water boils at a lower temperature on a mountain, because the air is thinner there.",
)


@dataclass(frozen=True)
class LanguageSettings:
    """How the loss is made; ``context`` is the length of a window in tokens, with those that the tokenizer puts first."""

    seed: int
    batch_size: int
    accumulation: int
    context: int
    processes: Processes = field(default_factory=Processes)


def tokens(base: LanguageModel, texts: Sequence[str]) -> Tensor:
    """Join texts as one line of tokens, each closed by the end token where the tokenizer has one.

    Args:
        base: The language model.
        texts: The texts.

    Returns:
        (tokens,).
    """
    end = base.tokenizer.eos_token_id
    closing = [] if end is None else [end]
    return torch.tensor([token for text in texts for token in (*base.encode(text), *closing)], dtype=torch.long)


class LanguageTask:
    """The mean loss per token, in nats, of a language model on windows of a line of tokens; and on one kept apart.

    A window is what the tokenizer puts before a text, soft prompts first, and a piece of the line. Every pass over the line
    cuts it at other places and takes the pieces in another order; both come from the seed and the number of the pass alone.
    Learned words are read and not asked for: the model has no output that says them.
    """

    def __init__(
        self, base: LanguageModel, settings: LanguageSettings, train: Tensor, held_out: Tensor | None = None
    ) -> None:
        self.base = base
        self.lm = base.lm
        self.device = base.device
        self.settings = settings
        self.line = train
        self.unseen = held_out
        self.start = self._start()
        room = settings.context - len(self.start)
        if room < 1 or settings.context < 2:
            raise UserError(
                f"--context {settings.context} leaves no room for text: {len(self.start)} tokens stand before every window"
            )
        self.length = min(room, len(train))
        self.unsaid = torch.tensor(list(learned(base.tokenizer).values()), dtype=torch.long, device=self.device)
        self.others = [tokens(base, [words])[:room].to(self.device) for words in _SENTENCES]
        self._base_answers: list[Tensor] = []
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    @property
    def windows(self) -> int:
        """The windows of a pass."""
        # All but a piece of one: the line is cut at a place of its own in each pass.
        return max(1, (len(self.line) - self.length + 1) // self.length)

    def inputs(self, step: int, micro: int) -> dict[str, Tensor]:
        """Make the windows of one micro-batch.

        Args:
            step: From 0.
            micro: The micro-batch of the step, from 0.

        Returns:
            ``rows`` (batch, length).
        """
        settings = self.settings
        size = settings.batch_size * settings.processes.size
        first = (step * settings.accumulation + micro) * size
        own = range(first, first + size)[settings.processes.part(settings.batch_size)]
        return {"rows": torch.stack([self.window(number) for number in own])}

    def seeded(self, step: int, micro: int) -> AbstractContextManager[None]:
        """Put torch's generators at the seed of a micro-batch.

        Args:
            step: From 0.
            micro: The micro-batch of the step, from 0.

        Returns:
            A context, after which they are as they were.
        """
        return global_seed(self.device, self.settings.seed, "dropout", step, micro, *self.settings.processes.seed_parts())

    def loss(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Compute the loss of one micro-batch.

        Args:
            inputs: From `inputs`, on the device.

        Returns:
            A float32 scalar with gradients to the adapter.
        """
        losses, said = self._losses(inputs["rows"], self.start)
        return losses.sum() / said.sum().clamp(min=1)

    def held_out(self) -> float | None:
        """The loss on the line kept apart, every token of it but the first once; None where there is none."""
        return None if self.unseen is None else self._mean_loss(self.unseen)

    def signals(self) -> Signals:
        """The loss on the beginning of what is trained on, and how far what is said of plain sentences left the base's."""
        seen = self._mean_loss(self.line[: _SEEN * (self.settings.context - len(self.start))])
        return Signals(seen, self.leakage(), layer_changes(components(self.base), NAME))

    def leakage(self) -> float:
        """The Kullback-Leibler divergence from the base's next tokens, in nats per token."""
        with torch.no_grad(), evaluating([self.lm]):
            if not self._base_answers:
                with at_strength([self.lm], NAME, 0.0):
                    self._base_answers = self._other_answers()
            pairs = zip(self._base_answers, self._other_answers(), strict=True)
            # A soft prompt stands before what the base reads: both end alike.
            moved = torch.cat([(was.exp() * (was - now[-len(was) :])).sum(-1) for was, now in pairs])
        return max(0.0, float(moved.mean()))

    def _other_answers(self) -> list[Tensor]:
        """Log-probabilities after each token of plain sentences, (tokens, vocabulary) each."""
        start = self._start()
        rows = [torch.cat([start, row])[None] for row in self.others]
        return [self.lm(input_ids=row, use_cache=False).logits[0].double().log_softmax(-1) for row in rows]

    def _start(self) -> Tensor:
        """What the tokenizer puts first at the present strengths: at 0 no soft prompt."""
        return torch.tensor(self.base.start(), dtype=torch.long, device=self.device)

    def _mean_loss(self, line: Tensor) -> float:
        total, count, start = 0.0, 0, self._start()
        with torch.no_grad(), evaluating([self.lm]):
            for rows in self._pieces(line):
                losses, said = self._losses(rows, start)
                total, count = total + float(losses.double().sum()), count + int(said.sum())
        return total / max(1, count)

    def window(self, number: int) -> Tensor:
        """Cut a piece out of the text, in the order of the run: epoch by epoch, shuffled and shifted anew in each.

        Args:
            number: Which piece of the run, from 0.

        Returns:
            Tokens, (length,).
        """
        turn, place = divmod(number, self.windows)
        if self._order[0] != turn:
            chance = generator(self.settings.seed, "windows", turn)
            shift = torch.randint(min(self.length, len(self.line) - self.windows * self.length + 1), (), generator=chance)
            starts = torch.randperm(self.windows, generator=chance) * self.length + shift
            self._order = turn, starts
        start = int(self._order[1][place])
        return self.line[start : start + self.length]

    def _pieces(self, line: Tensor) -> Iterator[Tensor]:
        """A line in windows one after the other, in batches; a shorter last one by itself."""
        length = self.settings.context - len(self.start)
        whole = len(line) // length * length
        if whole:
            yield from torch.split(line[:whole].view(-1, length), self.settings.batch_size)
        if len(line) - whole + len(self.start) > 1:
            yield line[None, whole:]

    def _losses(self, rows: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each token of pieces (rows, length) that follows something, float32 and flat, and which can be said.

        ``start`` stands before each piece. What cannot be said has no loss.
        """
        rows = rows.to(self.device)
        ids = torch.cat([start.expand(len(rows), -1), rows], 1)
        first = max(1, len(start))  # what the tokenizer puts first is told, not asked
        logits = self.lm(input_ids=ids, use_cache=False).logits[:, first - 1 : -1].flatten(0, 1)
        asked = ids[:, first:].flatten()
        said = ~torch.isin(asked, self.unsaid) if len(self.unsaid) else torch.ones_like(asked, dtype=torch.bool)
        # The place of a token that cannot be said is filled with one that can: the model has no output for the former.
        losses = F.cross_entropy(logits.float(), asked.where(said, 0), reduction="none")
        return losses * said, said
