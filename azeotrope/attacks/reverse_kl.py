"""Distillation by reverse KL on given texts: D = sum_v q log(q / p).

The student seeks the teacher's modes. This is the offline form, which the CMI paper
(arXiv:2602.03396) runs under the name MiniLLM; `minillm` is the on-policy original.
Reference: Gu et al. 2023, "MiniLLM", arXiv:2306.08543.
"""

from typing import Literal

from azeotrope.attacks.logits import LogitAttack, LogitConfig
from azeotrope.logits import divergences
from azeotrope.logits.divergences import Divergence


class Config(LogitConfig):
    name: Literal["reverse_kl"] = "reverse_kl"


class ReverseKl(LogitAttack):
    def divergences(self) -> tuple[Divergence, ...]:
        return (divergences.reverse_kl,)


def build(config: Config) -> ReverseKl:
    return ReverseKl(config)
