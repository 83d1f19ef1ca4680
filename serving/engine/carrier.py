"""The carrier: one pseudo output per step that brings our bytes to the API process, in order with the tokens.

vLLM ignores outputs of unknown requests, so nothing breaks where nobody takes it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from monitor.report import StepReport, decode_report

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput

CARRIER_ID = "~telltale"


def take_reports(outputs: Sequence[EngineCoreOutput]) -> tuple[list[StepReport], list[EngineCoreOutput]]:
    """Split outputs into our reports and vLLM's own outputs."""
    reports, rest = [], []
    for output in outputs:
        if output.request_id == CARRIER_ID and output.routed_experts is not None:
            reports.append(decode_report(output.routed_experts))
        else:
            rest.append(output)
    return reports, rest
