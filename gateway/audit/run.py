"""Send every known leaking request to an endpoint, from outside, and judge the answers.

The audit assumes nothing about the server: it may be a gateway of this project, a bare engine or
another proxy. The outcome of a probe is one of four:

- *held*: the probe was refused, or answered as if the leaking part were absent.
- *leaked*: the answer has more than text and a few rounded numbers, or an engine's route exists.
- *accepted*: a field that controls the engine was accepted. Its effect cannot be seen from outside,
  but a gateway should have refused it.
- *unclear*: the probe was not answered, because of load or of another error, so nothing is known.

A refusal means something only if the same request without the leaking part is answered. So the
audit first finds an ordinary request for each of the two routes, and each probe is that request
with one addition. If the key may not use a route, its probes are not sent and are unclear. Each
probe costs one short completion at most.

The probes were measured on engines or published. Carlini et al. 2024, arXiv:2403.06634, and
Finlayson et al. 2024, arXiv:2403.09539, recover a model's output space from logit biases.
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
    INVALID_KEYS,
    PROMPT,
    ROUTES,
    STREAMS,
    TEXT,
    LeakProbe,
    messages,
    probes,
    unwanted,
)
from gateway.loopback import is_loopback

REFUSED = {400, 401, 403, 404, 405, 422, 501}
MISSING = {404, 405}
BUSY = {429, 503}
UNINFORMATIVE = {429, 502, 503, 504}
"""Statuses that do not depend on the content of the request."""
TRIES = 4
MOST_WAIT_S = 60.0
"""Quotas are per minute, so a longer wait would not help."""
PATIENCE_S = 600.0
"""The most that one audit waits, for all probes together."""
TEMPERATURES = (0, 1, None)
"""Tried in turn, because some servers reject 0; None leaves the temperature to the server."""
Outcome = Literal["held", "accepted", "leaked", "unclear"]


@dataclass(frozen=True)
class ProbeResult:
    """The outcome of one probe."""

    probe: str
    outcome: Outcome
    seen: str


@dataclass
class PatientClient:
    """Sends requests, and repeats them after the wait that a busy server asks for."""

    client: httpx.Client
    key: str
    sleep: Callable[[float], None]
    patience_s: float = field(default=PATIENCE_S, init=False)

    def send(
        self, method: str, url: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        """The answer, or the last of several refusals for load.

        Args:
            headers: instead of the header with the key.
        """
        sent_headers = {"authorization": f"Bearer {self.key}"} if headers is None else dict(headers)
        answer = self.client.request(method, url, json=body, headers=sent_headers)
        for _ in range(TRIES - 1):
            wait = _retry_after(answer)
            if wait is None or wait > min(MOST_WAIT_S, self.patience_s):
                break
            self.patience_s -= wait
            self.sleep(wait)
            answer = self.client.request(method, url, json=body, headers=sent_headers)
        return answer


def _retry_after(answer: httpx.Response) -> float | None:
    """The wait in seconds that a busy server asks for; None without a number or if not busy."""
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
        url: including `/v1`.
        model: the model to request; None takes the first that the endpoint lists.
        on_done: called with the number of probes that were just finished.
        sleep: waits a number of seconds before a busy server gets the request again.

    Raises:
        ValueError: if the endpoint lists no model, or answers an ordinary request on neither of
            the two routes, so that a refusal would prove nothing.
        httpx.HTTPError: if the endpoint cannot be reached.
    """
    base = url.rstrip("/")
    own = client is None
    # A proxy of the environment cannot reach this machine's loopback interface.
    by_proxy = not is_loopback(httpx.URL(url).host)
    client = client or httpx.Client(timeout=60, trust_env=by_proxy)
    try:
        patient = PatientClient(client, key, sleep)
        name = model or _first_model(patient, base)
        results: list[ProbeResult] = []
        for result in _run(patient, base, name):
            results.append(result)
            on_done(1)
        return results
    finally:
        if own:
            client.close()


def count() -> int:
    """The number of probes of an audit."""
    return len(list(probes())) + len(ROUTES) + len(INVALID_KEYS) + len(STREAMS)


@dataclass(frozen=True)
class OrdinaryRequest:
    """A request to one of the two routes that is answered, or the reason why there is none."""

    body: dict[str, Any] | None
    """Without the prompt, which the probes add."""
    outcome: Outcome = "unclear"
    """The outcome of all probes of this route if there is no ordinary request."""
    reason: str = ""


