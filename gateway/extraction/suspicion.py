"""Looks at what each customer asked last, and acts on it if the policy says so.

A customer is an account: a key and all that it was rotated to.
"""

import time
from collections.abc import Mapping

from gateway.accounts.key_records import KeyRecord
from gateway.extraction import score
from gateway.http.requests import Sampled
from gateway.metrics import Metrics
from gateway.plan import Plan
from gateway.policy import Extraction
from gateway.records.audit_log import AuditLog
from gateway.refusals import suspended


class Suspicion:
    """One replica's view: with several, each sees a part of the requests and judges by it.

    In shadow mode (`observe`, the default) it writes the audit log and nothing else.
    """

    def __init__(self, rules: Extraction, log: AuditLog, metrics: Metrics) -> None:
        self.rules, self._log, self._metrics = rules, log, metrics
        self._watch = score.Watch(rules.window)
        self._seen: dict[str, int] = {}
        self._shares: dict[str, float] = {}

    def share(self, account: str) -> float:
        """Of its quotas that an account keeps: 1 unless it is throttled."""
        return self._shares.get(account, 1.0)

    def see(
        self,
        key: KeyRecord,
        request: Sampled,
        headers: Mapping[str, str],
        address: str,
        *,
        planned: Plan | None = None,
    ) -> None:
        """Show a request to the score of extraction patterns.

        Args:
            planned: None if the key's tier refuses the request.

        Raises:
            ApiError: 403 if the key is suspended.
        """
        logprobs, bans = request.asked_logprobs is not None, bool(request.logit_bias)
        if planned is None and not (logprobs or bans):
            # Refusals cost nothing: by others a thief could push his own requests out of sight.
            return
        observation = score.observe(
            request.texts[-1],
            at=time.time(),
            max_tokens=request.most_tokens,
            temperature=planned.requests[0].temperature if planned else request.temperature or 0.0,
            logprobs=logprobs,
            bans=bans,
            address=address,
            user_agent=headers.get("user-agent", ""),
            instructions="\n".join(request.texts[:-1]),
            refused=planned is None,
        )
        self.look(key.account, observation, key=key.id)

    def look(self, account: str, observation: score.Observation, *, key: str) -> None:
        """Note a request; every so many of an account, look at them together.

        Args:
            key: the id of the key that asks, for the audit log.

        Raises:
            ApiError: 403 if the policy is to block and the account looks like a thief's.
        """
        self._watch.add(account, observation)
        self._seen[account] = self._seen.get(account, 0) + 1
        if self._seen[account] % self.rules.every == 0:
            self._judge(account, key)
        if self._shares.get(account) == 0.0:
            raise suspended()

    def _judge(self, account: str, key: str) -> None:
        verdict = score.score(self._watch.of(account))
        suspicious = verdict.value >= self.rules.threshold
        self._metrics.extraction(suspicious)
        self._shares.pop(account, None)
        if not suspicious:
            return
        self._log.write(
            *(key, "extraction"),
            account=account,
            reasons=verdict.reasons,
            score=round(verdict.value, 3),
            action=self.rules.action,
        )
        if self.rules.action != "observe":
            self._shares[account] = self.rules.throttle if self.rules.action == "throttle" else 0.0
