"""The chat template: a detector for chats is calibrated on one, so another one is refused."""

from __future__ import annotations

import hashlib

from probes.errors import TelltaleError
from serving.deployment import Deployment


class TemplateError(TelltaleError, ValueError):
    """The server would render chats otherwise than the detectors' cards say."""


def require_template(deployment: Deployment, *, template: str | None, from_requests: bool) -> None:
    """Refuse a chat template that is not the one on the cards.

    Args:
        deployment: with the artifacts.
        template: text that replaces the model's own template; None for the model's own.
        from_requests: whether requests may bring templates of their own.
    Raises:
        TemplateError: names the detector whose card differs.
    """
    if from_requests:
        raise TemplateError(
            "--trust-request-chat-template lets each request choose its template; detectors are calibrated on one. "
            "Leave it out."
        )
    if template is None:
        return
    digest = hashlib.sha256(template.encode()).hexdigest()
    for artifact in deployment.artifacts.values():
        expected = artifact.card.model.chat_template_digest
        if digest != expected:
            raise TemplateError(
                f"--chat-template has the SHA-256 {digest[:12]}..., detector {artifact.card.name!r} was calibrated "
                f"with {expected[:12]}.... Leave it out, or train the detector with this template."
            )
