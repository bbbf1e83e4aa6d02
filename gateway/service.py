"""One gateway replica: authenticates, checks, reserves, answers and bills requests.

A request passes these checks in this order: key, load, body, model, tier, extraction score, quota.
The engine, which is the expensive part, comes after all of them. A check that fails refuses the
request, and so does a check that cannot be made because its store is unavailable.
"""

import asyncio
import contextlib
import hmac
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

from azeotrope.engine.protocol import Engine, EngineBusyError, EngineError
from azeotrope.logits.vocabulary import token_rows
from gateway.accounts.callers import Callers, no_key
from gateway.accounts.key_records import UNDEFENDED, KeyRecord
from gateway.accounts.keys import KeyStore
from gateway.accounts.ledger import Ledger, Reservation
from gateway.accounts.open_requests import OpenRequests
from gateway.accounts.quotas import Limits, Refusal
from gateway.admitted import Admitted, Model
from gateway.answers import answering
from gateway.answers.pieces import AnswerPiece
from gateway.errors import ApiError
from gateway.extraction.suspicion import Suspicion
from gateway.http.requests import ApiRequest, ChatRequest, parse
from gateway.http.responses import AnswerFormat, ChatFormat, CompletionFormat, LogprobFormat
from gateway.metrics import Metrics
from gateway.plan import ModelLimits, Plan, plan
from gateway.policy import Policy, Tier
from gateway.records.audit_log import AuditLog
from gateway.refusals import crowded, over_quota, overloaded, rate_headers

logger = logging.getLogger(__name__)
BODY_S = 10.0
"""A request's body must arrive within this time."""


