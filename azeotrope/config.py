"""Frozen, typed configuration: YAML for differences, `key.sub=value` overrides, no typos."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

C = TypeVar("C", bound="Config")
_TYPE_NAME = re.compile(r".*\[.*|str|int|float|bool|[A-Z]\w*")


class Config(BaseModel):
    """Base of every configuration: immutable, unknown keys refused, defaults validated too."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    def dump(self) -> dict[str, Any]:
        """Plain data that `model_validate` takes back."""
        return self.model_dump(mode="json")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message has the value and what is allowed."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that occurs twice in one mapping, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            # A merge (`<<: *name`) may be overridden by keys beside it; that is what it is for.
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} occurs twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load(kind: type[C], path: Path, overrides: Sequence[str] = ()) -> C:
    """Read a YAML file into a typed configuration.

    Raises:
        ConfigError: if the file is missing, is not a mapping, or does not fit the type.
    """
    if not path.is_file():
        raise ConfigError(f"no configuration file at {path}")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 (byte {error.start} is {error.object[error.start]:#x}); save it "
            "as UTF-8"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, got {type(data).__name__}")
    return build(kind, data, overrides, source=str(path))


def build(
    kind: type[C], data: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = ""
) -> C:
    """Apply dotted overrides to plain data, validate the result, and explain what does not fit.

    Raises:
        ConfigError: one line for each problem, with the allowed keys where a key is unknown.
    """
    # YAML reads some plain words as dates; they become words again.
    merged = json.loads(json.dumps(dict(data), default=str))
    for override in overrides:
        _start_from_default(kind, merged, override)
        _set(merged, override)
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        where = f" in {source}" if source else ""
        raise ConfigError(f"configuration{where}: {explain(error, kind)}") from None


def explain(
    error: ValidationError,
    kind: type[BaseModel] | None = None,
    *,
    whole: str = "value",
    show_values: bool = True,
) -> str:
    """One clause for each value that does not fit, joined by semicolons.

    Args:
        kind: the model that was validated; adds the allowed keys where a key is unknown.
        whole: the name of the data itself, for a problem that no single field has.
        show_values: repeat the values that were refused. False for what a stranger sent.
    """
    clauses = [
        _explain_one(kind, problem, whole, show_values)
        for problem in error.errors(include_url=False, include_context=False)
    ]
    return "; ".join(clauses)


def _explain_one(
    kind: type[BaseModel] | None, problem: ErrorDetails, whole: str, show_values: bool
) -> str:
    path = path_text(problem["loc"]) or whole
    if problem["type"] == "extra_forbidden":
        allowed = _allowed(kind, problem["loc"][:-1]) if kind else []
        hint = f"; allowed: {', '.join(allowed)}" if allowed else ""
        return f"unknown key {path!r}{hint}"
    value = problem.get("input")
    # A mapping is refused for what it lacks, so printing all of it would bury the reason.
    received = f", got {value!r}" if show_values and not isinstance(value, dict) else ""
    return f"{path}: {problem['msg']}{received}"


def path_text(location: Sequence[int | str]) -> str:
    """A path as its writer knows it, without the names pydantic gives the types of a union."""
    parts = [str(part) for part in location]
    return ".".join(part for part in parts if not _TYPE_NAME.fullmatch(part))


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits that change whenever the plain data does."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _start_from_default(kind: type[BaseModel], data: dict[str, Any], override: str) -> None:
    """If a part of a list or of a union is overridden, write its default first."""
    first, *rest = override.partition("=")[0].split(".")
    field = kind.model_fields.get(first)
    if not rest or first in data or field is None:
        return
    default = field.get_default(call_default_factory=True)
    if isinstance(default, tuple | list):
        data[first] = [entry.dump() if isinstance(entry, Config) else entry for entry in default]
    elif isinstance(default, dict):
        data[first] = dict(default)
    elif isinstance(field.discriminator, str):
        data[first] = {field.discriminator: getattr(default, field.discriminator)}


def _set(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"an override is key.sub=value, got {override!r}")
    *parents, last = key.split(".")
    node: Any = data
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            node = _entry(node, part, key)
            continue
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict | list):
            raise ConfigError(
                f"{'.'.join(parents[: depth + 1])} is a value, so {key} cannot be set"
            )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {key} is not valid YAML: {text!r}") from error
    if isinstance(node, list):
        _entry(node, last, key)
        node[int(last)] = value
    else:
        node[last] = value


def _entry(entries: list[Any], part: str, key: str) -> Any:
    if not part.isdigit() or int(part) >= len(entries):
        raise ConfigError(f"{key}: {part!r} is not an index into a list of {len(entries)}")
    return entries[int(part)]


def _allowed(kind: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """The fields of the nested model that an error's path leads to."""
    models = [kind]
    for part in path:
        if isinstance(part, int):
            continue
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if fields:
            models = [model for field in fields for model in _models_in(field.annotation)]
        else:
            # In a union this part of the path is the chosen model's name. In a mapping it is a key,
            # and the type of the mapping's values is already in `models`.
            chosen = [m for m in models if part in [f.default for f in m.model_fields.values()]]
            models = chosen or models
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for inner in getattr(annotation, "__args__", ()) for m in _models_in(inner)]
