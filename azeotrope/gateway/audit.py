"""Ask an endpoint everything that is known to leak, from outside, and judge what comes back.

Nothing is assumed of the server: a gateway of this project, a bare engine, somebody else's proxy.
A probe is *held* if it was refused, or answered as if the leaking part were not there; it *leaks*
if the answer shows more than text and a few rounded numbers, or if an engine's route is there. A
switch of the engine that was *accepted* may or may not act; a gateway should have refused it. Each
probe costs one short completion at most.

What is probed was measured on engines, or published: Carlini et al. 2024, arXiv:2403.06634, and
Finlayson et al. 2024, arXiv:2403.09539, read a model's output space off logit biases.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from azeotrope.gateway.probes import (
    ACCEPTED,
    CHAT,
    ROUTES,
    STRANGERS,
    STREAMS,
    Probe,
    messages,
    probes,
    unwanted,
)

REFUSED = {400, 401, 403, 404, 405, 422, 501}
Outcome = Literal["held", "accepted", "leaked", "unclear"]


@dataclass(frozen=True)
class Finding:
    """What one probe found."""

    probe: str
    outcome: Outcome
    seen: str


def audit(
    url: str,
    key: str,
    *,
    model: str | None = None,
    client: httpx.Client | None = None,
    on_done: Callable[[int], None] = lambda _: None,
) -> list[Finding]:
    """Run every probe against an OpenAI-compatible endpoint.

    Args:
        url: up to and with `/v1`.
        model: the name to ask for; None takes the first that the endpoint lists.

    Raises:
        ValueError: if the endpoint does not answer an ordinary request, for then nothing can be
            said about it.
    """
    base = url.rstrip("/")
    own = client is None
    client = client or httpx.Client(timeout=60)
    try:
        name = model or _first_model(client, base, key)
        _ordinary(client, base, key, name)
        found: list[Finding] = []
        for finding in _run(client, base, key, name):
            found.append(finding)
            on_done(1)
        return found
    finally:
        if own:
            client.close()


def count() -> int:
    """How many probes there are."""
    return len(list(probes())) + len(ROUTES) + len(STRANGERS) + len(STREAMS)


def _run(client: httpx.Client, base: str, key: str, model: str) -> Iterator[Finding]:
    for probe in probes():
        yield _judge(probe, _send(client, base + probe.path, key, _body(probe, model)))
    for probe in STREAMS:
        yield _judge_stream(probe, _send(client, base + probe.path, key, _body(probe, model)))
    root = base.removesuffix("/v1")
    for method, route in ROUTES:
        yield _judge_route(client, root, key, method, route)
    for name, headers in STRANGERS:
        body = {"model": model, "messages": messages(), "max_tokens": 1}
        answer = client.post(base + CHAT, json=body, headers=headers)
        held = answer.status_code in {401, 403}
        yield Finding(name, "held" if held else "leaked", f"status {answer.status_code}")


def _body(probe: Probe, model: str) -> dict[str, Any]:
    return {"model": model, "max_tokens": 4, "temperature": 0, **probe.body}


def _send(client: httpx.Client, url: str, key: str, body: dict[str, Any]) -> httpx.Response:
    return client.post(url, json=body, headers={"authorization": f"Bearer {key}"})


def _judge(probe: Probe, answer: httpx.Response) -> Finding:
    if answer.status_code in REFUSED:
        return Finding(probe.name, "held", f"refused with {answer.status_code}")
    if answer.status_code != 200:
        return Finding(probe.name, "unclear", f"status {answer.status_code}")
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        return _judge_stream(probe, answer)
    data = answer.json()
    seen = probe.leaks(data)
    # A field that shows something says more than that a switch was taken.
    if not seen or seen == ACCEPTED:
        seen = unwanted(data) or seen
    if seen == ACCEPTED:
        return Finding(probe.name, "accepted", "status 200")
    return Finding(probe.name, "leaked" if seen else "held", seen or "answered without it")


def _judge_stream(probe: Probe, answer: httpx.Response) -> Finding:
    if answer.status_code in REFUSED:
        return Finding(probe.name, "held", f"refused with {answer.status_code}")
    if answer.status_code != 200:
        return Finding(probe.name, "unclear", f"status {answer.status_code}")
    accepted = False
    for line in answer.text.splitlines():
        if not line.startswith("data: {"):
            continue
        event = json.loads(line.removeprefix("data: "))
        # A leak may come after events that show none.
        shown = [seen for seen in (probe.leaks(event), unwanted(event)) if seen]
        accepted = accepted or ACCEPTED in shown
        leaks = [seen for seen in shown if seen != ACCEPTED]
        if leaks:
            return Finding(probe.name, "leaked", leaks[0])
    if accepted:
        return Finding(probe.name, "accepted", "status 200")
    return Finding(probe.name, "held", "nothing but text")


def _judge_route(client: httpx.Client, root: str, key: str, method: str, route: str) -> Finding:
    body = {} if method == "POST" else None
    headers = {"authorization": f"Bearer {key}"}
    answer = client.request(method, root + route, json=body, headers=headers)
    # A route that finds fault with an empty body is there.
    held = answer.status_code in {401, 403, 404, 405}
    return Finding(
        f"{method} {route}", "held" if held else "leaked", f"status {answer.status_code}"
    )


def _first_model(client: httpx.Client, base: str, key: str) -> str:
    answer = client.get(f"{base}/models", headers={"authorization": f"Bearer {key}"})
    if answer.status_code != 200:
        raise ValueError(
            f"{base}/models answers with {answer.status_code}; is that the address of an "
            "OpenAI-compatible endpoint, with /v1, and the key one of its keys?"
        )
    names = [item["id"] for item in answer.json().get("data", [])]
    if not names:
        raise ValueError(f"{base}/models lists no model for this key; name one")
    return names[0]


def _ordinary(client: httpx.Client, base: str, key: str, model: str) -> None:
    body = {"model": model, "messages": messages(), "max_tokens": 4}
    answer = _send(client, base + CHAT, key, body)
    if answer.status_code != 200:
        raise ValueError(
            f"an ordinary request is answered with {answer.status_code}: {answer.text[:200]}; "
            "nothing can be said about requests that are not"
        )
