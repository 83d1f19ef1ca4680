"""Rules: what each does, what it would do in shadow, and how it keeps its false-alarm budget."""

from __future__ import annotations

from dashboards import recordings as recorded
from dashboards.panel import Board, Form, Panel, Row, Series, Unit
from monitor import catalogue

_JOB = '{job=~"$job"}'

RULES = Board(
    uid="telltale-rules",
    title="Telltale: rules",
    description="What each rule of the policies does, and what rules in shadow would have done.",
    rows=(
        Row(
            "What rules do",
            (
                Panel(
                    "Enforced",
                    (
                        Series(
                            "sum by (rule, action) "
                            f'(increase({catalogue.ACTIONS.name}{{job=~"$job", mode="enforce"}}[$__rate_interval]))',
                            "{{rule}}: {{action}}",
                        ),
                    ),
                    Unit.NUMBER,
                    "Requests for which a rule has fired, once each.",
                ),
                Panel(
                    "In shadow: what they would have done",
                    (
                        Series(
                            "sum by (rule, action) "
                            f'(increase({catalogue.ACTIONS.name}{{job=~"$job", mode="shadow"}}[$__rate_interval]))',
                            "{{rule}}: {{action}}",
                        ),
                    ),
                    Unit.NUMBER,
                    "Nothing was done. Compare before a rule is enforced.",
                ),
            ),
        ),
        Row(
            "What came of withheld replies",
            (
                Panel(
                    "Outcomes",
                    (
                        Series(
                            "sum by (rule, action, outcome) "
                            f"(increase({catalogue.OUTCOMES.name}{_JOB}[$__rate_interval]))",
                            "{{rule}}: {{action}}, {{outcome}}",
                        ),
                    ),
                    Unit.NUMBER,
                    "Replies that waited for a second opinion, a second attempt, another server or their own end.",
                    width=24,
                ),
            ),
        ),
        Row(
            "The false-alarm budget",
            (
                Panel(
                    "Share of requests, by rule, and what was promised",
                    (
                        Series(f"{recorded.FIRED_LONG}{_JOB}", "{{rule}}, one hour"),
                        Series(f"max by (rule) ({catalogue.RULE_TARGET_FPR.name}{_JOB})", "{{rule}}, promised"),
                    ),
                    Unit.SHARE,
                    "A rule may fire for the promised share of benign requests. More is an attack, or drift.",
                ),
                Panel(
                    "Evidence against the promise",
                    (
                        Series(f"max by (rule) ({catalogue.ALARM_EVIDENCE.name}{_JOB})", "{{rule}}"),
                        Series(
                            f"sum by (rule) (increase({catalogue.ALARM_EXCEEDED.name}{_JOB}[$__rate_interval]))",
                            "{{rule}}, shown",
                        ),
                    ),
                    Unit.NUMBER,
                    "Powers of ten that a fair bet against the promised rate has won; a little above 3 it is shown.",
                ),
                Panel(
                    "Tokens that were steered",
                    (
                        Series(
                            f"sum by (steer) (rate({catalogue.TOKENS_STEERED.name}{_JOB}[$__rate_interval]))",
                            "{{steer}}",
                        ),
                    ),
                    Unit.NUMBER,
                    "A second, by steer.",
                ),
            ),
        ),
        Row(
            "What runs",
            (
                Panel(
                    "Flags explained by latents",
                    (
                        Series(
                            f"sum by (outcome) (increase({catalogue.EXPLANATIONS.name}{_JOB}[$__rate_interval]))",
                            "{{outcome}}",
                        ),
                        Series(f"sum({catalogue.EXPLANATIONS_WAITING.name}{_JOB})", "waiting"),
                    ),
                    Unit.NUMBER,
                    "Where the policy has 'explain'. Dropped: more was flagged than it lets be explained in a minute.",
                    width=24,
                ),
                Panel(
                    "Policies loaded while running",
                    (
                        Series(
                            f"sum by (outcome) (increase({catalogue.POLICY_RELOADS.name}{_JOB}[$__rate_interval]))",
                            "{{outcome}}",
                        ),
                    ),
                    Unit.NUMBER,
                    "Only applied has changed anything; all others say in the log why not.",
                    width=24,
                ),
                Panel(
                    "Policies",
                    (Series(f"count by (digest) ({catalogue.POLICY_INFO.name}{_JOB})", "{{digest}}"),),
                    Unit.NUMBER,
                    "Servers by the digest of policy and detectors. More than one digest: a roll-out is under way.",
                    Form.NUMBER,
                ),
                Panel(
                    "Detectors",
                    (
                        Series(
                            f"count by (detector, kind, digest) ({catalogue.ARTIFACT_INFO.name}{_JOB})",
                            "{{detector}} ({{kind}}) {{digest}}",
                        ),
                    ),
                    Unit.NUMBER,
                    "Servers by the digest of each detector's tensors.",
                    Form.NUMBER,
                ),
            ),
        ),
    ),
)
