"""What cannot be served is refused in one line, before anything starts."""

import socket

import pytest

from azeotrope.config import ConfigError
from azeotrope.config import build as build_config
from workflows import serve


def config(*overrides: str) -> serve.ServeConfig:
    return build_config(serve.ServeConfig, {"source": "pocket/teacher"}, list(overrides))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["demo=true", "host=0.0.0.0"], "loopback"),
        (["engines.least=3", "engines.most=2"], "less than least"),
        (["ports=1"], "ports"),
    ],
)
def test_contradictions_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(*overrides)


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="take another with port="):
            serve._check_network(config(f"port={taken.getsockname()[1]}"))


def test_a_bare_checkpoint_names_no_undefended_teacher() -> None:
    with pytest.raises(ConfigError, match="undefended=PATH"):
        serve.build(config("undefended=teacher"))
