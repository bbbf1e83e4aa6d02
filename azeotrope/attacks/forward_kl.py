"""Distillation by forward KL: D = sum_v p log(p / q).

The usual distillation loss; its gradient is that of cross-entropy on the teacher's probabilities.
Reference: Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural network",
arXiv:1503.02531.
"""

from typing import Literal

from azeotrope.attacks.logits import LogitAttack, LogitConfig
from azeotrope.logits import divergences
from azeotrope.logits.divergences import Divergence


class Config(LogitConfig):
    name: Literal["forward_kl"] = "forward_kl"


class ForwardKl(LogitAttack):
    def divergences(self) -> tuple[Divergence, ...]:
        return (divergences.forward_kl,)


def build(config: Config) -> ForwardKl:
    return ForwardKl(config)
