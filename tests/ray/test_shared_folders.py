"""On several nodes, results that do not meet on one disk are refused and never published."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from actors.shared import UnsharedFolderError, check_shared


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three nodes of one machine."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(2):
        nodes.add_node(num_cpus=1)
    ray.init(address=nodes.address, log_to_driver=False)
    nodes.wait_for_nodes()
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def test_a_disk_that_all_nodes_see_passes(cluster: Cluster, tmp_path: Path) -> None:
    check_shared([tmp_path / "cache", tmp_path / "runs"])
    assert not list(tmp_path.rglob(".shared-*"))


def test_a_disk_that_nodes_do_not_see_is_refused(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nodes of one machine see one disk; what this process writes is hidden from them."""
    write = Path.write_text

    def private(path: Path, text: str, *args: object, **named: object) -> int:
        written = write(path, text, *args, **named)  # type: ignore[arg-type]
        if path.name.startswith(".shared-"):
            shutil.move(path, tmp_path / "elsewhere")
        return written

    monkeypatch.setattr(Path, "write_text", private)
    with pytest.raises(UnsharedFolderError, match=r"3 of 3 nodes .* do not see .*absolute paths"):
        check_shared([tmp_path / "cache"])
