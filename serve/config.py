"""What a model's replicas are told: which Artifact they answer with, how, for whom, and what was served before it."""

from __future__ import annotations

import hashlib
from typing import Final

from pipelines.spec import Frozen
from serve.spec import ServeSpec

KEPT: Final = 10
"""Earlier versions that can be rolled back to."""


class Deployed(Frozen):
    """An Artifact, and the section of the Spec that it is served by."""

    artifact: str
    """Path or URI."""
    spec: ServeSpec


class ReplicaConfig(Deployed):
    """What a running replica can change without a restart; it travels as Serve's `user_config`."""

    tokens: dict[str, str]
    """Digests of the accepted tokens by name."""
    history: list[Deployed] = []
    """What was served before, the latest last. Serve itself keeps nothing of it."""

    @property
    def digest(self) -> str:
        """What tells it from any other."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def followed_by(self, artifact: str, spec: ServeSpec, tokens: dict[str, str]) -> ReplicaConfig:
        """What is told next: this one becomes the latest of the history, unless it differs in its tokens alone."""
        past, now = Deployed(artifact=self.artifact, spec=self.spec), Deployed(artifact=artifact, spec=spec)
        history = self.history if past == now else [*self.history, past][-KEPT:]
        return ReplicaConfig(artifact=artifact, spec=spec, tokens=tokens, history=history)

    def rolled_back(self) -> ReplicaConfig:
        """What was told before, with today's tokens."""
        last = self.history[-1]
        tokens = self.tokens if last.spec.auth == "token" else {}
        return ReplicaConfig(artifact=last.artifact, spec=last.spec, tokens=tokens, history=self.history[:-1])

    def with_tokens(self, tokens: dict[str, str]) -> ReplicaConfig:
        """The same for other clients."""
        return self.followed_by(self.artifact, self.spec, tokens)
