"""What all attacks on logits share: a student that learns from the teacher's distributions.

    L = (1 - kd_weight) SFT + kd_weight T^2 mean_t D( softmax(z_t / T), softmax(s_t / T) )

z are the teacher's logits on a text and s the student's on the same text; SFT is cross-entropy on
the text itself, mean over its tokens. An attack is this and a divergence D. The teacher's trunk is
frozen, so its hidden states come from a file and a step costs one product with its head; logits
exist one chunk of tokens at a time.

References: Hinton et al. 2015, arXiv:1503.02531 (temperature and its square); the mixture of one
half and the four divergences against which CMI was tested are those of arXiv:2602.03396.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase

from azeotrope import heads
from azeotrope.alignment import common_starts, first_pieces, same_vocabulary
from azeotrope.attacks.base import Attack, AttackConfig
from azeotrope.divergences import Divergence
from azeotrope.features import Features
from azeotrope.inversion import Inversion, fit_inversion
from azeotrope.models import Loaded
from azeotrope.observation import Events, View, as_events, merged, observe, temper
from azeotrope.tasks.base import Task
from azeotrope.tokens import Boundary, Example, collate, encode
from azeotrope.traces import Trace
from azeotrope.training import TokenSum


class LogitConfig(AttackConfig):
    """What every attack on logits can be told."""

    kd_weight: float = Field(
        default=0.5, ge=0, le=1, description="share of distillation in the loss; CMI's is one half"
    )
    temperature: float = Field(default=1.0, gt=0, description="of both distributions")
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
    """The teacher's side of an attack: frozen hidden states, the head that serves them, and for
    the thief who has one, the head of an undefended snapshot."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        weight: Float[Tensor, "vocab hidden"],
        bias: Float[Tensor, " vocab"] | None,
        features: Sequence[Features],
        *,
        snapshot: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.weight, self.bias = weight.detach().float(), bias
        self.features = {item.id: item for item in features}
        self.snapshot = snapshot

    def logits(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        return heads.logits(hidden.float(), self.weight, self.bias)

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
        hidden = rows[order[:count].to(rows.device)].to(self.weight.device)
        weight, bias = self.snapshot
        return heads.logits(hidden.float(), weight.float(), bias), self.logits(hidden)


@dataclass(frozen=True)
class Lesson:
    """A text as the student reads it, and the teacher's hidden states where both can be compared.

    `at` counts the student's completion tokens; `hidden` has one row for each of them.
    """

    example: Example
    at: Int[Tensor, " positions"]
    hidden: Float[Tensor, "positions hidden"]

    @property
    def id(self) -> str:
        return self.example.id


class LogitAttack(Attack):
    """Distillation by the divergences that a subclass names.

    With several divergences the largest of their sums over the batch is taken.
    """

    needs = "logits"

    def __init__(self, config: Any, *, budget: int = heads.LOGITS_BUDGET) -> None:
        super().__init__(config)
        self.budget = budget
        self.teacher: TeacherHead | None = None
        self.pieces: Tensor | None = None
        self.inversion: Inversion | None = None

    def divergences(self) -> tuple[Divergence, ...]:
        raise TypeError(f"{type(self).__name__} does not say which divergence it uses")

    def attach(self, teacher: TeacherHead, student: Loaded) -> None:
        """Prepare to ask this teacher on behalf of this student.

        Raises:
            ValueError: if the view asks for more tokens than there are, or an inversion is asked
                for without pairs or without full logits.
        """
        self.teacher = teacher
        vocab = len(teacher.weight)
        top_k = self.config.view.top_k
        if top_k is not None and top_k > vocab:
            raise ValueError(f"view.top_k {top_k} is larger than the vocabulary, {vocab} tokens")
        self.pieces = None
        if not same_vocabulary(student.tokenizer, teacher.tokenizer):
            pieces = first_pieces(teacher.tokenizer, student.tokenizer, vocab)
            self.pieces = pieces.to(student.device)
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
            ValueError: if a text is longer than the student's context, or was not scored.
        """
        if self.teacher is None:
            raise ValueError(f"{self.config.name} learns from a teacher's logits; attach one first")
        return [self._lesson(student, trace, task, boundary) for trace in traces]

    def _lesson(self, student: Loaded, trace: Trace, task: Task, boundary: Boundary) -> Lesson:
        example = encode(
            student.tokenizer,
            task.messages(trace.question),
            trace.text,
            boundary=boundary,
            max_length=self.config.max_length,
            finished=trace.finished,
            id=trace.id,
        )
        assert self.teacher is not None
        scored = self.teacher.features.get(trace.id)
        if scored is None:
            raise ValueError(f"the teacher was not asked about trace {trace.id}")
        count = len(example.completion)
        if self.pieces is None and len(scored.hidden) == count:
            return Lesson(example, torch.arange(count), scored.hidden)
        tokenizers = student.tokenizer, self.teacher.tokenizer
        ours, theirs = common_starts(trace.text, *tokenizers, finished=trace.finished)
        return Lesson(example, torch.tensor(ours), scored.hidden[theirs])

    def loss(self, student: Loaded, items: list[Any]) -> TokenSum:
        """The mixed loss of some lessons, summed over the student's tokens."""
        pad = int(student.tokenizer.pad_token_id)  # type: ignore[arg-type]
        batch = collate([item.example for item in items], pad).to(student.device)
        hidden = heads.hidden_states(student.model, batch)
        head = student.model.get_output_embeddings()
        rows, asked = _places(items)
        sft, kd = self._sums(
            hidden,
            head.weight,  # type: ignore[union-attr, arg-type]
            head.bias,  # type: ignore[union-attr, arg-type]
            batch.targets[batch.mask],
            rows.to(student.device),
            asked.to(student.device),
        )
        weight, tokens, positions = self.config.kd_weight, len(hidden), max(len(asked), 1)
        total = (1 - weight) * sft
        if weight:
            # Each term is a mean over its own positions; `fit` divides by tokens.
            scale = weight * self.config.temperature**2 * tokens / positions
            total = total + scale * kd.max()
        return TokenSum(total, tokens)

    def _sums(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: Tensor,
        asked: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy, and the summed divergences, chunk by chunk."""

        def part(states: Tensor, labels: Tensor, row: Tensor) -> Tensor:
            return self._part(states, weight, bias, labels, row, asked)

        parts = list(heads.chunks(len(targets), len(weight), self.budget))
        if len(parts) == 1:
            sums = part(hidden, targets, rows)
            return sums[0], sums[1:]
        sums = hidden.new_zeros(1 + len(self.divergences()), dtype=torch.float32)
        for piece in parts:
            arguments = hidden[piece], targets[piece], rows[piece]
            sums = sums + checkpoint(part, *arguments, use_reentrant=False)
        return sums[0], sums[1:]

    def _part(
        self,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        row: Tensor,
        asked: Tensor,
    ) -> Tensor:
        logits = heads.logits(states, weight, bias)
        sft = F.cross_entropy(logits, labels, reduction="sum")
        compared = row >= 0
        if not self.config.kd_weight or not bool(compared.any()):
            return torch.stack([sft, *(sft.new_zeros(()) for _ in self.divergences())])
        events = self._events(asked[row[compared]])
        ours = logits[compared]
        keep = None
        if self.config.agreement:
            keep = self._agrees(states[compared].detach(), weight, bias, labels[compared], events)
        found = []
        for divergence in self.divergences():
            value = self._compare(divergence, ours, events)
            found.append((value if keep is None else value * keep).sum())
        return torch.stack([sft, *found])

    @torch.no_grad()
    def _events(self, hidden: Tensor) -> Events:
        """What the thief makes of the teacher's answers at some positions."""
        assert self.teacher is not None
        events = observe(self.teacher.logits(hidden), self.config.view)
        if self.inversion is not None:
            events = Events(self.inversion.undo(events.log_p))
        return events if self.pieces is None else merged(events, self.pieces)

    def _compare(self, divergence: Divergence, logits: Tensor, events: Events) -> Tensor:
        log_q = as_events(logits, events)
        temperature = self.config.temperature
        return divergence(temper(events.log_p, temperature), temper(log_q, temperature))

    def _agrees(
        self,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        events: Events,
    ) -> Float[Tensor, " positions"]:
        """1 where descending the divergence also descends cross-entropy, and 0 elsewhere.

        Directions are compared at the last hidden state, token by token.
        """
        with torch.enable_grad():
            states = states.requires_grad_(True)
            logits = heads.logits(states, weight.detach(), None if bias is None else bias.detach())
            terms: list[Callable[[], Tensor]] = [
                lambda: F.cross_entropy(logits, labels, reduction="sum"),
                lambda: sum(self._compare(d, logits, events).sum() for d in self.divergences()),  # type: ignore[return-value]
            ]
            sft, kd = (torch.autograd.grad(t(), states, retain_graph=True)[0] for t in terms)
        return ((sft * kd).sum(-1) >= 0).float()


def _places(items: Sequence[Lesson]) -> tuple[Int[Tensor, " tokens"], Tensor]:
    """For each of the batch's tokens its row among the teacher's hidden states, or -1."""
    rows: list[Tensor] = []
    done = 0
    for item in items:
        row = torch.full((len(item.example.completion),), -1, dtype=torch.long)
        row[item.at] = torch.arange(done, done + len(item.at))
        done += len(item.at)
        rows.append(row)
    return torch.cat(rows), torch.cat([item.hidden for item in items])
