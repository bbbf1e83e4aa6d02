"""MiniLLM: on-policy distillation by reverse KL; `reverse_kl` is its offline form.

The student answers the observed questions itself, and the teacher is queried about every token y_t
of the answer. With q the student's distribution at that token and p the teacher's,

    grad KD = mean_t w_t [ grad KL(q_t || p_t)  -  R_t grad log q(y_t) ]

    R_t = mean_(s > t) log p(y_s) / q(y_s)     reward of the later tokens; 0 after the last one
    w_t = q(y_t) / m(y_t),   m = mix p + (1 - mix) q

The first term is the exact derivative of one step, summed over the vocabulary. The second is a
policy gradient for the tokens that follow; it takes their mean instead of their sum, so that short
answers are not favoured. Texts are drawn from m: a weak student alone would write texts on which
the teacher's distribution means little. The weight w corrects for m. As in all attacks on logits,

    L = (1 - kd_weight) SFT + kd_weight T^2 KD

with the ground truth instead of the paper's pre-training corpus. Each text is used in one step of
the optimizer, so PPO's clipping would have no effect and is left out.

Reference: Gu et al. 2023, "MiniLLM: knowledge distillation of large language models",
arXiv:2306.08543.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from azeotrope.attacks.base import longest
from azeotrope.attacks.logits.attack import LogitAttack, LogitConfig, sum_by_chunks
from azeotrope.attacks.logits.teacher import TeacherHead
from azeotrope.endings import end_ids
from azeotrope.generation import Sampling, generate
from azeotrope.heads.chunked import hidden_states, sequence_loss
from azeotrope.logits import divergences
from azeotrope.logits.alignment import same_vocabulary
from azeotrope.logits.chunks import head_logits, token_chunks
from azeotrope.logits.observation import View
from azeotrope.logits.served import logit_cap, scaled
from azeotrope.mixture import Mixture
from azeotrope.models import Loaded
from azeotrope.problems import Task
from azeotrope.tokens import Boundary, Example, collate
from azeotrope.traces import Trace, example_of, row_seed
from azeotrope.training import TokenSum


class Config(LogitConfig):
    """The defaults of the mixture and the weights are the paper's."""

    name: Literal["minillm"] = "minillm"
    mix: float = Field(
        default=0.2, ge=0, lt=1, description="share of the teacher in the policy that writes texts"
    )
    max_new_tokens: int = Field(
        default=96, ge=1, description="length at which a text that the student writes is cut"
    )

    @model_validator(mode="after")
    def _whole(self) -> "Config":
        if self.view != View() or self.pairs or self.agreement:
            raise ValueError(
                "minillm queries a teacher at every step and sees all of its logits; leave out "
                "view, pairs and agreement, or use reverse_kl"
            )
        return self


