"""What cannot be served is refused in one line, before anything starts; the rest builds."""

import importlib.util
import io
import socket
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema
from rich.console import Console

from azeotrope import models
from azeotrope.config import ConfigError
from azeotrope.config import build as build_config
from azeotrope.config import load as load_config
from azeotrope.defenses.watermark import PUBLIC_KEY
from azeotrope.files import write_json
from experiment import deployment
from experiment.points import POINTS, Point
from gateway.accounts.redis_ledger import RedisLedger
from gateway.accounts.sqlite_keys import KEYS_FILE
from gateway.accounts.stores import StoreLocation, open_keys, open_ledger
from gateway.policy import Policy
from workflows import serve


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where keys and quotas are, in place of the user's own."""
    monkeypatch.setenv("AZEOTROPE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def config(*overrides: str, source: str = "pocket/teacher", **data: Any) -> deployment.ServeConfig:
    return build_config(deployment.ServeConfig, {"source": source, **data}, list(overrides))


def bound(app: Application, name: str) -> Any:
    """One deployment of an application, with what it is made of."""
    parts = [app, *(arg for arg in app._bound_deployment.init_args if isinstance(arg, Application))]
    return {part._bound_deployment.name: part._bound_deployment for part in parts}[name]


# What is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["demo=true", "host=0.0.0.0"], "host must be a loopback address, got 0.0.0.0"),
        (["demo=true", "host=example.org"], "host must be a loopback address"),
        (["engines.least=3", "engines.most=2"], r"most \(2\) is less than least \(3\)"),
        (["engines.least=0"], "engines.least"),
        (["ports=1"], r"unknown key 'ports'; allowed: .*, policy, port, "),
        (["engines.some=1"], r"unknown key 'engines.some'; allowed: least, most$"),
        (["policy.tier=1"], r"unknown key 'policy.tier'; allowed: audit, extraction, .*, tiers, "),
        (["engine=llama"], "engine: .*'auto', 'vllm' or 'transformers'"),
        (["port=70000"], r"port: .*got 70000"),
        (["decoding=[{name: doge}]"], "doge is no defense of stage decoding"),
        (["decoding=[{name: nothing}]"], "nothing"),
    ],
)
def test_contradictions_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(*overrides)


def test_loopback_has_more_than_one_name() -> None:
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        assert config("demo=true", f"host={host}").demo


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["undefended=teacher"], r"pocket/teacher does not say which.*undefended=PATH"),
        (["demo=true"], "undefended=PATH"),
        (["undefended=pocket/tutor"], "undefended: no pocket model"),
        (["defense=doge"], "pocket/teacher is a checkpoint"),
        (["decoding=[{name: watermark}]"], r"the public key of the documentation.*\(key=...\)"),
        ([f"decoding=[{{name: watermark, key: {PUBLIC_KEY}}}]"], "public key of the documentation"),
    ],
)
def test_what_would_protect_nothing_is_not_built(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        deployment.build(config("engine=transformers", *overrides))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_an_engine_that_is_not_installed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine vllm is not installed.*engine=transformers"):
        deployment.build(config("engine=vllm"))


def test_a_port_that_cannot_be_had_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="take another with port="):
            serve.check_network(config(f"port={taken.getsockname()[1]}"))
    # An address of nobody, kept for documentation.
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.99"):
        serve.check_network(config("host=192.0.2.99"))


def test_a_proxy_that_ignores_the_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.check_network(config(f"port={port}"))
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(ConfigError, match="RAY_SERVE_ENABLE_HA_PROXY=1 binds to every address"):
        serve.check_network(config(f"port={port}"))
    serve.check_network(config(f"port={port}", "host=0.0.0.0"))


