"""Every environment variable of Azeotrope's own, with its meaning and its default."""

from pathlib import Path

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "AZEOTROPE_"


class Environment(BaseSettings):
    """The variables as they are set now; an empty variable counts as not set.

    A variable is the prefix and the field's name in capitals: `cache` is AZEOTROPE_CACHE.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True)

    home: Path = Field(
        default=Path("~/.azeotrope"),
        description="folder of API keys, quotas and logs; it must be on a local disk, because "
        "SQLite's locks are not reliable on network storage",
    )
    cache: Path = Field(
        default=Path("~/.cache/azeotrope"),
        description="folder of models that were converted once; it may be on shared storage",
    )
    data: Path | None = Field(
        default=None,
        description="folder of data sets, such as gsm8k/; if not set, `data` and `shared/data` are "
        "looked for in the working folder and above it",
    )
    key: SecretStr | None = Field(
        default=None, description="API key with which `azeotrope audit` asks an endpoint"
    )
    redis_url: SecretStr | None = Field(
        default=None,
        description="URL of a Redis for API keys and quotas that gateways on several nodes share",
    )

    @field_validator("home", "cache", "data")
    @classmethod
    def _expand(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser()


def variable(field: str) -> str:
    """The name of the environment variable behind a field of `Environment`."""
    return PREFIX + field.upper()
