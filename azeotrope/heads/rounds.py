"""The rounds of a head search, and the state from which a killed search goes on."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from azeotrope.files import written_whole
from azeotrope.heads.utility import Utility
from azeotrope.training import LogEntry

STATE = "search.safetensors"


@dataclass
class Round:
    """One round of the search."""

    number: int
    strength: float
    utility: Utility | None
    accepted: bool
    loss: float
    score: float | None = None


@dataclass
class HeadResult:
    """What a search did, round by round."""

    rounds: list[Round] = field(default_factory=list)
    log: list[LogEntry] = field(default_factory=list)
    strength: float = 0.0
    """The strength of the chosen round; 0 if no round was accepted."""

    @property
    def best_score(self) -> float:
        """The lowest score of an accepted round; infinite if none was scored."""
        scores = [item.score for item in self.rounds if item.accepted and item.score is not None]
        return min(scores, default=math.inf)


@dataclass
class SearchState:
    """Everything that the next round depends on."""

    chosen: dict[str, Tensor]
    """The trained parameters of the chosen head."""
    result: HeadResult
    factor: float = 1.0
    """What the next round multiplies the strength by."""

    def save(self, folder: Path) -> None:
        """Write the state. A crash leaves the previous state or this one, never a mixture."""
        described = {
            "factor": self.factor,
            "strength": self.result.strength,
            "rounds": [asdict(item) for item in self.result.rounds],
            "log": [asdict(entry) for entry in self.result.log],
        }
        tensors = {name: value.cpu().contiguous() for name, value in self.chosen.items()}
        # One file holds head and rounds, so they cannot belong to different rounds.
        with written_whole(folder / STATE) as temporary:
            save_file(tensors, temporary, metadata={"search": json.dumps(described)})


def load_state(folder: Path) -> SearchState | None:
    """The state that an earlier attempt left, or None if there is none."""
    path = folder / STATE
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["search"])
        chosen = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    rounds = [
        Round(**{**record, "utility": Utility(**record["utility"])})
        for record in described["rounds"]
    ]
    log = [LogEntry(**record) for record in described["log"]]
    return SearchState(chosen, HeadResult(rounds, log, described["strength"]), described["factor"])


def copy_parameters(head: nn.Module) -> dict[str, Tensor]:
    """Copies of a head's trained parameters, by name."""
    return {name: value.detach().clone() for name, value in head.named_parameters()}


@torch.no_grad()
def restore_parameters(head: nn.Module, saved: dict[str, Tensor]) -> None:
    """Put saved parameters back into the head, in place: optimizers hold the same tensors."""
    for name, value in head.named_parameters():
        value.copy_(saved[name])
