"""Ask an endpoint everything that is known to leak, from outside, and judge what comes back.

Nothing is assumed of the server: a gateway of this project, a bare engine, somebody else's proxy.
A probe is *held* if it was refused, or answered as if the leaking part were not there; it *leaks*
if the answer shows more than text and a few rounded numbers, or if an engine's route is there. A
switch of the engine that was *accepted* may or may not act; a gateway should have refused it. About
a probe that was not answered, for load or for another fault, nothing is known: it is *unclear*.
Each probe costs one short completion at most.

A refusal says something only if the same request without the leaking part is answered. So an
ordinary request comes first on each of the two routes, and probes are that request and one thing
more. Where a key may not use a route its probes are not sent, and are unclear.

What is probed was measured on engines, or published: Carlini et al. 2024, arXiv:2403.06634, and
Finlayson et al. 2024, arXiv:2403.09539, read a model's output space off logit biases.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from gateway.audit.probes import (
    ACCEPTED,
    CHAT,
    PROMPT,
    ROUTES,
    STRANGERS,
    STREAMS,
    TEXT,
    LeakProbe,
    messages,
    probes,
    unwanted,
)

REFUSED = {400, 401, 403, 404, 405, 422, 501}
MISSING = {404, 405}
BUSY = {429, 503}
SILENT = {429, 502, 503, 504}
"""Statuses that say nothing about what was asked."""
TRIES = 4
MOST_WAIT_S = 60.0
"""Quotas are by the minute; a server that wants a longer wait is not waited for."""
PATIENCE_S = 600.0
"""Waits of one audit together."""
TEMPERATURES = (0, 1, None)
"""Tried in turn, for some servers allow no temperature of 0; None leaves it to the server."""
Outcome = Literal["held", "accepted", "leaked", "unclear"]


@dataclass(frozen=True)
class ProbeResult:
    """What one probe found."""

    probe: str
    outcome: Outcome
    seen: str


@dataclass
class Asker:
    """Sends requests, and waits where a busy server says for how long."""

    client: httpx.Client
    key: str
    sleep: Callable[[float], None]
    patience_s: float = field(default=PATIENCE_S, init=False)

    def ask(
        self, method: str, url: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        """The answer, or the last of a few refusals for load.

        Args:
            headers: None sends the key.
        """
        sent = {"authorization": f"Bearer {self.key}"} if headers is None else dict(headers)
        answer = self.client.request(method, url, json=body, headers=sent)
        for _ in range(TRIES - 1):
            wait = _retry_after(answer)
            if wait is None or wait > min(MOST_WAIT_S, self.patience_s):
                break
            self.patience_s -= wait
            self.sleep(wait)
            answer = self.client.request(method, url, json=body, headers=sent)
        return answer


def _retry_after(answer: httpx.Response) -> float | None:
    """Seconds that a busy server asks for; None if it is not busy, or says no number."""
    if answer.status_code not in BUSY:
        return None
    try:
        wait = float(answer.headers.get("retry-after", ""))
    except ValueError:
        return None
    return wait if wait >= 0 else None


def audit(
    url: str,
    key: str,
    *,
    model: str | None = None,
    client: httpx.Client | None = None,
    on_done: Callable[[int], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
) -> list[ProbeResult]:
    """Run every probe against an OpenAI-compatible endpoint.

    Args:
        url: up to and with `/v1`.
        model: the name to ask for; None takes the first that the endpoint lists.
        sleep: waits so many seconds before a busy server is asked again.

    Raises:
        ValueError: if the endpoint does not answer an ordinary request on any of the two routes,
            for then nothing can be said about it.
    """
    base = url.rstrip("/")
    own = client is None
    client = client or httpx.Client(timeout=60)
    try:
        asker = Asker(client, key, sleep)
        name = model or _first_model(asker, base)
        found: list[ProbeResult] = []
        for finding in _run(asker, base, name):
            found.append(finding)
            on_done(1)
        return found
    finally:
        if own:
            client.close()


def count() -> int:
    """How many probes there are."""
    return len(list(probes())) + len(ROUTES) + len(STRANGERS) + len(STREAMS)


@dataclass(frozen=True)
class Way:
    """One of the two routes: what an ordinary request is there, or why there is none."""

    body: dict[str, Any] | None
    """Without the words, which are the probe's."""
    outcome: Outcome = "unclear"
    """Of all its probes, if there is no ordinary request."""
    why: str = ""


def _run(asker: Asker, base: str, model: str) -> Iterator[ProbeResult]:
    ways = {path: _way(asker, base + path, model, path) for path in (CHAT, TEXT)}
    if not any(way.body for way in ways.values()):
        raise ValueError(f"{ways[CHAT].why}; nothing can be said about requests that are not")
    for judge, asked in ((_judge, probes()), (_judge_stream, STREAMS)):
        for probe in asked:
            way = ways[probe.path]
            if way.body is None:
                yield ProbeResult(probe.name, way.outcome, way.why)
            else:
                answer = asker.ask("POST", base + probe.path, {**way.body, **probe.body})
                yield _if_served(asker, base, way, probe, judge(probe, answer), answer)
    root = base.removesuffix("/v1")
    for method, route in ROUTES:
        yield _judge_route(asker, root, method, route)
    for name, headers in STRANGERS:
        body = {"model": model, "messages": messages(), "max_tokens": 1}
        answer = asker.ask("POST", base + CHAT, body, headers)
        yield _judge_door(name, answer, {401, 403})


