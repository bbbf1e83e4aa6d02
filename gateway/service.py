"""One gateway replica: who asks, what they may have, what it costs, and how it is answered.

A request passes these stations in this order, and nothing dear is done before it has passed the
last: key, body, model, tier, suspicion, quota, engine. Whatever fails refuses the request; there is
no way around a station that cannot be asked.
"""

import asyncio
import contextlib
import hmac
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

from azeotrope.engine.protocol import Engine, EngineBusyError, EngineError, EngineRequest
from azeotrope.logits.vocabulary import token_rows
from azeotrope.tokens import Boundary
from gateway.accounts.callers import Callers, no_key
from gateway.accounts.key_records import UNDEFENDED, KeyRecord
from gateway.accounts.keys import KeyStore
from gateway.accounts.ledger import Ledger, Reservation
from gateway.accounts.open_requests import OpenRequests
from gateway.accounts.quotas import Limits, Refusal, Standing
from gateway.admitted import Admitted, Model
from gateway.answers import answering, beginning
from gateway.answers.writing import Writer
from gateway.errors import ApiError
from gateway.extraction.suspicion import Suspicion
from gateway.http.requests import ChatRequest, Sampled, parse
from gateway.http.responses import ChatFormat, CompletionFormat, Numbers, Said
from gateway.metrics import Metrics
from gateway.plan import Plan, plan
from gateway.policy import Policy, Tier
from gateway.records.audit_log import AuditLog
from gateway.refusals import crowded, over_quota, overloaded, rate_headers

logger = logging.getLogger(__name__)
BODY_S = 10.0
"""In which a request's body must be here."""


