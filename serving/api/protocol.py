"""The HTTP parser of the server, with an end to how much of a request's head it keeps.

vLLM's limits of headers (``--h11-max-...``) hold for a parser that uvicorn does not take where the faster ``httptools``
is installed, and that one collects a head of any length, before any key was looked at.
"""

from __future__ import annotations

from typing import Any

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 2 << 20
"""Above what ``access: {header_bytes}`` can be: that limit is answered properly, this one ends the connection."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """uvicorn's, which refuses a head that grows without end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._head_bytes = 0

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Its head is there."""
        self._in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Parse what has come, unless the head is too long by now."""
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response("Request header fields too large.")
                return
        super().data_received(data)


def use_bounded_protocol() -> None:
    """Have uvicorn take it in this process wherever it would choose a parser by itself."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedHttpProtocol.__name__}"