class MiniLlm(LogitAttack):
    """The objective; see the module's docstring for the equations."""

    needs = "teacher"

    def attach(self, teacher: TeacherHead, student: Loaded) -> None:
        """Prepare to query this teacher on behalf of this student.

        Raises:
            ValueError: if the teacher comes without its model, or has another vocabulary.
        """
        if teacher.model is None:
            raise ValueError(
                "minillm queries the teacher about texts that the student writes, so it needs the "
                "whole model; give TeacherHead(..., model=...)"
            )
        if not same_vocabulary(student.tokenizer, teacher.tokenizer):
            raise ValueError(
                f"minillm mixes the distributions of teacher ({len(teacher.tokenizer)} tokens) and "
                f"student ({len(student.tokenizer)} tokens), which must have one vocabulary; "
                "reverse_kl and forward_kl teach students of another one"
            )
        super().attach(teacher, student)

    def examples(
        self, student: Loaded, traces: Sequence[Trace], task: Task, boundary: Boundary
    ) -> list[Any]:
        """Questions for the student to answer, and texts for SFT.

        Raises:
            ValueError: if no teacher is attached, or a text is longer than the student's context.
        """
        if self.teacher is None:
            raise ValueError("minillm learns from a teacher; attach one first")
        length = longest(self.config, student)
        return [example_of(trace, student.tokenizer, task, boundary, length) for trace in traces]

    def loss(self, student: Loaded, examples: list[Any]) -> TokenSum:
        """The mixed loss, summed over the tokens of the observed texts.

        A text that the student writes counts for as many tokens as the observed text of the same
        prompt. Texts are drawn with a seed from the example's id and torch's seed, which `fit` sets
        at every step.
        """
        pad = int(student.tokenizer.pad_token_id)  # type: ignore[arg-type]
        text = sequence_loss(student.model, collate(examples, pad).to(student.device))
        weight = self.config.kd_weight
        total = (1 - weight) * text.total
        if weight:
            written = self.write(student, examples)
            kd = self.distance(student, written, [len(example.completion) for example in examples])
            total = total + weight * self.config.temperature**2 * kd
        return TokenSum(total, text.count)

    def write(self, student: Loaded, examples: Sequence[Example]) -> list[Example]:
        """Answers drawn from the mixture of student and teacher, one for each prompt."""
        teacher = self.teacher
        assert teacher is not None
        assert teacher.model is not None
        partner = teacher.model
        tokenizer, model = student.tokenizer, student.model
        prompts = [example.prompt for example in examples]
        pad = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
        policy = Mixture(
            partner,
            lambda states: teacher.logits(scaled(partner, states)),
            share=self.config.mix,
            temperature=self.config.temperature,
            pad_id=pad,
        )
        was_training = model.training
        model.eval()
        completions = generate(
            model,
            prompts,
            Sampling(temperature=1.0, max_new_tokens=self.config.max_new_tokens),
            end_ids=end_ids(tokenizer),
            pad_id=pad,
            seeds=[row_seed(example.id, torch.initial_seed()) for example in examples],
            hooks=[policy],
        )
        model.train(was_training)
        flags = [(False,) * len(completion.ids) for completion in completions]
        return [
            Example(example.id, example.prompt, completion.ids, flag, flag)
            for example, completion, flag in zip(examples, completions, flags, strict=True)
        ]

    def distance(
        self, student: Loaded, written: Sequence[Example], counts: Sequence[int]
    ) -> Float[Tensor, ""]:
        """sum over texts of count times mean_t w_t KL(q_t || p_t); its gradient has both terms."""
        teacher = self.teacher
        assert teacher is not None
        assert teacher.model is not None
        batch = collate(written, pad_id=0).to(student.device)
        head = student.model.get_output_embeddings()
        weight, bias = head.weight, head.bias  # type: ignore[union-attr]
        cap = logit_cap(student.model)
        temperature = self.config.temperature

        def log_probs(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
            logits = head_logits(ours, weight, bias, cap=cap)[:, : teacher.rows]  # type: ignore[arg-type]
            return tuple(  # type: ignore[return-value]
                (x / temperature).log_softmax(-1) for x in (logits, teacher.logits(theirs))
            )

        def at_labels(ours: Tensor, theirs: Tensor, labels: Tensor) -> Tensor:
            pair = log_probs(ours, theirs)
            return torch.stack([x.gather(-1, labels[:, None])[:, 0] for x in pair])

        def part(
            ours: Tensor, theirs: Tensor, labels: Tensor, scale: Tensor, after: Tensor
        ) -> Tensor:
            log_q, log_p = log_probs(ours, theirs)
            chosen = after * log_q.gather(-1, labels[:, None])[:, 0]
            # The policy gradient contributes a gradient but no value.
            step = divergences.reverse_kl(log_p, log_q) - (chosen - chosen.detach())
            return (scale * step).sum()

        ours = hidden_states(student.model, batch)
        labels, sizes = batch.targets[batch.mask], [len(example.completion) for example in written]
        width = max(len(weight), teacher.rows)  # type: ignore[arg-type]
        with torch.no_grad():
            theirs = hidden_states(teacher.model, batch)
            pieces = token_chunks(len(labels), width, self.budget)
            log_q, log_p = torch.cat([at_labels(ours[x], theirs[x], labels[x]) for x in pieces], -1)
            reward = log_p - log_q
            # w = q / m; numerator and denominator are divided by q, which may be tiny.
            scale = 1 / (self.config.mix * reward.exp() + 1 - self.config.mix)
            share = [scale.new_full((n,), c / n) for n, c in zip(sizes, counts, strict=True)]
            after = torch.cat([_mean_after(part) for part in reward.split(sizes)])
        arguments = ours, theirs, labels, scale * torch.cat(share), after
        return sum_by_chunks(part, arguments, width, self.budget)


def _mean_after(reward: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """The mean reward of the tokens after each token; 0 after the last."""
    rest = reward.flip(0).cumsum(0).flip(0) - reward
    later_tokens = torch.arange(len(reward) - 1, -1, -1, device=reward.device)
    return rest / later_tokens.clamp(min=1)


def build(config: Config) -> MiniLlm:
    return MiniLlm(config)
