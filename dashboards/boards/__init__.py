"""The dashboards that are shipped, one file each."""

from __future__ import annotations

from dashboards.boards.conversations import CONVERSATIONS
from dashboards.boards.detectors import DETECTORS
from dashboards.boards.overhead import OVERHEAD
from dashboards.boards.overview import OVERVIEW
from dashboards.boards.rules import RULES
from dashboards.boards.tenant import TENANT
from dashboards.panel import Board

BOARDS: tuple[Board, ...] = (OVERVIEW, DETECTORS, RULES, CONVERSATIONS, OVERHEAD, TENANT)
