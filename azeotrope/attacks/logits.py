"""What all attacks on logits share: a student that learns from the teacher's distributions.

    L = (1 - kd_weight) SFT + kd_weight T^2 mean_t D( softmax(z_t / T), softmax(s_t / T) )

z are the teacher's logits on a text and s the student's on the same text; SFT is cross-entropy on
the text itself, mean over its tokens. A student with other tokens is compared where the two meet,
and what is found there stands for all of the text. An attack is this and a divergence D. The
teacher's trunk is frozen, so its hidden states come from a file and a step costs one product with
its head; logits exist one chunk of tokens at a time.

References: Hinton et al. 2015, arXiv:1503.02531 (temperature and its square); the mixture of one
half and the four divergences against which CMI was tested are those of arXiv:2602.03396.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from azeotrope.attacks.base import Attack, AttackConfig
from azeotrope.heads import chunked
from azeotrope.heads.features import Features
from azeotrope.logits.alignment import Meeting, meetings, next_pieces, same_vocabulary, spellings
from azeotrope.logits.divergences import Divergence
from azeotrope.logits.inversion import Inversion, fit_inversion
from azeotrope.logits.observation import Events, View, as_events, merged, observe, temper
from azeotrope.logits.vocabulary import token_rows
from azeotrope.models import Loaded
from azeotrope.problems import Task
from azeotrope.tokens import Boundary, Example, collate, encode
from azeotrope.traces import Trace
from azeotrope.training import TokenSum


class LogitConfig(AttackConfig):
    """What every attack on logits can be told."""

    kd_weight: float = Field(
        default=0.5, ge=0, le=1, description="share of distillation in the loss; CMI's is one half"
    )
    temperature: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="of both distributions"
    )
    view: View = Field(default_factory=View, description="what the API shows of a distribution")
    contexts: Literal["truth", "own"] = Field(
        default="truth",
        description="texts that the thief has scored: the ground truth, or the teacher's own",
    )
    agreement: bool = Field(
        default=False,
        description="drop the distillation term of tokens where its gradient opposes that of SFT",
    )
    pairs: int = Field(
        default=0,
        ge=0,
        description="clean and defended logits of the same positions that the thief holds, with "
        "which a linear map is undone",
    )


class TeacherHead:
    """The teacher's side of an attack: frozen hidden states and the head that serves them.

    Rows that pad the head beyond the tokenizer belong to no token, and are left out.

    Args:
        snapshot: weight and bias of an undefended head, for the thief who has one.
        model: the whole defended teacher, for attacks that ask it about texts of their own.

    Raises:
        ValueError: if the snapshot's head is of another shape.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        weight: Float[Tensor, "vocab hidden"],
        bias: Float[Tensor, " vocab"] | None,
        features: Sequence[Features],
        *,
        snapshot: tuple[Tensor, Tensor | None] | None = None,
        model: PreTrainedModel | None = None,
    ) -> None:
        if snapshot is not None and snapshot[0].shape != weight.shape:
            raise ValueError(
                f"the snapshot's head is {tuple(snapshot[0].shape)} and the teacher's "
                f"{tuple(weight.shape)}; a snapshot is an earlier state of the same model"
            )
        self.tokenizer = tokenizer
        self.rows = min(len(weight), token_rows(tokenizer))
        self.weight, self.bias = _cut(weight, bias, self.rows)
        self.features = {item.id: item for item in features}
        self.snapshot = None if snapshot is None else _cut(*snapshot, self.rows)
        self.model = model

    def logits(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        return chunked.logits(hidden.float(), self.weight, self.bias)

    def pairs(self, count: int) -> tuple[Tensor, Tensor]:
        """Clean and defended logits of `count` positions, drawn at random from all texts.

        Raises:
            ValueError: if there is no snapshot, or there are fewer positions.
        """
        if self.snapshot is None:
            raise ValueError(
                "an inversion needs the head of an undefended snapshot; none was given"
            )
        rows = torch.cat([item.hidden for item in self.features.values()])
        if count > len(rows):
            raise ValueError(
                f"there are {len(rows)} positions to pair, but `pairs` asks for {count}"
            )
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        hidden = rows[order[:count].to(rows.device)].to(self.weight.device).float()
        return chunked.logits(hidden, *self.snapshot), self.logits(hidden)


def _cut(weight: Tensor, bias: Tensor | None, rows: int) -> tuple[Tensor, Tensor | None]:
    return weight.detach().float()[:rows], None if bias is None else bias.detach().float()[:rows]


@dataclass(frozen=True)
class Lesson:
    """A text as the student reads it, and the teacher's hidden states where both can be compared.

    `at` counts the student's completion tokens; `hidden` and `begun` have one row for each of
    them: pieces of the teacher's token that are written already, -1 after the last.
    """

    example: Example
    at: Int[Tensor, " positions"]
    hidden: Float[Tensor, "positions hidden"]
    begun: Int[Tensor, "positions depth"]

    @property
    def id(self) -> str:
        return self.example.id


@dataclass(frozen=True)
class _Asked:
    """What the teacher is asked in a batch, one row a position."""

    hidden: Tensor
    begun: Tensor
    share: Tensor
    """Tokens of its text that a position stands for."""


class LogitAttack(Attack):
    """Distillation by the divergences that a subclass names.

    With several divergences the largest of their sums over the (micro-)batch is taken.
    """

    needs = "logits"

    def __init__(self, config: Any, *, budget: int = chunked.LOGITS_BUDGET) -> None:
        super().__init__(config)
        self.budget = budget
        self.teacher: TeacherHead | None = None
        self.table: Tensor | None = None
        self.inversion: Inversion | None = None

    def divergences(self) -> tuple[Divergence, ...]:
        raise TypeError(f"{type(self).__name__} does not say which divergence it uses")

    def attach(self, teacher: TeacherHead, student: Loaded) -> None:
        """Prepare to ask this teacher on behalf of this student.

        Raises:
            ValueError: if the view asks for more tokens than there are, an inversion is asked for
                without pairs or without full logits, or the vocabularies have nothing in common.
        """
        self.teacher = teacher
        top_k = self.config.view.top_k
        if top_k is not None and top_k > teacher.rows:
            raise ValueError(
                f"view.top_k {top_k} is larger than the vocabulary, {teacher.rows} tokens"
            )
        self.table = None
        if not same_vocabulary(student.tokenizer, teacher.tokenizer):
            table = spellings(teacher.tokenizer, student.tokenizer, teacher.rows)
            self.table = table.to(student.device)
        self.inversion = None
        if self.config.pairs:
            if top_k is not None:
                raise ValueError("an inversion needs full logits; leave out view.top_k or pairs")
            clean, defended = teacher.pairs(self.config.pairs)
            self.inversion = fit_inversion(clean, observe(defended, self.config.view).log_p)

    def examples(
        self, student: Loaded, traces: Sequence[Trace], task: Task, boundary: Boundary
    ) -> list[Any]:
        """Texts as lessons of this student; `attach` comes first.

        Raises:
            ValueError: if a text is longer than the student's context, or the teacher was asked
                about another text or none.
        """
        if self.teacher is None:
            raise ValueError(f"{self.config.name} learns from a teacher's logits; attach one first")
        found = [read_as(student, trace, task, boundary, self.config) for trace in traces]
        return [self._lesson(student, *pair) for pair in zip(found, traces, strict=True)]

    def _lesson(self, student: Loaded, example: Example, trace: Trace) -> Lesson:
        assert self.teacher is not None
        scored = self.teacher.features.get(trace.id)
        if scored is None:
            raise ValueError(f"the teacher was not asked about trace {trace.id}")
        written = scored.targets.tolist()
        if self.table is None and written == list(example.completion):
            nothing = torch.zeros(len(written), 0, dtype=torch.long)
            return Lesson(example, torch.arange(len(written)), scored.hidden, nothing)
        met = self._meetings(student, trace, written)
        width = max([1, *(len(item.begun) for item in met)])
        begun = torch.full((len(met), width), -1, dtype=torch.long)
        for row, item in enumerate(met):
            begun[row, : len(item.begun)] = torch.tensor(item.begun, dtype=torch.long)
        at = torch.tensor([item.ours for item in met], dtype=torch.long)
        return Lesson(example, at, scored.hidden[[item.theirs for item in met]], begun)

    def _meetings(self, student: Loaded, trace: Trace, written: list[int]) -> list[Meeting]:
        assert self.teacher is not None
        tokenizer, table = self.teacher.tokenizer, self.table
        if table is None:
            # Tokens of one vocabulary are not made of one another's.
            table = torch.zeros(self.teacher.rows, 0, dtype=torch.long)
        stops = trace.finished and written[-1:] == [tokenizer.eos_token_id]
        try:
            met = meetings(
                trace.text,
                student.tokenizer,
                tokenizer,
                table,
                finished=stops,
                written=written[:-1] if stops else written,
            )
        except ValueError as error:
            raise ValueError(
                f"the teacher was asked about another text than that of trace {trace.id}; a "
                "clean-up that rewrites text does not go together with logits of the old one"
            ) from error
        # Of tokens that an API does not show, nobody can say with which piece they go on.
        whole = self.config.view.top_k in (None, self.teacher.rows)
        return [item for item in met if whole or not item.begun]

    def loss(self, student: Loaded, items: list[Any]) -> TokenSum:
        """The mixed loss of some lessons, summed over the student's tokens."""
        pad = int(student.tokenizer.pad_token_id)  # type: ignore[arg-type]
        batch = collate([item.example for item in items], pad).to(student.device)
        hidden = chunked.hidden_states(student.model, batch)
        head = student.model.get_output_embeddings()
        row, asked = _places(items, student.device)
        weight, bias = head.weight, head.bias  # type: ignore[union-attr]

        def part(states: Tensor, labels: Tensor, row: Tensor) -> Tensor:
            return self._part(states, weight, bias, labels, row, asked)  # type: ignore[arg-type]

        targets = batch.targets[batch.mask]
        sums = by_chunks(part, (hidden, targets, row), self._widest(weight), self.budget)
        share = self.config.kd_weight
        total = (1 - share) * sums[0]
        if share:
            total = total + share * self.config.temperature**2 * sums[1:].max()
        return TokenSum(total, len(hidden))

    def _widest(self, weight: Tensor) -> int:
        return max(len(weight), 0 if self.teacher is None else self.teacher.rows)

    def _part(
        self,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        row: Tensor,
        asked: _Asked,
    ) -> Tensor:
        """Summed cross-entropy of some tokens, and each divergence's weighted sum."""
        logits = chunked.logits(states, weight, bias)
        sft = F.cross_entropy(logits, labels, reduction="sum")
        kd = [sft.new_zeros(()) for _ in self.divergences()]
        compared = (row >= 0).nonzero()[:, 0] if self.config.kd_weight else row[:0]
        for chosen, events in self._events(asked, row[compared]):
            at = compared[chosen]
            share = asked.share[row[at]]
            if self.config.agreement:
                share = share * self._agrees(states[at].detach(), weight, bias, labels[at], events)
            for number, value in enumerate(self._compare(logits[at], events)):
                kd[number] = kd[number] + (value * share).sum()
        return torch.stack([sft, *kd])

    @torch.no_grad()
    def _events(self, asked: _Asked, rows: Tensor) -> Iterator[tuple[Tensor, Events]]:
        """What the thief makes of the teacher's answers: indices into `rows`, and their events."""
        if not len(rows):
            return
        assert self.teacher is not None
        events = observe(self.teacher.logits(asked.hidden[rows]), self.config.view)
        if self.inversion is not None:
            events = Events(self.inversion.undo(events.log_p))
        if self.table is None:
            yield torch.arange(len(rows), device=rows.device), events
            return
        kinds, kind = asked.begun[rows].unique(dim=0, return_inverse=True)
        for number, begun in enumerate(kinds):
            chosen = (kind == number).nonzero()[:, 0]
            tokens = None if events.tokens is None else events.tokens[chosen]
            pieces = next_pieces(self.table, begun[begun >= 0])
            yield chosen, merged(Events(events.log_p[chosen], tokens), *pieces)

    def _compare(self, logits: Tensor, events: Events) -> list[Tensor]:
        assert self.teacher is not None
        if self.table is None:
            logits = logits[:, : self.teacher.rows]
        temperature = self.config.temperature
        log_q = temper(as_events(logits, events), temperature)
        log_p = temper(events.log_p, temperature)
        return [divergence(log_p, log_q) for divergence in self.divergences()]

    def _agrees(
        self, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, events: Events
    ) -> Float[Tensor, " positions"]:
        """1 where descending the divergence also descends cross-entropy, and 0 elsewhere.

        Directions are compared at the last hidden state, token by token.
        """
        with torch.enable_grad():
            states = states.requires_grad_(True)
            fixed = weight.detach(), None if bias is None else bias.detach()
            logits = chunked.logits(states, *fixed)
            sft = F.cross_entropy(logits, labels, reduction="sum")
            kd = torch.stack(self._compare(logits, events)).sum()
            one, other = (torch.autograd.grad(x, states, retain_graph=True)[0] for x in (sft, kd))
        return ((one * other).sum(-1) >= 0).float()


def read_as(
    student: Loaded, trace: Trace, task: Task, boundary: Boundary, config: AttackConfig
) -> Example:
    """A trace's text through the student's tokenizer."""
    return encode(
        student.tokenizer,
        task.messages(trace.question),
        trace.text,
        boundary=boundary,
        max_length=config.max_length,
        finished=trace.finished,
        id=trace.id,
    )


def by_chunks(
    part: Callable[..., Tensor], arguments: tuple[Tensor, ...], width: int, budget: int
) -> Tensor:
    """The sum of `part` over chunks of tokens, whose logits are computed again going backwards."""
    pieces = list(chunked.chunks(len(arguments[0]), width, budget))
    if len(pieces) == 1:
        return part(*arguments)
    sums = (
        checkpoint(part, *(value[piece] for value in arguments), use_reentrant=False)
        for piece in pieces
    )
    return torch.stack(list(sums)).sum(0)


def _places(items: Sequence[Lesson], device: torch.device) -> tuple[Tensor, _Asked]:
    """For each of the batch's tokens its row among what the teacher is asked, or -1."""
    rows: list[Tensor] = []
    done, width = 0, max(item.begun.shape[1] for item in items)
    shares: list[Tensor] = []
    for item in items:
        tokens, count = len(item.example.completion), len(item.at)
        row = torch.full((tokens,), -1, dtype=torch.long)
        row[item.at] = torch.arange(done, done + count)
        rows.append(row)
        done += count
        shares.append(torch.full((count,), tokens / max(count, 1)))
    begun = [F.pad(item.begun, (0, width - item.begun.shape[1]), value=-1) for item in items]
    asked = _Asked(
        torch.cat([item.hidden for item in items]).to(device),
        torch.cat(begun).to(device),
        torch.cat(shares).to(device),
    )
    return torch.cat(rows).to(device), asked
