"""A defense, data and scripted teachers for the tests of the head search."""

from collections.abc import Callable, Iterable

import torch

from azeotrope.defenses.base import Defense, DefenseConfig
from azeotrope.heads.features import FeatureBatch, FeaturePair, Features
from azeotrope.heads.head import Head, ProxyHead
from azeotrope.heads.rounds import HeadResult
from azeotrope.heads.search import HeadSearch, HeadTraining, UtilityCheck
from azeotrope.heads.utility import Utility
from azeotrope.training import TokenSum

CLEAN = Utility(0.9, 0.8)
GOOD, BAD = Utility(0.9, 0.8), Utility(0.1, 0.8)


class Killed(Exception):
    """Stands for the death of the process."""


class Pull(Defense):
    """Draws every logit towards minus the strength: each round's strength shows in the head."""

    stage = "weights"

    def loss(self, head: Head, proxies: tuple[ProxyHead, ...], batch: FeatureBatch) -> TokenSum:
        logits = batch.teacher @ head.weight.T
        return TokenSum((logits + self.strength).square().sum(), len(batch.targets))


def pull(strength: float = 0.5) -> Pull:
    return Pull(DefenseConfig(name="pull", strength=strength))


def data() -> list[FeaturePair]:
    generator = torch.Generator().manual_seed(2)
    pairs = []
    for index in range(5):
        tokens = index + 2
        flags = torch.ones(tokens, dtype=torch.bool)
        hidden = torch.randn(tokens, 3, generator=generator)
        pairs.append(
            FeaturePair(Features(f"trace-{index}", torch.arange(tokens), flags, flags, hidden), ())
        )
    return pairs


def new_head(seed: int = 1) -> Head:
    return Head(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)))


def training(rounds: int = 4, **floor: object) -> HeadTraining:
    return HeadTraining.model_validate(
        {
            "fit": {"steps": 4, "batch_size": 2, "checkpoint_every": 2, "log_every": 1},
            "floor": {"rounds": rounds, "raise_by": 2.0, "lower_by": 0.25, **floor},
        }
    )


def scripted(utilities: Iterable[Utility | Exception]) -> Callable[[Head], Utility]:
    """A teacher that answers as well as the script says."""
    script = iter(utilities)

    def measure(head: Head) -> Utility:
        utility = next(script)
        if isinstance(utility, Exception):
            raise utility
        return utility

    return measure


def search(
    head: Head, utilities: Iterable[Utility | Exception], config: HeadTraining, **more: object
) -> HeadResult:
    check = UtilityCheck(scripted(utilities), CLEAN)
    return HeadSearch(head, (), data(), pull(), config, **more).run(check)


class Watched(Pull):
    """Notes what it is trained on and what it is scored on; scores are as scripted."""

    def __init__(self, scores: Iterable[float | None] = ()) -> None:
        super().__init__(DefenseConfig(name="watched", strength=0.5))
        self.scores = iter(scores)
        self.trained: set[str] = set()
        self.scored: list[tuple[str, ...]] = []

    def loss(self, head: Head, proxies: tuple[ProxyHead, ...], batch: FeatureBatch) -> TokenSum:
        self.trained.update(batch.ids)
        total, count, _ = super().loss(head, proxies, batch)
        return TokenSum(total, count, {"pull": float(total.detach()) / count})

    def score(
        self, head: Head, proxies: tuple[ProxyHead, ...], batch: FeatureBatch
    ) -> float | None:
        self.scored.append(batch.ids)
        return next(self.scores, None)


def texts(own: int, truth: int) -> list[FeaturePair]:
    """Texts of the teacher's own and of the ground truth, in turn."""
    generator = torch.Generator().manual_seed(2)
    pairs = []
    for number in range(max(own, truth)):
        for kind, count in (("own", own), ("truth", truth)):
            if number < count:
                flags = torch.ones(3, dtype=torch.bool)
                hidden = torch.randn(3, 3, generator=generator)
                name = f"{kind}-{number}"
                features = Features(name, torch.arange(3), flags, flags, hidden, kind == "own")
                pairs.append(FeaturePair(features, ()))
    return pairs


def watched_search(
    defense: Watched,
    pairs: list[FeaturePair],
    utilities: Iterable[Utility | Exception],
    *,
    held_out: int = 64,
    head: Head | None = None,
    measure: Callable[[Head], Utility] | None = None,
    **more: object,
) -> HeadResult:
    script = list(utilities)
    config = training(len(script)).model_copy(update={"held_out": held_out})
    check = UtilityCheck(measure or scripted(script), CLEAN)
    return HeadSearch(head or new_head(), (), pairs, defense, config, **more).run(check)