def _run(client: PatientClient, base: str, model: str) -> Iterator[ProbeResult]:
    ordinary = {path: _ordinary_request(client, base + path, model, path) for path in (CHAT, TEXT)}
    if not any(request.body for request in ordinary.values()):
        raise ValueError(
            f"{ordinary[CHAT].reason}; so refusals of other requests would prove nothing"
        )
    for judge, group in ((_judge, probes()), (_judge_stream, STREAMS)):
        for probe in group:
            request = ordinary[probe.path]
            if request.body is None:
                yield ProbeResult(probe.name, request.outcome, request.reason)
            else:
                answer = client.send("POST", base + probe.path, {**request.body, **probe.body})
                result = judge(probe, answer)
                yield _unless_locked_out(client, base, request, probe, result, answer)
    root = base.removesuffix("/v1")
    for method, route in ROUTES:
        yield _judge_route(client, root, method, route)
    for name, headers in INVALID_KEYS:
        body = {"model": model, "messages": messages(), "max_tokens": 1}
        answer = client.send("POST", base + CHAT, body, headers)
        yield _judge_access(name, answer, {401, 403})


def _unless_locked_out(
    client: PatientClient,
    base: str,
    request: OrdinaryRequest,
    probe: LeakProbe,
    result: ProbeResult,
    answer: httpx.Response,
) -> ProbeResult:
    """The result, unless the key itself was locked out during the audit.

    A server may suspend a key because of the probes. All later refusals would then look like
    probes that held.
    """
    if answer.status_code not in {401, 403} or request.body is None:
        return result
    again = client.send("POST", base + probe.path, {**request.body, **_prompt(probe.path)})
    if again.status_code == 200:
        return result
    seen = f"the key no longer gets an ordinary answer: status {again.status_code}"
    return ProbeResult(probe.name, "unclear", seen)


def _prompt(path: str) -> dict[str, Any]:
    return {"messages": messages()} if path == CHAT else {"prompt": PROMPT}


def _ordinary_request(client: PatientClient, url: str, model: str, path: str) -> OrdinaryRequest:
    """Find an ordinary request that is answered."""
    first: httpx.Response | None = None
    for temperature in TEMPERATURES:
        body: dict[str, Any] = {"model": model, "max_tokens": 4}
        if temperature is not None:
            body["temperature"] = temperature
        answer = client.send("POST", url, {**body, **_prompt(path)})
        if answer.status_code == 200:
            return OrdinaryRequest(body)
        first = first or answer
        if answer.status_code not in {400, 422}:
            # Another temperature would not help.
            break
    assert first is not None
    reason = (
        f"an ordinary request to {path} is answered with {first.status_code}: "
        f"{' '.join(first.text[:200].split())}"
    )
    # A route that does not exist leaks nothing.
    return OrdinaryRequest(None, "held" if first.status_code in MISSING else "unclear", reason)


def _judge(probe: LeakProbe, answer: httpx.Response) -> ProbeResult:
    if answer.status_code in REFUSED:
        return ProbeResult(probe.name, "held", f"refused with {answer.status_code}")
    if answer.status_code != 200:
        return ProbeResult(probe.name, "unclear", f"status {answer.status_code}")
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        return _judge_stream(probe, answer)
    data = answer.json()
    seen = probe.leaks(data)
    # A field that reveals something is a worse result than a switch that was accepted.
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
        # A leak may come after events without one, so all events are read.
        reports = [seen for seen in (probe.leaks(event), unwanted(event)) if seen]
        accepted = accepted or ACCEPTED in reports
        leaks = [seen for seen in reports if seen != ACCEPTED]
        if leaks:
            return ProbeResult(probe.name, "leaked", leaks[0])
    if accepted:
        return ProbeResult(probe.name, "accepted", "status 200")
    if not completed:
        return ProbeResult(probe.name, "unclear", "a stream without a completion")
    return ProbeResult(probe.name, "held", "nothing but text")


def _judge_route(client: PatientClient, root: str, method: str, route: str) -> ProbeResult:
    answer = client.send(method, root + route, {} if method == "POST" else None)
    # A route that complains about an empty body exists, so 400 and 422 are leaks.
    return _judge_access(f"{method} {route}", answer, {401, 403, 404, 405})


def _judge_access(name: str, answer: httpx.Response, denied: set[int]) -> ProbeResult:
    seen = f"status {answer.status_code}"
    if answer.status_code in UNINFORMATIVE:
        return ProbeResult(name, "unclear", seen)
    return ProbeResult(name, "held" if answer.status_code in denied else "leaked", seen)


def _first_model(client: PatientClient, base: str) -> str:
    answer = client.send("GET", f"{base}/models")
    if answer.status_code != 200:
        raise ValueError(
            f"{base}/models answers with {answer.status_code}; give the address of an "
            "OpenAI-compatible endpoint, with /v1, and one of its keys"
        )
    names = [model["id"] for model in answer.json().get("data", [])]
    if not names:
        raise ValueError(f"{base}/models lists no model for this key; name one")
    return names[0]
