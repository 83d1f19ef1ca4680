"""A process that writes events and says on standard output which of them are stored; killed in the middle by a test.

python -m tests.unit.audit_load SCHEME FOLDER
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from monitor.audit.store import open_store
from monitor.audit.writer import AuditWriter
from monitor.events import Started
from tests.unit.audit_trail import KEY, Watch, content, decision, settings_of

THREADS = 8


def _load(writer: AuditWriter, thread: int) -> None:
    number = thread
    while True:
        event, about = decision(), content(number)
        ticket = writer.submit(event, lambda about=about: about)  # type: ignore[misc]
        assert ticket is not None
        ticket.result(timeout=30)
        # One write: whoever reads a whole line knows that it was said.
        os.write(sys.stdout.fileno(), f"{event.id}\n".encode())
        number += THREADS


def main(scheme: str, url: str, folder: Path) -> None:
    settings = settings_of(scheme, folder) if not url else settings_of("sqlite", folder, url=url)
    writer = AuditWriter(open_store(settings.url, make=True), KEY, settings, Watch())
    writer.start(Started(program="test"))
    for thread in range(THREADS):
        threading.Thread(target=_load, args=(writer, thread), daemon=True).start()
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
