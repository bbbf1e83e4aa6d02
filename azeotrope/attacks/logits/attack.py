"""What all attacks on logits share: a student that learns from the teacher's distributions.

    L = (1 - kd_weight) SFT + kd_weight T^2 mean_t D( softmax(z_t / T), softmax(s_t / T) )

z are the teacher's logits on a text and s the student's on the same text; SFT is cross-entropy on
the text itself, as a mean over its tokens. A student with another vocabulary is compared where the
tokens of both meet, and these positions stand for the whole text. An attack adds a divergence D.
The teacher's trunk is frozen, so its hidden states come from a file and a step costs one product
with its head. Logits exist for one chunk of tokens at a time.

References: Hinton et al. 2015, arXiv:1503.02531 (temperature and its square); the mixture of one
half and the four divergences against which CMI was tested are those of arXiv:2602.03396.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from azeotrope.attacks.base import Attack, AttackConfig, longest
from azeotrope.attacks.logits.lessons import ComparedPositions, join_lessons, make_lesson
from azeotrope.attacks.logits.teacher import TeacherHead
from azeotrope.heads.chunked import hidden_states
from azeotrope.logits.alignment import next_pieces, same_vocabulary, spellings
from azeotrope.logits.chunks import LOGITS_BUDGET, head_logits, token_chunks
from azeotrope.logits.divergences import Divergence
from azeotrope.logits.inversion import Inversion, fit_inversion
from azeotrope.logits.observation import Events, View, as_events, merged, observe, temper
from azeotrope.logits.served import logit_cap
from azeotrope.models import Loaded
from azeotrope.problems import Task
from azeotrope.tokens import Boundary, collate
from azeotrope.traces import Trace, example_of
from azeotrope.training import TokenSum


class LogitConfig(AttackConfig):
    """Settings that every attack on logits has."""

    kd_weight: float = Field(
        default=0.5, ge=0, le=1, description="share of distillation in the loss; CMI's is one half"
    )
    temperature: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="of both distributions"
    )
    view: View = Field(default_factory=View, description="what the API shows of a distribution")
    contexts: Literal["truth", "own"] = Field(
        default="truth",
        description="texts that the attacker has scored: the ground truth, or the teacher's own",
    )
    agreement: bool = Field(
        default=False,
        description="drop the distillation term of tokens where its gradient opposes that of SFT",
    )
    pairs: int = Field(
        default=0,
        ge=0,
        description="clean and defended logits of the same positions that the attacker holds, "
        "with which a linear map is undone",
    )


@dataclass(frozen=True)
class StudentHead:
    """The student's output head as its model applies it."""

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None
    cap: float | None

    def logits(self, states: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        return head_logits(states, self.weight, self.bias, cap=self.cap)

    def detached(self) -> "StudentHead":
        """The same head without a gradient."""
        bias = None if self.bias is None else self.bias.detach()
        return StudentHead(self.weight.detach(), bias, self.cap)


class LogitAttack(Attack):
    """Distillation by the divergences that a subclass returns.

    With several divergences, the largest of their sums over the (micro-)batch is taken.
    """

    needs = "logits"

    def __init__(self, config: Any, *, budget: int = LOGITS_BUDGET) -> None:
        super().__init__(config)
        self.budget = budget
        self.teacher: TeacherHead | None = None
        self.table: Tensor | None = None
        self.inversion: Inversion | None = None

    def divergences(self) -> tuple[Divergence, ...]:
        """The divergences of which the largest sum is taken.

        Raises:
            TypeError: if a subclass does not override it.
        """
        raise TypeError(f"{type(self).__name__} does not say which divergence it uses")

    def attach(self, teacher: TeacherHead, student: Loaded) -> None:
        """Prepare to query this teacher on behalf of this student.

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
        teacher = self.teacher
        if teacher is None:
            raise ValueError(
                f"{self.config.label} learns from a teacher's logits; attach one first"
            )
        shows_all = self.config.view.top_k in (None, teacher.rows)
        return [
            make_lesson(
                example_of(trace, student.tokenizer, task, boundary, longest(self.config, student)),
                trace,
                student.tokenizer,
                teacher,
                self.table,
                shows_all=shows_all,
            )
            for trace in traces
        ]

    def loss(self, student: Loaded, lessons: list[Any]) -> TokenSum:
        """The mixed loss of some lessons, summed over the student's tokens."""
        pad = int(student.tokenizer.pad_token_id)  # type: ignore[arg-type]
        batch = collate([lesson.example for lesson in lessons], pad).to(student.device)
        hidden = hidden_states(student.model, batch)
        head = student.model.get_output_embeddings()
        rows, positions = join_lessons(lessons, student.device)
        weight, bias = head.weight, head.bias  # type: ignore[union-attr]
        own = StudentHead(weight, bias, logit_cap(student.model))  # type: ignore[arg-type]

        def part(states: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
            return self._sums(states, own, labels, rows, positions)

        targets = batch.targets[batch.mask]
        sums = sum_by_chunks(part, (hidden, targets, rows), self._widest(weight), self.budget)
        share = self.config.kd_weight
        total = (1 - share) * sums[0]
        if share:
            # The square keeps gradients as large as at T = 1 (Hinton et al. 2015, section 2).
            total = total + share * self.config.temperature**2 * sums[1:].max()
        return TokenSum(total, len(hidden))

    def _widest(self, weight: Tensor) -> int:
        return max(len(weight), 0 if self.teacher is None else self.teacher.rows)

    def _sums(
        self,
        states: Tensor,
        head: StudentHead,
        labels: Tensor,
        rows: Tensor,
        positions: ComparedPositions,
    ) -> Tensor:
        """Summed cross-entropy of some tokens, and each divergence's weighted sum."""
        logits = head.logits(states)
        sft = F.cross_entropy(logits, labels, reduction="sum")
        kd = [sft.new_zeros(()) for _ in self.divergences()]
        compared = (rows >= 0).nonzero()[:, 0] if self.config.kd_weight else rows[:0]
        for chosen, events in self._events(positions, rows[compared]):
            at = compared[chosen]
            share = positions.share[rows[at]]
            if self.config.agreement:
                share = share * self._agrees(states[at].detach(), head, labels[at], events)
            for number, value in enumerate(self._compare(logits[at], events)):
                kd[number] = kd[number] + (value * share).sum()
        return torch.stack([sft, *kd])

    @torch.no_grad()
    def _events(
        self, positions: ComparedPositions, rows: Tensor
    ) -> Iterator[tuple[Tensor, Events]]:
        """The teacher's answers as the attacker reads them: indices into `rows`, and events."""
        if not len(rows):
            return
        assert self.teacher is not None
        events = observe(self.teacher.logits(positions.hidden[rows]), self.config.view)
        if self.inversion is not None:
            events = Events(self.inversion.undo(events.log_p))
        if self.table is None:
            yield torch.arange(len(rows), device=rows.device), events
            return
        # Positions with one prefix share the map from the teacher's tokens to the next piece.
        kinds, kind = positions.prefixes[rows].unique(dim=0, return_inverse=True)
        for number, prefix in enumerate(kinds):
            chosen = (kind == number).nonzero()[:, 0]
            tokens = None if events.tokens is None else events.tokens[chosen]
            pieces = next_pieces(self.table, prefix[prefix >= 0])
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
        self, states: Tensor, head: StudentHead, labels: Tensor, events: Events
    ) -> Float[Tensor, " positions"]:
        """1 where descending the divergence also descends cross-entropy, and 0 elsewhere.

        Directions are compared at the last hidden state, token by token.
        """
        with torch.enable_grad():
            states = states.requires_grad_(True)
            logits = head.detached().logits(states)
            sft = F.cross_entropy(logits, labels, reduction="sum")
            kd = torch.stack(self._compare(logits, events)).sum()
            # A token's terms depend on its own state alone, so gradients of sums are per token.
            towards_text, towards_teacher = (
                torch.autograd.grad(term, states, retain_graph=True)[0] for term in (sft, kd)
            )
        return ((towards_text * towards_teacher).sum(-1) >= 0).float()


def sum_by_chunks(
    part: Callable[..., Tensor], arguments: tuple[Tensor, ...], width: int, budget: int
) -> Tensor:
    """The sum of `part` over chunks of tokens; the backward pass computes logits again.

    Args:
        arguments: tensors with one row per token.
        width: logits per token.
        budget: greatest number of logits alive at once.
    """
    pieces = list(token_chunks(len(arguments[0]), width, budget))
    if len(pieces) == 1:
        return part(*arguments)
    sums = (
        checkpoint(part, *(value[piece] for value in arguments), use_reentrant=False)
        for piece in pieces
    )
    return torch.stack(list(sums)).sum(0)
