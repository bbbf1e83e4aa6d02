"""Decoding defenses as configured, and with the strength or the watermark key of a request."""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from azeotrope.config import ConfigError
from azeotrope.defenses import base

MOST_CACHED = 64
"""Combinations of strength and watermark key whose defenses stay built."""


class DefenseVariants:
    """Builds each combination of strength and key once; requests that share one share defenses.

    A request's strength replaces that of every defense. Its key replaces the key of the defenses
    that have one.
    """

    def __init__(self, configs: Sequence[dict[str, Any]]) -> None:
        """
        Args:
            configs: plain configurations of decoding-stage defenses, in the order in which they
                act.

        Raises:
            ConfigError: if there is no such defense, its settings do not fit, or it is not of
                stage `decoding`.
        """
        self._configs = [dict(config) for config in configs]
        self._lock = threading.Lock()
        self._built: OrderedDict[tuple[float | None, str | None], tuple[base.Defense, ...]]
        self._built = OrderedDict()
        self._default = self._build(None, None)

    async def of(self, strength: float | None, key: str | None) -> tuple[base.Defense, ...]:
        """The defenses of one request; those that do nothing at their strength are left out.

        Raises:
            ConfigError: if a defense refuses the strength or the key.
        """
        if not self._configs or (strength is None and key is None):
            return self._default
        # A defense may load a model when it is built; the event loop serves requests meanwhile.
        return await asyncio.to_thread(self.cached, strength, key)

    def cached(self, strength: float | None, key: str | None) -> tuple[base.Defense, ...]:
        """The same as `of`, for callers that may block.

        Raises:
            ConfigError: if a defense refuses the strength or the key.
        """
        with self._lock:
            if (strength, key) not in self._built:
                self._built[strength, key] = self._build(strength, key)
            self._built.move_to_end((strength, key))
            while len(self._built) > MOST_CACHED:
                # Rows that still use these defenses hold references of their own.
                self._built.popitem(last=False)
            return self._built[strength, key]

    def _build(self, strength: float | None, key: str | None) -> tuple[base.Defense, ...]:
        active: list[base.Defense] = []
        for config in self._configs:
            changed = dict(config)
            if strength is not None:
                changed["strength"] = strength
            defense = base.resolve(changed)
            if defense.stage != "decoding":
                raise ConfigError(
                    f"defense {config['name']!r} is of stage {defense.stage!r}; the engine runs "
                    "those of stage 'decoding' (weights are exported, text is rewritten after)"
                )
            if key is not None and "key" in type(defense.config).model_fields:
                defense = base.resolve({**changed, "key": key})
            if not defense.is_identity:
                active.append(defense)
        return tuple(active)
