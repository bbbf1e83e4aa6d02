"""Fixtures for tests of serving: real engines, gateways with their own stores, and servers.

- `engine`: the transformers engine on `pocket/teacher`, one for the whole session.
- `small_engine`: the same on `pocket/small`, whose answers are different.
- `gateway_factory()`: a gateway on `engine`, with keys, quotas and audit log in its own folder. Its
  parts can be replaced: `gateway_factory(policy, undefended=engine, name="teacher")`.
- `marked`: an engine on the same teacher with a watermark while decoding; `reference` computes its
  log-probabilities independently. Both are in `witness`.
- `guarded(policy)`: a gateway whose engines record requests, and one key per tier (in `witness`).
- `live_server(app)`: serves an application with uvicorn on a free local port and returns its
  address; `live_server(create_app(gateway_factory()))` is the whole gateway.

Keys are made with `gateway.keys.create("alice")`, which returns the record and the token.
`settled_usage(gateway)` is the ledger after the last answer has been written to it.
"""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest
import uvicorn

if TYPE_CHECKING:
    from fastapi import FastAPI
    from witness import Guarded, Reference

    from azeotrope.engine.protocol import Engine
    from azeotrope.engine.transformers import TransformersEngine
    from azeotrope.models import Loaded
    from gateway.accounts.ledger import Usage
    from gateway.policy import Policy
    from gateway.service import Gateway

START_S, STOP_S, SETTLE_S = 20.0, 10.0, 10.0
POLL_S = 0.01


class GatewayFactory(Protocol):
    def __call__(
        self,
        policy: "Policy | None" = None,
        *,
        engine: "Engine | None" = None,
        undefended: "Engine | None" = None,
        name: str = "teacher",
    ) -> "Gateway": ...


@pytest.fixture(scope="session")
def teacher() -> "Loaded":
    """The pocket teacher and its tokenizer."""
    from azeotrope import models

    return models.load("pocket/teacher", device="cpu")


@pytest.fixture(scope="session")
def engine(teacher: "Loaded") -> "Iterator[TransformersEngine]":
    """One engine for all tests: requests of several event loops may meet in it."""
    from azeotrope.engine.transformers import TransformersEngine

    engine = TransformersEngine(teacher)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def small_engine() -> "Iterator[TransformersEngine]":
    """A teacher with different answers, so that no test confuses it with `engine`."""
    from azeotrope import models
    from azeotrope.engine.transformers import TransformersEngine

    engine = TransformersEngine(models.load("pocket/small", device="cpu"))
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def marked(teacher: "Loaded") -> "Iterator[TransformersEngine]":
    """The teacher behind a decoding defense that changes nearly every log-probability."""
    from witness import WATERMARK

    from azeotrope.engine.transformers import TransformersEngine

    engine = TransformersEngine(teacher, decoding=[WATERMARK])
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def reference(teacher: "Loaded") -> "Reference":
    """Log-probabilities computed from the model, with and without the defense of `marked`."""
    from witness import Reference

    return Reference(teacher)


@pytest.fixture
def gateway_factory(
    teacher: "Loaded", engine: "Engine", tmp_path: Path
) -> Iterator[GatewayFactory]:
    """Makes gateways; see the top of this file."""
    from azeotrope import models
    from gateway.accounts.sqlite_keys import SqliteKeyStore
    from gateway.accounts.sqlite_ledger import SqliteLedger
    from gateway.admitted import Model
    from gateway.policy import Policy
    from gateway.records.audit_log import AuditLog
    from gateway.service import Gateway

    made: list[Gateway] = []
    default = engine

    def make(
        policy: Policy | None = None,
        *,
        engine: "Engine | None" = None,
        undefended: "Engine | None" = None,
        name: str = "teacher",
    ) -> Gateway:
        folder = tmp_path / f"gateway-{len(made)}"
        model = Model(
            name=name,
            tokenizer=teacher.tokenizer,
            context=models.context_length("pocket/teacher"),
            engine=engine or default,
            undefended=undefended,
        )
        made.append(
            Gateway(
                model,
                policy or Policy(),
                SqliteKeyStore(folder / "store.sqlite"),
                SqliteLedger(folder / "store.sqlite"),
                AuditLog(folder / "audit"),
            )
        )
        return made[-1]

    yield make
    for gateway in made:
        # A server that ran has closed it already, and closing twice does nothing.
        gateway.log.close()


@pytest.fixture
def guarded(
    gateway_factory: GatewayFactory, marked: "Engine", engine: "Engine"
) -> "Callable[[Policy | None], Guarded]":
    from witness import Guarded, Recording

    def make(policy: "Policy | None" = None) -> "Guarded":
        defended, undefended = Recording(marked), Recording(engine)
        gateway = gateway_factory(policy, engine=defended, undefended=undefended)
        keys = {name: gateway.keys.create(name, tier=name)[1] for name in gateway.policy.tiers}
        return Guarded(gateway, defended, undefended, keys)

    return make


@pytest.fixture
def live_server() -> Iterator[Callable[["FastAPI"], str]]:
    """Serves applications until the test ends; see the top of this file."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def serve(app: "FastAPI") -> str:
        config = uvicorn.Config(
            app, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=2
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, name="uvicorn", daemon=True)
        thread.start()
        running.append((server, thread))
        until = time.monotonic() + START_S
        while not server.started:
            assert thread.is_alive(), "the server ended while it started; its log says why"
            assert time.monotonic() < until, f"the server did not start within {START_S} s"
            time.sleep(POLL_S)
        port = server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    yield serve
    for server, _ in running:
        server.should_exit = True
    for _, thread in running:
        thread.join(STOP_S)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def settled_usage() -> "Callable[[Gateway], list[Usage]]":
    """The ledger's rows once no request is open. Settling continues after the last byte is sent."""

    def read(gateway: "Gateway") -> "list[Usage]":
        until = time.monotonic() + SETTLE_S
        while True:
            rows = gateway.ledger.usage()
            if not any(row.open_requests for row in rows):
                return rows
            assert time.monotonic() < until, f"still open after {SETTLE_S} s: {rows}"
            time.sleep(POLL_S)

    return read
