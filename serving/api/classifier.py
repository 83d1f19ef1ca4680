"""Asks an external classifier about a text, over HTTPS."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from http import HTTPStatus

import httpx

from probes.errors import TelltaleError

_MAX_ANSWER = 64 * 1024
_MAX_CONNECTIONS = 32


class ClassifierError(TelltaleError, RuntimeError):
    """The classifier gave no answer that counts as one."""


class Classifier:
    """Asks once: no retry, no redirect, no proxy from the environment; certificates are verified.

    Args:
        environment: where API keys stand.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._environment = environment
        self._client = httpx.AsyncClient(
            follow_redirects=False,
            trust_env=False,
            timeout=None,  # noqa: S113 - whoever asks sets a time for all of it
            limits=httpx.Limits(max_connections=_MAX_CONNECTIONS),
        )

    async def flags(self, url: str, key_env: str | None, text: str, *, detector: str, score: float | None) -> bool:
        """Whether the classifier flags a text.

        Args:
            url: its address.
            key_env: environment variable with its API key; None if it takes none.
            text: that is to be judged.
            detector: that has fired on it.
            score: its statistic; None if that is not finite.
        Raises:
            ClassifierError: it cannot be reached, or answers something else than ``{"flagged": true}`` or ``false``.
        """
        headers = {"authorization": f"Bearer {self._environment.get(key_env, '')}"} if key_env is not None else {}
        asked = {"text": text, "detector": detector, "score": score}
        try:
            async with self._client.stream("POST", url, json=asked, headers=headers) as response:
                if response.status_code != HTTPStatus.OK:
                    raise ClassifierError(f"{url} answered with status {response.status_code}")
                answer = b""
                async for part in response.aiter_bytes():
                    answer += part
                    if len(answer) > _MAX_ANSWER:
                        raise ClassifierError(f"{url} answered more than {_MAX_ANSWER} bytes")
        except httpx.HTTPError as error:
            raise ClassifierError(f"{url}: {type(error).__name__}") from error
        return _flagged(url, answer)


def _flagged(url: str, answer: bytes) -> bool:
    try:
        content = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise ClassifierError(f"{url} answered no JSON") from error
    flagged = content.get("flagged") if isinstance(content, dict) else None
    if not isinstance(flagged, bool):
        raise ClassifierError(f'{url} answered JSON without {{"flagged": true}} or false')
    return flagged
