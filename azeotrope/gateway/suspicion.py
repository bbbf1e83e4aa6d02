"""Looks at what each key asked last, and acts on it if the policy says so."""

from azeotrope.gateway import extraction
from azeotrope.gateway.audit_log import AuditLog
from azeotrope.gateway.metrics import Metrics
from azeotrope.gateway.policy import Extraction
from azeotrope.gateway.refusals import suspended


class Suspicion:
    """One replica's view: with several, each sees a part of a key's requests and judges by it.

    In shadow mode (`observe`, the default) it writes the audit log and nothing else.
    """

    def __init__(self, rules: Extraction, log: AuditLog, metrics: Metrics) -> None:
        self.rules, self._log, self._metrics = rules, log, metrics
        self._watch = extraction.Watch(rules.window)
        self._seen: dict[str, int] = {}
        self._shares: dict[str, float] = {}

    def share(self, key: str) -> float:
        """Of its quotas that a key keeps: 1 unless it is throttled."""
        return self._shares.get(key, 1.0)

    def look(self, key: str, observation: extraction.Observation) -> None:
        """Note a request; every so many of a key, look at them together.

        Raises:
            ApiError: 403 if the policy is to block and the key looks like a thief's.
        """
        self._watch.add(key, observation)
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] % self.rules.every == 0:
            self._judge(key)
        if self._shares.get(key) == 0.0:
            raise suspended()

    def _judge(self, key: str) -> None:
        score = extraction.score(self._watch.of(key))
        suspicious = score.value >= self.rules.threshold
        self._metrics.extraction(suspicious)
        self._shares.pop(key, None)
        if not suspicious:
            return
        self._log.write(
            key,
            "extraction",
            reasons=score.reasons,
            score=round(score.value, 3),
            action=self.rules.action,
        )
        if self.rules.action != "observe":
            self._shares[key] = self.rules.throttle if self.rules.action == "throttle" else 0.0
