"""Whether every node of a cluster sees the folders that a run writes to."""

import secrets
from collections.abc import Sequence
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

MARKER = ".shared-{token}"
TIMEOUT_S = 120.0


class UnsharedFolderError(RuntimeError):
    """A node of the cluster does not see a folder in which results must meet."""


def check_shared(folders: Sequence[Path]) -> None:
    """Write a file into each folder and have every node read it back.

    On one node nothing is done: there is nobody to share with.

    Raises:
        UnsharedFolderError: if a node does not see what this machine wrote; the message names the
            folder and the nodes.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    token = secrets.token_hex(8)
    markers = [(folder.resolve() / MARKER.format(token=token)) for folder in folders]
    try:
        for marker in markers:
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.write_text(token)
        paths = [str(marker) for marker in markers]
        unseen = {
            f"{node['NodeManagerHostname']} {node['NodeID'][:6]}": _read.options(
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote(paths, token)
            for node in nodes
        }
        answers = ray.get(list(unseen.values()), timeout=TIMEOUT_S)
    finally:
        for marker in markers:
            marker.unlink(missing_ok=True)
    blind = {name: missing for name, missing in zip(unseen, answers, strict=True) if missing}
    if blind:
        folder = Path(next(iter(blind.values()))[0]).parent
        raise UnsharedFolderError(
            f"{len(blind)} of {len(nodes)} nodes ({', '.join(sorted(blind))}) do not see "
            f"{folder}, where results must meet; set `cache` and `runs` to absolute paths on a "
            "disk that every node mounts"
        )


@ray.remote
def _read(paths: list[str], token: str) -> list[str]:
    """The markers that this node does not see."""

    def is_seen(path: str) -> bool:
        try:
            return Path(path).read_text() == token
        except OSError:
            return False

    return [path for path in paths if not is_seen(path)]
