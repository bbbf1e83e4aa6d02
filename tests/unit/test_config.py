"""Configuration: what is refused, how it is explained, and that plain data round-trips."""

import pickle
from pathlib import Path

import pytest
import yaml
from pydantic import Field, ValidationError

from azeotrope.config import Config, ConfigError, build, digest, load
from azeotrope.training import FitConfig


class Inner(Config):
    x: int = 1
    name: str = "a"


class Outer(Config):
    rate: float = Field(0.5, gt=0)
    inner: Inner = Inner()
    maybe: Inner | None = None
    parts: tuple[Inner, ...] = ()


def test_an_unknown_key_is_named_with_the_allowed_ones() -> None:
    message = "unknown key 'ratee'; allowed: inner, maybe, parts, rate"
    with pytest.raises(ConfigError, match=message):
        build(Outer, {"ratee": 1})


@pytest.mark.parametrize(
    ("data", "path"),
    [
        ({"inner": {"y": 1}}, "inner.y"),
        ({"maybe": {"y": 1}}, "maybe.y"),
        ({"parts": [{"x": 1}, {"y": 1}]}, "parts.1.y"),
    ],
)
def test_an_unknown_nested_key_is_named_with_the_keys_of_its_level(data, path) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Outer, data)
    assert f"unknown key {path!r}; allowed: name, x" in str(caught.value)


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        build(Outer, {"rate": -1, "inner": {"x": "many"}}, source="some.yaml")
    message = str(caught.value)
    assert "in some.yaml" in message
    assert "rate: " in message
    assert "got -1" in message
    assert "inner.x: " in message
    assert "got 'many'" in message


def test_overrides_reach_nested_keys_lists_and_absent_parents() -> None:
    given = {"parts": [{"x": 1}, {"x": 2}]}
    found = build(Outer, given, ["inner.x=3", "parts.1.x=7", "maybe.name=b", "rate=1e-3"])
    assert found == Outer(
        rate=0.001, inner=Inner(x=3), maybe=Inner(name="b"), parts=(Inner(x=1), Inner(x=7))
    )
    assert given == {"parts": [{"x": 1}, {"x": 2}]}, "the caller's data must not change"
    assert build(Outer, {}, ["parts=[{x: 4}]"]).parts == (Inner(x=4),)
    assert build(Outer, {"maybe": {"x": 1}}, ["maybe=null"]).maybe is None
    assert build(Outer, {}, ["parts=[{x: 1}]", "parts.0={x: 9}"]).parts == (Inner(x=9),)


def test_the_last_override_wins_and_a_value_may_hold_an_equals_sign() -> None:
    found = build(Outer, {}, ["inner.x=1", "inner.x=2", "inner.name=a=b"])
    assert found.inner == Inner(x=2, name="a=b")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rate", "an override is key.sub=value, got 'rate'"),
        ("=3", "an override is key.sub=value"),
        ("rate.sub=1", "rate is a value, so rate.sub cannot be set"),
        ("parts.2.x=1", "'2' is not an index into a list of 1"),
        ("parts.first.x=1", "'first' is not an index into a list of 1"),
        ("parts.5=1", "'5' is not an index into a list of 1"),
        ("inner.y=1", "unknown key 'inner.y'; allowed: name, x"),
        ("inner.x=[1", "inner.x"),
    ],
)
def test_an_override_that_cannot_be_applied_is_explained(override: str, message: str) -> None:
    data = {"parts": [{"x": 1}], "rate": 1.0}
    with pytest.raises(ConfigError) as caught:
        build(Outer, data, [override])
    assert message in str(caught.value)


def test_defaults_are_validated_and_values_are_frozen() -> None:
    class Wrong(Config):
        x: int = Field(0, ge=1)

    with pytest.raises(ConfigError, match=r"x: .*got 0"):
        build(Wrong, {})
    with pytest.raises(ValidationError, match="frozen"):
        Outer().rate = 2.0  # type: ignore[misc]


def test_yaml_and_plain_data_round_trip(tmp_path) -> None:
    config = Outer(rate=0.25, maybe=Inner(x=5), parts=(Inner(), Inner(name="z")))
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.dump()))
    assert load(Outer, path) == config
    assert load(Outer, path, ["rate=0.5"]).rate == 0.5
    assert Outer.model_validate(config.dump()) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_files_that_cannot_be_read_are_explained(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match=r"no configuration file at .*run\.yaml"):
        load(Outer, path)
    path.write_text("rate: [1")
    with pytest.raises(ConfigError, match=r"run\.yaml is not valid YAML"):
        load(Outer, path)
    path.write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match="must hold a mapping of keys, got list"):
        load(Outer, path)
    # YAML reads this as a date, which is no plain data.
    path.write_text("inner: {name: 2026-01-31}")
    assert load(Outer, path).inner.name == "2026-01-31"


def test_the_digest_is_stable_and_changes_with_every_value() -> None:
    # sha256 of {"a":1,"b":[1,2]}, first sixteen digits: stages on disk are named by it.
    assert digest({"a": 1, "b": [1, 2]}) == "8baa73198470c7bb"
    assert digest({"b": [1, 2], "a": 1}) == digest({"a": 1, "b": [1, 2]})
    values = [{}, {"b": 1}, [1, 2], [2, 1], *({"a": a} for a in (1, 1.5, "1", [1], None, True))]
    assert len({digest(value) for value in values}) == len(values)
    with pytest.raises(ValueError, match="JSON"):
        digest({"a": float("nan")})


def test_a_key_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("steps: 3\nsteps: 4\n")
    with pytest.raises(ConfigError, match="the key 'steps' occurs twice"):
        load(FitConfig, path)
    path.write_text("base: &base {steps: 3}\n")
    with pytest.raises(ConfigError, match="base"):
        load(FitConfig, path)


def test_a_file_in_latin_1_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("schedule: lin\xe9aire\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"is not UTF-8 \(byte 13 is 0xe9\); save it as UTF-8"):
        load(FitConfig, path)