def _if_served(
    asker: Asker, base: str, way: Way, probe: LeakProbe, found: ProbeResult, answer: httpx.Response
) -> ProbeResult:
    """What was found, unless the key itself was shut out in the middle of the audit."""
    if answer.status_code not in {401, 403} or way.body is None:
        return found
    again = asker.ask("POST", base + probe.path, {**way.body, **_words(probe.path)})
    if again.status_code == 200:
        return found
    seen = f"the key gets no ordinary answer any more: status {again.status_code}"
    return ProbeResult(probe.name, "unclear", seen)


def _words(path: str) -> dict[str, Any]:
    return {"messages": messages()} if path == CHAT else {"prompt": PROMPT}


def _way(asker: Asker, url: str, model: str, path: str) -> Way:
    """Find an ordinary request that is answered."""
    first: httpx.Response | None = None
    for temperature in TEMPERATURES:
        body: dict[str, Any] = {"model": model, "max_tokens": 4}
        if temperature is not None:
            body["temperature"] = temperature
        answer = asker.ask("POST", url, {**body, **_words(path)})
        if answer.status_code == 200:
            return Way(body)
        first = first or answer
        if answer.status_code not in {400, 422}:
            # Another temperature would not help.
            break
    assert first is not None
    why = (
        f"an ordinary request to {path} is answered with {first.status_code}: "
        f"{' '.join(first.text[:200].split())}"
    )
    # What is not there leaks nothing.
    return Way(None, "held" if first.status_code in MISSING else "unclear", why)


def _judge(probe: LeakProbe, answer: httpx.Response) -> ProbeResult:
    if answer.status_code in REFUSED:
        return ProbeResult(probe.name, "held", f"refused with {answer.status_code}")
    if answer.status_code != 200:
        return ProbeResult(probe.name, "unclear", f"status {answer.status_code}")
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        return _judge_stream(probe, answer)
    data = answer.json()
    seen = probe.leaks(data)
    # A field that shows something says more than that a switch was taken.
    if not seen or seen == ACCEPTED:
        seen = unwanted(data) or seen
    if seen == ACCEPTED:
        return ProbeResult(probe.name, "accepted", "status 200")
    if not seen and not data.get("choices"):
        return ProbeResult(probe.name, "unclear", "status 200, but no completion")
    return ProbeResult(probe.name, "leaked" if seen else "held", seen or "answered without it")


def _judge_stream(probe: LeakProbe, answer: httpx.Response) -> ProbeResult:
    if answer.status_code in REFUSED:
        return ProbeResult(probe.name, "held", f"refused with {answer.status_code}")
    if answer.status_code != 200:
        return ProbeResult(probe.name, "unclear", f"status {answer.status_code}")
    accepted = completed = False
    for line in answer.text.splitlines():
        if not line.startswith("data: {"):
            continue
        event = json.loads(line.removeprefix("data: "))
        completed = completed or bool(event.get("choices"))
        # A leak may come after events that show none.
        shown = [seen for seen in (probe.leaks(event), unwanted(event)) if seen]
        accepted = accepted or ACCEPTED in shown
        leaks = [seen for seen in shown if seen != ACCEPTED]
        if leaks:
            return ProbeResult(probe.name, "leaked", leaks[0])
    if accepted:
        return ProbeResult(probe.name, "accepted", "status 200")
    if not completed:
        return ProbeResult(probe.name, "unclear", "a stream without a completion")
    return ProbeResult(probe.name, "held", "nothing but text")


def _judge_route(asker: Asker, root: str, method: str, route: str) -> ProbeResult:
    answer = asker.ask(method, root + route, {} if method == "POST" else None)
    # A route that finds fault with an empty body is there.
    return _judge_door(f"{method} {route}", answer, {401, 403, 404, 405})


def _judge_door(name: str, answer: httpx.Response, shut: set[int]) -> ProbeResult:
    seen = f"status {answer.status_code}"
    if answer.status_code in SILENT:
        return ProbeResult(name, "unclear", seen)
    return ProbeResult(name, "held" if answer.status_code in shut else "leaked", seen)


def _first_model(asker: Asker, base: str) -> str:
    answer = asker.ask("GET", f"{base}/models")
    if answer.status_code != 200:
        raise ValueError(
            f"{base}/models answers with {answer.status_code}; is that the address of an "
            "OpenAI-compatible endpoint, with /v1, and the key one of its keys?"
        )
    names = [item["id"] for item in answer.json().get("data", [])]
    if not names:
        raise ValueError(f"{base}/models lists no model for this key; name one")
    return names[0]
