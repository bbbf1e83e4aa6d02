"""The gateway as replicas of Ray Serve: each opens the shared stores and answers HTTP."""

import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.serve.handle import DeploymentHandle
from transformers import PreTrainedTokenizerBase

from actors.engine import RemoteEngine
from azeotrope import models
from azeotrope.config import Config
from azeotrope.defenses import base as defenses
from azeotrope.tasks import TaskConfig
from azeotrope.tokens import Boundary, decode
from gateway.accounts.stores import StoreLocation, open_keys, open_ledger
from gateway.admitted import Model
from gateway.http.app import create_app
from gateway.metrics import SHARED
from gateway.policy import Policy
from gateway.records.audit_log import AuditLog
from gateway.service import Gateway

LOGS, METRICS = "audit", "metrics"


class GatewaySettings(Config):
    """The settings of one gateway replica."""

    name: str = Field(description="the model's name for clients")
    tokenizer: str = Field(description="the checkpoint that gives the tokenizer and the context")
    context: int | None = None
    boundary: Boundary = Field(default_factory=Boundary)
    rewriting: tuple[dict[str, Any], ...] = Field(default=(), description="text-stage defenses")
    policy: Policy = Field(default_factory=Policy)
    store: str = Field(
        description="the folder of logs, and of keys and quotas if there is no redis"
    )
    redis: str | None = Field(
        default=None,
        description="address of a Redis for keys and quotas, where there are several nodes",
    )
    demo: bool = False
    task: TaskConfig | None = Field(default=None, description="its problems are on the page")
    report: str | None = Field(default=None, description="a report.html that the page links to")


def build_gateway(
    settings: GatewaySettings, engine: RemoteEngine, undefended: RemoteEngine | None
) -> Gateway:
    """Open every store. A store that cannot be opened stops the replica, which must not serve.

    Raises:
        ValueError: if a tier hides the reasoning and a tag does not survive decoding.
        ConfigError: if the stores need a package that is missing.
        StoreError: if the keys do not exist yet, or a store cannot be opened.
    """
    model = Model(
        name=settings.name,
        tokenizer=models.load_tokenizer(settings.tokenizer),
        context=settings.context or models.context_length(settings.tokenizer),
        engine=engine,
        undefended=undefended,
        boundary=settings.boundary,
        rewriting=tuple(defenses.resolve(dict(part)) for part in settings.rewriting),
    )
    _check_tags(settings.policy, settings, model.tokenizer)
    stores = StoreLocation(Path(settings.store), settings.redis)
    if SHARED in os.environ:
        Path(os.environ[SHARED]).mkdir(mode=0o700, parents=True, exist_ok=True)

    async def ready() -> bool:
        return await engine.ready() and (undefended is None or await undefended.ready())

    return Gateway(
        model,
        settings.policy,
        open_keys(stores, must_exist=True),
        open_ledger(stores),
        AuditLog(stores.folder / LOGS),
        ready=ready,
    )


def _check_tags(
    policy: Policy, settings: GatewaySettings, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Check that the tags of the reasoning are part of the decoded text.

    A tokenizer may drop them as special tokens. The gateway could then not tell reasoning from
    answers, and would send the reasoning to tiers that hide it.

    Raises:
        ValueError: if a tier hides the reasoning and a tag does not survive decoding.
    """
    if all(tier.reasoning == "shown" for tier in policy.tiers.values()):
        return
    for tag in filter(None, (settings.boundary.open_tag, settings.boundary.close_tag)):
        ids = tokenizer(tag, add_special_tokens=False)["input_ids"]
        if tag not in decode(tokenizer, ids):  # type: ignore[arg-type]
            raise ValueError(
                f"the tokenizer of {settings.tokenizer} leaves {tag!r} out of its text, so a tier "
                "with reasoning cut or summary could not tell where the answer begins; set every "
                "tier's reasoning to shown, or choose tags that are not special tokens"
            )


@serve.ingress()
class GatewayReplica:
    """Answers HTTP. The application is built in the replica, because its stores are there."""

    def __init__(
        self,
        settings: dict[str, Any],
        engine: DeploymentHandle,
        undefended: DeploymentHandle | None = None,
    ) -> None:
        self.settings = GatewaySettings.model_validate(settings)
        clean = RemoteEngine(undefended) if undefended is not None else None
        self.gateway = build_gateway(self.settings, RemoteEngine(engine), clean)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application; Serve calls this after `__init__`, in the replica's process."""
        app = create_app(self.gateway)
        if self.settings.task is not None:
            from gateway.http.playground import add_page

            add_page(
                app,
                self.gateway,
                self.settings.task,
                demo=self.settings.demo,
                report=Path(self.settings.report) if self.settings.report else None,
            )
        return app

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply a new policy, the deployment's `user_config`, without a restart.

        Raises:
            ValueError: if the policy is malformed, or hides reasoning that the tokenizer's text
                does not mark. The old policy then stays in force.
        """
        policy = Policy.model_validate(user_config)
        _check_tags(policy, self.settings, self.gateway.model.tokenizer)
        self.gateway.apply(policy)


def environment(metrics: Path) -> dict[str, str]:
    """Environment variables that a replica must have before its first import."""
    return {
        # prometheus_client reads this when it is imported, and chooses shared files by it.
        SHARED: str(metrics),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
