"""The files under deploy/ and cluster.yaml are what their readers accept."""

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "deploy" / name).read_text()))


def test_the_service_is_one_that_serve_and_the_builder_take() -> None:
    from ray.serve.schema import ServeDeploySchema

    from experiment.deployment import ServeConfig

    (service, _) = documents("rayservice.yaml")
    given = yaml.safe_load(service["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(given)
    (application,) = schema.applications
    assert application.import_path == "workflows.serve:build"
    config = ServeConfig.model_validate(application.args)
    assert config.engines.most == 4
    assert not config.demo


@pytest.mark.parametrize("name", ["rayjob.yaml", "rayservice.yaml"])
def test_clusters_ask_for_tokens_and_close_their_ports(name: str) -> None:
    (first, policy) = documents(name)
    cluster = first["spec"].get("rayClusterSpec") or first["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert policy["kind"] == "NetworkPolicy"
    selectors = [source for rule in policy["spec"]["ingress"] for source in rule["from"]]
    # An empty selector would let everybody in.
    assert selectors
    assert all(next(iter(source.values())) for source in selectors)
