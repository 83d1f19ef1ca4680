"""One tenant: what its requests were, and what they met."""

from __future__ import annotations

from dashboards.panel import Board, Form, Panel, Row, Series, Unit
from monitor import catalogue

_OF = '{job=~"$job", tenant="$tenant"}'
_BLOCKED = '{job=~"$job", tenant="$tenant", action="block"}'
_ALL = f"sum(rate({catalogue.TENANT_REQUESTS.name}{_OF}[$__rate_interval]))"

TENANT = Board(
    uid="telltale-tenant",
    title="Telltale: one tenant",
    description="What the requests of one tenant of the policy file were, and what they met.",
    by_tenant=True,
    rows=(
        Row(
            "Requests",
            (
                Panel(
                    "Requests by action",
                    (
                        Series(
                            f"sum by (action) (rate({catalogue.TENANT_REQUESTS.name}{_OF}[$__rate_interval]))",
                            "{{action}}",
                        ),
                    ),
                    Unit.PER_SECOND,
                    "Requests that ended, by the most severe action that was enforced.",
                ),
                Panel(
                    "Share that is blocked",
                    (
                        Series(
                            f"sum(rate({catalogue.TENANT_REQUESTS.name}{_BLOCKED}[$__rate_interval]))\n/ {_ALL}",
                            "blocked",
                        ),
                    ),
                    Unit.SHARE,
                    "Of this tenant's requests.",
                ),
                Panel(
                    "Share of all requests",
                    (
                        Series(
                            f'{_ALL}\n/ sum(rate({catalogue.REQUESTS.name}{{job=~"$job"}}[$__rate_interval]))',
                        ),
                    ),
                    Unit.SHARE,
                    "That this tenant sends.",
                    Form.NUMBER,
                    width=6,
                ),
                Panel(
                    "Tokens",
                    (
                        Series(
                            f"sum(rate({catalogue.TENANT_TOKENS.name}{_OF}[$__rate_interval]))", "scored, prompts too"
                        ),
                    ),
                    Unit.NUMBER,
                    "A second, of requests that have ended.",
                    width=18,
                ),
            ),
        ),
        Row(
            "Rules",
            (
                Panel(
                    "Rules that fired",
                    (
                        Series(
                            f"sum by (rule) (increase({catalogue.TENANT_RULES.name}{_OF}[$__rate_interval]))",
                            "{{rule}}",
                        ),
                    ),
                    Unit.NUMBER,
                    "Once per request, in shadow too.",
                    width=24,
                ),
            ),
        ),
    ),
)