def test_a_public_dashboard_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    for url in ("", "127.0.0.1:8265", "localhost:8265", "[::1]:8265"):
        serve.check_dashboard(url)
    for url in ("0.0.0.0:8265", "10.0.0.7:8265", "head.example:8265"):
        with pytest.raises(ConfigError, match="RAY_AUTH_MODE=token"):
            serve.check_dashboard(url)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    serve.check_dashboard("10.0.0.7:8265")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "tier: {}",
            r"unknown key 'tier'; allowed: audit, .*, tiers, timeout_s",
        ),
        (
            "tiers: {standard: {logprob: topk}}",
            r"unknown key 'tiers.standard.logprob'; allowed: bans, .*, logprobs, .*, top_k, top_p$",
        ),
        ("extraction: {action: punish}", r"extraction.action: .*'observe', 'throttle' or 'block'"),
        ("tiers: {}", r"tiers: .*at least 1"),
        # Undefended numbers are what a licence is for.
        ("tiers: {standard: {strength: 0}}", "tiers.standard.strength: .*greater than 0"),
        ("tiers: {standard: {temperature: [1, 0.5]}}", r"\[least, greatest\], got \[1.0, 0.5\]"),
        ("tiers: {standard: {top_p: [1, 0.5]}}", r"\[least, greatest\].*, got \[1.0, 0.5\]"),
        ("tiers: {standard: {top_p: [0.5, 1.5]}}", r"within 0 and 1, got \[0.5, 1.5\]"),
        ("tiers: {standard: {top_p: [0, 0]}}", r"within 0 and 1, got \[0.0, 0.0\]"),
        ("[tiers]", "must hold a mapping"),
        ("tiers: {", "is not valid YAML"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_config(Policy, path)


# What is built ---------------------------------------------------------------------------------


def test_a_bare_checkpoint_has_one_engine_and_no_way_to_another(store: Path) -> None:
    app = deployment.build(config("engine=transformers", "rows=8"))
    gateway, engine = bound(app, "Gateway"), bound(app, "Defended")
    [settings, _, undefended] = gateway.init_args
    assert undefended is None
    assert settings["name"] == "teacher"
    assert settings["store"] == str(store)
    assert settings["policy"] == gateway.user_config == Policy().dump()
    [asked] = engine.init_args
    assert asked["checkpoint"] == models.resolve("pocket/teacher")
    assert (asked["kind"], asked["rows"], asked["queue"]) == ("transformers", 8, 16)
    assert engine.max_ongoing_requests == 24


def test_the_undefended_engine_has_no_defense(tmp_path: Path) -> None:
    mark = {"name": "watermark", "strength": 2.0, "key": "not the public one"}
    teacher, small = (models.resolve(f"pocket/{name}") for name in ("teacher", "small"))
    point = Point(defense="watermark", checkpoint=small, decoding=(mark,), teacher=teacher)
    write_json(tmp_path / "run" / POINTS, [point.dump()])
    for wanted in ("undefended=teacher", "demo=true"):
        app = deployment.build(config("engine=transformers", wanted, source=str(tmp_path / "run")))
        [defended], [clean] = bound(app, "Defended").init_args, bound(app, "Undefended").init_args
        assert (defended["checkpoint"], clean["checkpoint"]) == (small, teacher)
        assert [part["name"] for part in defended["decoding"]] == ["watermark"]
        assert clean["decoding"] == []
        assert bound(app, "Gateway").init_args[0]["name"] == "run"


def test_a_written_file_is_one_that_serve_deploys_and_builds(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("{timeout_s: 30, tiers: {careful: {max_tokens: 64}}}")
    overrides = ["engine=transformers", "port=8123", "engines.most=4"]
    file = tmp_path / "serve.yaml"
    serve.main("pocket/teacher", overrides, str(policy), str(file))
    schema = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text()))
    assert schema.http_options is not None
    assert (schema.http_options.host, schema.http_options.port) == ("127.0.0.1", 8123)
    [application] = schema.applications
    assert (application.import_path, application.route_prefix) == ("workflows.serve:build", "/")
    # Serve makes the arguments into the type that `build` names.
    args = deployment.ServeConfig.model_validate(application.args)
    assert args.policy.tiers["careful"].max_tokens == 64
    # What reaches running gateways is what they began with.
    [gateway] = application.deployments
    assert (gateway.name, gateway.user_config) == ("Gateway", args.policy.dump())
    engine = bound(deployment.build(args), "Defended")
    assert engine._deployment_config.autoscaling_config.max_replicas == 4
    assert engine._deployment_config.graceful_shutdown_timeout_s == 30 + deployment.DRAIN_S


def test_a_written_file_names_the_store_and_does_not_open_it(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "serve.yaml"

    def written(*overrides: str, redis: str | None = None) -> dict[str, Any]:
        overrides = ("engine=transformers", *overrides)
        serve.main("pocket/teacher", list(overrides), None, str(file), redis)
        return yaml.safe_load(file.read_text())["applications"][0]["args"]

    assert written()["store"] == str(store)
    assert written("store=mine")["store"] == str(tmp_path / "mine")
    # Only the serving machine needs to reach it.
    assert written(redis="redis://db.example:6379")["redis"] == "redis://db.example:6379"
    assert written("redis=null", redis="redis://db.example:6379")["redis"] is None
    assert not store.exists()
    assert not (tmp_path / "mine").exists()


def test_with_redis_keys_and_quotas_are_there(store: Path, redis_url: str) -> None:
    redis.Redis.from_url(redis_url).flushall()
    app = deployment.build(config("engine=transformers", f"redis={redis_url}"))
    assert bound(app, "Gateway").init_args[0]["redis"] == redis_url
    stores = StoreLocation(store, redis_url)
    _, token = open_keys(stores).create("ada")
    assert open_keys(stores, must_exist=True).find(token) is not None
    assert isinstance(open_ledger(stores), RedisLedger)
    assert not (store / KEYS_FILE).exists()


def test_the_start_says_which_keys_the_policy_refuses(store: Path) -> None:
    keys = open_keys(StoreLocation(store))
    said = announced(config())
    assert "there is no key yet" in said
    keys.create("ada")
    lost, _ = keys.create("lost", tier="[bold]gold")
    ended, _ = keys.create("ended", tier="lead")
    keys.revoke(ended.id)
    said = announced(config())
    assert "no key yet" not in said
    assert [line for line in said.splitlines() if "is refused" in line] == [
        f"key {lost.id} is refused: the policy has no tier '[bold]gold'"
    ]


def announced(settings: deployment.ServeConfig) -> str:
    console = Console(file=io.StringIO(), record=True)
    serve._announce(console, settings, Point(defense="none", checkpoint="x"), 1.0)
    return console.export_text()