class Gateway:
    """All that a replica knows. Its methods run on one event loop.

    Args:
        ready: says whether the engines can answer; asked by the readiness probe.
    """

    def __init__(
        self,
        model: Model,
        policy: Policy,
        keys: KeyStore,
        ledger: Ledger,
        log: AuditLog,
        *,
        metrics: Metrics | None = None,
        ready: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        self.model, self.policy, self.keys, self.ledger, self.log = model, policy, keys, ledger, log
        self.metrics = metrics or Metrics()
        self.open = OpenRequests(ledger)
        self._suspicion = Suspicion(policy.extraction, log, self.metrics)
        self._ready = ready
        self._vocabulary = token_rows(model.tokenizer)
        self._secret = keys.secret()
        self._callers = Callers(keys, self.metrics)
        self._arriving: Counter[str] = Counter()

    def apply(self, policy: Policy) -> None:
        """New rules, for requests from now on."""
        self.policy = policy
        self._callers.forget_warnings()
        self._suspicion.rules = policy.extraction

    # Who asks ----------------------------------------------------------------------------

    async def authenticate(
        self, headers: Mapping[str, str], feature: str | None = None
    ) -> KeyRecord:
        """The key behind a request.

        Raises:
            ApiError: 401 for a key that is missing, unknown, revoked or expired, in the same words
                for all; 403 for one that may not use this endpoint.
        """
        return await self._callers.identify(headers, self.policy.tiers, feature)

    def models(self, key: KeyRecord) -> list[str]:
        """The names a key can ask for. Nobody else learns that there is an undefended model."""
        names = [self.model.name]
        if key.licence == "distillation" and self.model.undefended is not None:
            names.append(self.model.name + UNDEFENDED)
        return [name for name in names if not key.models or name in key.models]

    def _engine(self, key: KeyRecord, name: str) -> Engine:
        if name not in self.models(key):
            raise ApiError(
                404,
                f"no model {name[:80]!r} for this key; there is {', '.join(self.models(key))}",
                param="model",
                code="model_not_found",
            )
        if name == self.model.name:
            return self.model.engine
        # Asked twice, so that one slip in the list of names is not enough.
        if key.licence != "distillation" or self.model.undefended is None:
            raise ApiError(403, "this key has no such licence", kind="permission_error")
        return self.model.undefended

    def _tier(self, key: KeyRecord) -> Tier:
        # The policy may have changed since the key was looked at.
        if key.tier not in self.policy.tiers:
            raise no_key()
        return self.policy.tiers[key.tier]

    # What they may have ------------------------------------------------------------------

    async def admit(
        self,
        kind: type[Sampled],
        headers: Mapping[str, str],
        read: Callable[[int], Awaitable[bytes]],
        address: str = "",
    ) -> Admitted:
        """Let a request through every station before the engine.

        Args:
            read: gives the body, and raises ApiError if it has more than so many bytes.
            address: of the client, for the score of extraction patterns.

        Raises:
            ApiError: with the reason, in OpenAI's shape.
        """
        key = await self.authenticate(headers, "chat" if kind is ChatRequest else "completions")
        if len(self.open) + self._arriving.total() >= self.policy.in_flight:
            self.metrics.refused("load")
            raise overloaded()
        # One key alone must not fill the door with bodies that do not come.
        if self._arriving[key.account] >= self._tier(key).concurrency:
            self.metrics.refused("quota")
            raise crowded()
        self._arriving[key.account] += 1
        try:
            request = parse(kind, await self._body(read))
            engine = self._engine(key, request.model)
            try:
                planned = await self.plan(key, request)
            except ApiError:
                self._suspicion.see(key, request, headers, address)
                raise
            self._suspicion.see(key, request, headers, address, planned=planned)
            return await self.reserve(key, request, planned, engine)
        except ApiError as error:
            self.log.write(
                *(key.id, "refused"),
                account=key.account,
                status=error.status,
                code=error.code or error.param,
            )
            raise
        finally:
            self._arriving -= Counter([key.account])

    async def _body(self, read: Callable[[int], Awaitable[bytes]]) -> bytes:
        # A place is held meanwhile, and whoever sends a byte a minute would hold many.
        try:
            async with asyncio.timeout(BODY_S):
                return await read(self.policy.most_bytes)
        except TimeoutError:
            message = f"the body did not arrive within {BODY_S:g} seconds"
            raise ApiError(408, message, code="timeout") from None

    async def plan(self, key: KeyRecord, request: Sampled) -> Plan:
        """What the engine will be asked, by the rules of the key's tier.

        Raises:
            ApiError: 400 for what the tier does not allow.
        """
        # Long prompts take a while to tokenize, and other streams go on meanwhile.
        return await asyncio.to_thread(
            plan,
            request,
            self._tier(key),
            self.model.tokenizer,
            identity=secrets.token_hex(12),
            context=self.model.context,
            vocabulary=self._vocabulary,
            seed_key=hmac.digest(self._secret, key.account.encode(), "sha256"),
            watermark_key=key.watermark_key,
        )

    async def reserve(
        self, key: KeyRecord, request: Sampled, planned: Plan, engine: Engine
    ) -> Admitted:
        """Reserve the most that a request can cost.

        Raises:
            ApiError: 429 with Retry-After and the limits.
        """
        tier = self._tier(key)
        undefended = engine is not self.model.engine
        # First of all: what cannot be written down is not answered.
        self._write(key, "asked", planned, undefended=undefended)
        reservation = Reservation(
            # What a licence takes has a quota and a line in the books of its own.
            key=key.account + UNDEFENDED if undefended else key.account,
            request=planned.identity,
            prompt=planned.prompt_tokens,
            completion=planned.completion_tokens,
            slots=len(planned.requests),
        )
        limits = Limits.of(tier, self._suspicion.share(key.account))
        found = await self.open.reserve(reservation, limits)
        if isinstance(found, Refusal):
            self.metrics.refused("quota")
            raise over_quota(found)
        return self._admitted(key, tier, request, planned, engine, undefended, found)

    def _admitted(
        self,
        key: KeyRecord,
        tier: Tier,
        request: Sampled,
        planned: Plan,
        engine: Engine,
        undefended: bool,
        standing: Standing,
    ) -> Admitted:
        chat = isinstance(request, ChatRequest)
        shown = request.asked_logprobs is not None
        return Admitted(
            id=planned.identity,
            key=key,
            tier=tier,
            plan=planned,
            engine=engine,
            undefended=undefended,
            format=(ChatFormat if chat else CompletionFormat)(
                f"{'chatcmpl' if chat else 'cmpl'}-{planned.identity}",
                request.model,
                Numbers(self.model.tokenizer, tier.decimals) if shown else None,
            ),
            stream=bool(request.stream),
            wants_usage=request.wants_usage,
            stops=request.stops,
            headers={"x-request-id": planned.identity, **rate_headers(standing)},
            deadline=asyncio.get_running_loop().time() + self.policy.timeout_s,
        )

    # How it is answered ------------------------------------------------------------------

    async def answer(self, admitted: Admitted) -> AsyncGenerator[tuple[int, Said]]:
        """Pieces of all completions of a request, as they are written; settles at its end.

        Raises:
            ApiError: 503 if the engine fails or takes too long.
        """
        started: float | None = time.perf_counter()
        try:
            parts = self._parts(admitted)
            async with contextlib.aclosing(answering.merge(parts)) as pieces:
                async for number, said in pieces:
                    if started is not None:
                        self.metrics.first_token(time.perf_counter() - started)
                        started = None
                    yield number, said
            self.metrics.answered(admitted.key.tier)
        except TimeoutError:
            raise overloaded("the answer took too long", "timeout") from None
        except EngineBusyError:
            self.metrics.refused("load")
            raise overloaded() from None
        except EngineError as error:
            self.metrics.refused("engine")
            logger.warning("request %s: the engine failed: %s", admitted.id, error)
            raise overloaded("the engine failed; try again", "engine_error") from None
        finally:
            self._settle(admitted)

    def _parts(self, admitted: Admitted) -> list[AsyncGenerator[Said]]:
        model, requests = self.model, admitted.plan.requests
        # Completions of one prompt begin alike, and a prompt may be long; all have the same bans.
        prompts = {item.prompt for item in requests}
        openings = {prompt: self._opening(admitted.tier, prompt) for prompt in prompts}
        judged = beginning.without_pattern(model.tokenizer, requests[0].banned, model.boundary)
        return [self._complete(admitted, item, openings[item.prompt], judged) for item in requests]

    def _opening(self, tier: Tier, prompt: tuple[int, ...]) -> str:
        if tier.reasoning == "shown" and not self.model.rewriting:
            return ""
        return beginning.opening_of_ids(self.model.tokenizer, prompt, self.model.boundary)

    def _complete(
        self, admitted: Admitted, request: EngineRequest, opening: str, judged: Boundary
    ) -> AsyncGenerator[Said]:
        model, mode = self.model, admitted.tier.reasoning
        whole = bool(model.rewriting) and not admitted.undefended
        writer = Writer(
            model.tokenizer,
            () if whole else admitted.stops,
            "shown" if whole else mode,
            boundary=judged,
            opening=opening,
        )
        pieces = answering.complete(
            admitted.engine,
            request,
            writer,
            deadline=admitted.deadline,
            on_tokens=lambda tokens: self.open.add(admitted.id, tokens),
        )
        if not whole:
            return pieces
        return answering.rewritten(
            pieces,
            model.rewriting,
            model.boundary,
            mode,
            admitted.stops,
            opening=opening,
            judged=judged,
        )

    def written(self, admitted: Admitted) -> int:
        """Completion tokens of a request so far, of all its completions together."""
        return self.open.written(admitted.id)

    def _settle(self, admitted: Admitted) -> None:
        tokens = self.open.settle(admitted.id)
        if tokens is None:
            return
        self.metrics.tokens(admitted.plan.prompt_tokens, tokens, undefended=admitted.undefended)
        event = "licence" if admitted.undefended else "request"
        self._write(
            admitted.key, event, admitted.plan, undefended=admitted.undefended, written=tokens
        )

    def _write(
        self,
        key: KeyRecord,
        event: str,
        planned: Plan,
        *,
        undefended: bool,
        written: int | None = None,
    ) -> None:
        self.log.write(
            key.id,
            event,
            account=key.account,
            request=planned.identity,
            prompt_tokens=planned.prompt_tokens,
            completion_tokens=written,
            undefended=undefended,
        )

    # Upkeep ------------------------------------------------------------------------------

    async def is_ready(self) -> bool:
        """Whether a request could be answered now: keys, ledger and engine can be asked."""
        try:
            await asyncio.to_thread(self.keys.find, "az-nobody")
            await asyncio.to_thread(self.ledger.sweep)
            await asyncio.to_thread(self.log.check)
            return self._ready is None or await self._ready()
        except Exception as error:
            logger.warning("not ready: %s", error)
            return False

    async def close(self) -> None:
        """Write the bills that are due, and close the log."""
        await self.open.close()
        self.log.close()