class Gateway:
    """The state of one replica. Its methods run on one event loop.

    Args:
        ready: tells whether the engines can answer, for the readiness check.
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
        self._limits = ModelLimits(model.tokenizer, model.context, token_rows(model.tokenizer))
        self._secret = keys.secret()
        self._callers = Callers(keys, self.metrics)
        self._arriving: Counter[str] = Counter()

    def apply(self, policy: Policy) -> None:
        """Use new rules for all requests from now on; requests that were admitted keep theirs."""
        self.policy = policy
        self._callers.forget_warnings()
        self._suspicion.rules = policy.extraction

    async def authenticate(
        self, headers: Mapping[str, str], feature: str | None = None
    ) -> KeyRecord:
        """The key of a request.

        Args:
            feature: the endpoint's; None needs no permission.

        Raises:
            ApiError: 401 for a key that is missing, unknown, revoked or expired, in the same words
                for all; 403 for one that may not use this endpoint.
        """
        return await self._callers.identify(headers, self.policy.tiers, feature)

    def models(self, key: KeyRecord) -> list[str]:
        """The models that a key may request. Other keys do not learn of an undefended model."""
        names = [self.model.name]
        if key.licence == "distillation" and self.model.undefended is not None:
            names.append(self.model.name + UNDEFENDED)
        return [name for name in names if not key.models or name in key.models]

    def _engine(self, key: KeyRecord, name: str) -> Engine:
        if name not in self.models(key):
            raise ApiError(
                404,
                f"no model {name[:80]!r} for this key; it may use {', '.join(self.models(key))}",
                param="model",
                code="model_not_found",
            )
        if name == self.model.name:
            return self.model.engine
        # The licence is checked a second time, so that one mistake in the list of names does not
        # give the undefended model to a key without a licence.
        if key.licence != "distillation" or self.model.undefended is None:
            raise ApiError(403, "this key has no distillation licence", kind="permission_error")
        return self.model.undefended

    def _tier(self, key: KeyRecord) -> Tier:
        # The policy may have changed since the key was authenticated. A tier that is gone must
        # not fall back to another one.
        if key.tier not in self.policy.tiers:
            raise no_key()
        return self.policy.tiers[key.tier]

    async def admit(
        self,
        kind: type[ApiRequest],
        headers: Mapping[str, str],
        read: Callable[[int], Awaitable[bytes]],
        address: str = "",
    ) -> Admitted:
        """Make every check of a request that comes before the engine.

        Args:
            read: returns the body; raises ApiError if it has more bytes than its argument.
            address: of the client, for the extraction score.

        Raises:
            ApiError: with the reason, in OpenAI's shape.
            StoreError: if keys or quotas cannot be read.
            AuditLogError: if the log cannot be written.
        """
        key = await self.authenticate(headers, "chat" if kind is ChatRequest else "completions")
        if len(self.open) + self._arriving.total() >= self.policy.in_flight:
            self.metrics.refused("load")
            raise overloaded()
        # Bodies that are still arriving count, and each account has its own limit of them. One key
        # could otherwise occupy the whole replica with bodies that it sends very slowly.
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
                # Refused requests for log-probabilities count towards the extraction score too.
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
            # Subtracting a Counter drops accounts at 0, so the dictionary does not grow.
            self._arriving -= Counter([key.account])

    async def _body(self, read: Callable[[int], Awaitable[bytes]]) -> bytes:
        # An arriving body occupies one of `in_flight`. Without a limit of time a client that sends
        # one byte per minute would occupy it for hours.
        try:
            async with asyncio.timeout(BODY_S):
                return await read(self.policy.most_bytes)
        except TimeoutError:
            message = f"the body did not arrive within {BODY_S:g} seconds"
            raise ApiError(408, message, code="timeout") from None

    async def plan(self, key: KeyRecord, request: ApiRequest) -> Plan:
        """The engine requests for a request, by the rules of the key's tier.

        Raises:
            ApiError: 400 for what the tier does not allow.
        """
        # Long prompts take a while to tokenize, and other streams must go on meanwhile.
        return await asyncio.to_thread(
            plan,
            request,
            self._tier(key),
            self._limits,
            identity=secrets.token_hex(12),
            # One secret per account, so that customers cannot compare their draws.
            seed_key=hmac.digest(self._secret, key.account.encode(), "sha256"),
            watermark_key=key.watermark_key,
        )

    async def reserve(
        self, key: KeyRecord, request: ApiRequest, planned: Plan, engine: Engine
    ) -> Admitted:
        """Reserve the largest possible cost of a request, and admit it.

        Raises:
            ApiError: 429 with Retry-After and the limits if the quota does not allow it.
        """
        tier = self._tier(key)
        undefended = engine is not self.model.engine
        # The log comes before the reservation: a request that cannot be logged is not answered.
        self._write(key, "asked", planned, undefended=undefended)
        reservation = Reservation(
            # A licence has a quota of its own and an account of its own in the ledger.
            key=key.account + UNDEFENDED if undefended else key.account,
            request=planned.identity,
            prompt=planned.prompt_tokens,
            completion=planned.completion_tokens,
            slots=len(planned.requests),
        )
        limits = Limits.of(tier, self._suspicion.share(key.account))
        outcome = await self.open.reserve(reservation, limits)
        if isinstance(outcome, Refusal):
            self.metrics.refused("quota")
            raise over_quota(outcome)
        return Admitted(
            id=planned.identity,
            key=key,
            tier=tier,
            plan=planned,
            engine=engine,
            undefended=undefended,
            format=self._format(request, tier, planned.identity),
            stream=bool(request.stream),
            wants_usage=request.wants_usage,
            stops=request.stops,
            headers={
                "x-request-id": planned.identity,
                **rate_headers(outcome, shows_tokens=tier.reasoning == "shown"),
            },
            deadline=asyncio.get_running_loop().time() + self.policy.timeout_s,
        )

    def _format(self, request: ApiRequest, tier: Tier, identity: str) -> AnswerFormat:
        logprobs = None
        if request.asked_logprobs is not None:
            logprobs = LogprobFormat(self.model.tokenizer, tier.decimals)
        if isinstance(request, ChatRequest):
            return ChatFormat(f"chatcmpl-{identity}", request.model, logprobs)
        return CompletionFormat(f"cmpl-{identity}", request.model, logprobs)

    async def answer(self, admitted: Admitted) -> AsyncGenerator[tuple[int, AnswerPiece]]:
        """The pieces of all completions of a request as they are written, with their numbers.

        The request is settled when the iterator ends or is closed, whatever the reason.

        Raises:
            ApiError: 503 if the engine fails or takes too long.
        """
        started: float | None = time.perf_counter()
        try:
            streams = answering.completions(
                admitted, self.model, lambda tokens: self.open.add(admitted.id, tokens)
            )
            async with contextlib.aclosing(answering.merge(streams)) as pieces:
                async for number, piece in pieces:
                    if started is not None:
                        self.metrics.first_token(time.perf_counter() - started)
                        started = None
                    yield number, piece
            self.metrics.answered(admitted.key.tier)
        except TimeoutError:
            raise overloaded("the answer took too long", "timeout") from None
        except EngineBusyError:
            self.metrics.refused("load")
            raise overloaded() from None
        except EngineError as error:
            # The engine's own message may name paths or prompts, so it goes to the log only.
            self.metrics.refused("engine")
            logger.warning("request %s: the engine failed: %s", admitted.id, error)
            raise overloaded("the engine failed; try again", "engine_error") from None
        finally:
            # Also after a disconnect: tokens that were written are billed, even if nobody reads
            # them. Otherwise a client could avoid its bill by closing the connection early.
            self._settle(admitted)

    def _settle(self, admitted: Admitted) -> None:
        tokens = self.open.settle(admitted.id)
        # None if it was settled before: closing an iterator that has ended changes nothing.
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

    async def is_ready(self) -> bool:
        """Whether a request could be answered now: keys, ledger, log and engine are available."""
        try:
            await asyncio.to_thread(self.keys.find, "az-nobody")
            await asyncio.to_thread(self.ledger.sweep)
            await asyncio.to_thread(self.log.check)
            return self._ready is None or await self._ready()
        except Exception as error:
            logger.warning("not ready: %s", error)
            return False

    async def close(self) -> None:
        """Wait for the bills that are being written, and close the log."""
        await self.open.close()
        self.log.close()
