"""Scores the last requests of each customer, and acts on the score if the policy says so.

A customer is an account: a key and all keys that it was rotated to.
"""

import time
from collections.abc import Mapping

from gateway.accounts.key_records import KeyRecord
from gateway.extraction.footprint import Observation, RequestFacts, observe
from gateway.extraction.score import Watch, score
from gateway.http.requests import ApiRequest
from gateway.metrics import Metrics
from gateway.plan import Plan
from gateway.policy import Extraction
from gateway.records.audit_log import AuditLog
from gateway.refusals import suspended


class Suspicion:
    """The extraction scores of one replica, which judges by the requests that it receives.

    With the action `observe` (the default) it writes the audit log and nothing else.
    """

    def __init__(self, rules: Extraction, log: AuditLog, metrics: Metrics) -> None:
        self.rules, self._log, self._metrics = rules, log, metrics
        self._watch = Watch(rules.window)
        self._request_counts: dict[str, int] = {}
        # The share of its quotas that a suspicious account keeps: 0 suspends it.
        self._shares: dict[str, float] = {}

    def share(self, account: str) -> float:
        """The share of its quotas that an account keeps: 1 unless it is throttled."""
        return self._shares.get(account, 1.0)

    def see(
        self,
        key: KeyRecord,
        request: ApiRequest,
        headers: Mapping[str, str],
        address: str,
        *,
        planned: Plan | None = None,
    ) -> None:
        """Add a request to the observations of its account.

        Args:
            planned: None if the key's tier refuses the request.

        Raises:
            ApiError: 403 if the account is suspended.
        """
        logprobs, bans = request.asked_logprobs is not None, bool(request.logit_bias)
        if planned is None and not (logprobs or bans):
            # Refused requests cost no quota. If they all counted, an attacker could fill the window
            # with harmless refused ones and push the telling requests out of it.
            return
        facts = RequestFacts(
            text=request.texts[-1],
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
        self.add(key.account, observe(facts), key=key.id)

    def add(self, account: str, observation: Observation, *, key: str) -> None:
        """Note a request, and score the account after every `rules.every` of them.

        Args:
            key: the id of the key of this request, for the audit log.

        Raises:
            ApiError: 403 if the policy says `block` and the account's score is above the threshold.
        """
        self._watch.add(account, observation)
        self._request_counts[account] = self._request_counts.get(account, 0) + 1
        if self._request_counts[account] % self.rules.every == 0:
            self._judge(account, key)
        if self._shares.get(account) == 0.0:
            raise suspended()

    def _judge(self, account: str, key: str) -> None:
        result = score(self._watch.of(account))
        suspicious = result.value >= self.rules.threshold
        self._metrics.extraction(suspicious)
        # Each judgement replaces the last one: an account whose requests are harmless again gets
        # its quotas back, and new rules count from here on.
        self._shares.pop(account, None)
        if not suspicious:
            return
        self._log.write(
            *(key, "extraction"),
            account=account,
            reasons=result.reasons,
            score=round(result.value, 3),
            action=self.rules.action,
        )
        if self.rules.action != "observe":
            self._shares[account] = self.rules.throttle if self.rules.action == "throttle" else 0.0
