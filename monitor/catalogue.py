"""Every metric that Telltale exports: name, type, labels, unit, help. Pure data; nothing here counts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class MetricType(StrEnum):
    """Prometheus metric types that are used."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: as scraped.
        type: Prometheus type.
        help: one sentence.
        labels: bounded by the policy file, never by requests.
        buckets: upper bounds, for histograms.
    """

    name: str
    type: MetricType
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


SCORE_BUCKETS = (-16.0, -8.0, -6.0, -4.0, -3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0)
AUDIT_BUCKETS = (0.5e-3, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 0.1, 0.2, 0.5, 1.0, 5.0, 10.0)
SINK_BUCKETS = (5e-3, 10e-3, 50e-3, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0)
DELAY_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0)
SECONDS_BUCKETS = (25e-6, 50e-6, 100e-6, 200e-6, 300e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 50e-3)

REQUESTS = Metric(
    "telltale_requests_total",
    MetricType.COUNTER,
    "Requests that ended, by the most severe action that was enforced.",
    ("action", "policy"),
)
ACTIONS = Metric(
    "telltale_actions_total",
    MetricType.COUNTER,
    "Rules that fired, once per request; in mode shadow, what they would have done.",
    ("rule", "action", "mode", "policy"),
)
OUTCOMES = Metric(
    "telltale_outcomes_total",
    MetricType.COUNTER,
    "What came of rules that withhold replies: of blocks at the end, regenerations, escalations and routes.",
    ("rule", "action", "outcome", "policy"),
)
DETECTOR_SCORE = Metric(
    "telltale_detector_score",
    MetricType.HISTOGRAM,
    "Statistic of a detector at the end of a request: at prompt after the last prompt token, at stream its maximum. "
    "The buckets are each detector's own, from its calibration and its thresholds.",
    ("detector", "stage", "aggregate", "segments"),
    SCORE_BUCKETS,
)
DETECTOR_THRESHOLD = Metric(
    "telltale_detector_threshold",
    MetricType.GAUGE,
    "Threshold above which a rule fires (the lowest, where it depends on length); no rule: it is only watched.",
    ("rule", "detector", "stage", "format", "policy"),
)
DETECTOR_FIRED = Metric(
    "telltale_detector_fired_total",
    MetricType.COUNTER,
    "Requests at whose end a detector's statistic lay above a threshold, whether a rule rests on it or not.",
    ("detector", "stage", "aggregate", "segments"),
)
FLAGGED = Metric(
    "telltale_flagged_requests_total",
    MetricType.COUNTER,
    "Requests in which a detector exceeded a threshold, once each, at whatever stage and with whatever aggregate.",
    ("detector",),
)
DETECTION_DELAY = Metric(
    "telltale_detection_delay_tokens",
    MetricType.HISTOGRAM,
    "Tokens of a reply up to and including the one at which a statistic first exceeded its threshold.",
    ("detector", "aggregate"),
    DELAY_BUCKETS,
)
SCORE_PSI = Metric(
    "telltale_score_psi",
    MetricType.GAUGE,
    "Population stability index of the newest 500 statistics (200 at least) against the card's calibration; above 0.25 "
    "they differ.",
    ("detector", "stage", "aggregate", "segments", "format"),
)
SCORE_KS = Metric(
    "telltale_score_ks",
    MetricType.GAUGE,
    "Kolmogorov-Smirnov distance of the newest 500 statistics (200 at least) from the card's calibration, 0 to 1.",
    ("detector", "stage", "aggregate", "segments", "format"),
)
FAMILIAR = Metric(
    "telltale_familiar_ratio",
    MetricType.GAUGE,
    "Share of the newest 500 requests (200 at least) that a novelty detector did not find unusual: inside of what it "
    "was fitted on.",
    ("detector",),
)
ALARM_EVIDENCE = Metric(
    "telltale_alarm_rate_evidence",
    MetricType.GAUGE,
    "Decimal logarithm of the e-value against a rule's promised rate; it reaches 3 once in a thousand servers at most.",
    ("rule", "format", "policy"),
)
ALARM_EXCEEDED = Metric(
    "telltale_alarm_rate_exceeded_total",
    MetricType.COUNTER,
    "How often it was shown that a rule fires on more requests than was promised (anytime-valid, error 0.001 in all).",
    ("rule", "format", "policy"),
)
RULE_TARGET_FPR = Metric(
    "telltale_rule_target_fpr",
    MetricType.GAUGE,
    "Share of benign requests for which a rule's threshold may let it fire, as it was calibrated.",
    ("rule", "format", "policy"),
)
TOKENS_SCORED = Metric("telltale_tokens_scored_total", MetricType.COUNTER, "Token positions that were scored.")
TOKENS_SKIPPED = Metric(
    "telltale_tokens_skipped_total",
    MetricType.COUNTER,
    "Token positions that are rightly not scored: the sink at the start, the final token that is never fed back.",
    ("reason",),
)
GAPS = Metric(
    "telltale_gaps_total",
    MetricType.COUNTER,
    "Token positions that should have been scored and were not.",
    ("reason",),
)
PROMPT_EVENTS = Metric(
    "telltale_prompt_events_total",
    MetricType.COUNTER,
    "Requests in whose prompt something was noticed: a special token inside content, segments that nobody could tell.",
    ("event",),
)
TOKENS_STEERED = Metric(
    "telltale_tokens_steered_total", MetricType.COUNTER, "Token positions that a steer wrote to.", ("steer",)
)
UNSIGNED = Metric(
    "telltale_unsigned_requests_total",
    MetricType.COUNTER,
    "Requests that reached the engine without our front end's signature; the strictest policy applied to them.",
)
TURNED_AWAY = Metric(
    "telltale_turned_away_total",
    MetricType.COUNTER,
    "Requests that got an error before anything looked at them: no key, another scope, too many, too large.",
    ("reason",),
)
OBSERVE_SECONDS = Metric(
    "telltale_observe_seconds",
    MetricType.HISTOGRAM,
    "Time the monitor took to score and judge one engine step.",
    (),
    SECONDS_BUCKETS,
)
OVERHEAD_SECONDS = Metric(
    "telltale_overhead_seconds",
    MetricType.HISTOGRAM,
    "Time that one step spends on being monitored, by phase: tap (in the forward pass; told by eager passes on a CPU), "
    "transfer (readouts to the scheduler), observe (scores and aggregates), policy (rules), report (telling the API "
    "process), api (what that makes of it).",
    ("phase",),
    SECONDS_BUCKETS,
)
HELD_BACK = Metric(
    "telltale_held_back_outputs", MetricType.GAUGE, "Outputs of an engine that wait for what follows to be scored."
)
TENANT_REQUESTS = Metric(
    "telltale_tenant_requests_total",
    MetricType.COUNTER,
    "Requests that ended, by tenant of the policy file ('-': nobody of its tenants) and action that was enforced.",
    ("tenant", "action"),
)
TENANT_RULES = Metric(
    "telltale_tenant_rules_total",
    MetricType.COUNTER,
    "Rules that fired on a tenant's requests, once per request, in shadow too.",
    ("tenant", "rule"),
)
TENANT_TOKENS = Metric(
    "telltale_tenant_tokens_scored_total", MetricType.COUNTER, "Token positions of a tenant's requests.", ("tenant",)
)
READY = Metric(
    "telltale_ready", MetricType.GAUGE, "1 while monitoring is proved: the start's proof held and the canary passes."
)
CANARY_OK = Metric("telltale_canary_ok", MetricType.GAUGE, "1 if the newest canary of every engine passed, else 0.")
CANARY_LAST_SUCCESS = Metric(
    "telltale_canary_last_success_timestamp_seconds",
    MetricType.GAUGE,
    "Unix time at which a round of canaries last passed on every engine.",
)
CANARY_SECONDS = Metric(
    "telltale_canary_seconds", MetricType.GAUGE, "Time that the newest round of canaries took, waiting included."
)
CANARY_DEVIATION = Metric(
    "telltale_canary_deviation_ratio",
    MetricType.GAUGE,
    "Largest distance of the newest canary's scores from the card's, as a share of what is allowed: above 1 it fails.",
)
CANARY_FAILURES = Metric(
    "telltale_canary_failures_total", MetricType.COUNTER, "Canaries that did not pass, by reason.", ("reason",)
)
POLICY_INFO = Metric(
    "telltale_policy_info", MetricType.GAUGE, "1 for the plan that runs, by the digest of policy and bank.", ("digest",)
)
POLICY_RELOADS = Metric(
    "telltale_policy_reloads_total",
    MetricType.COUNTER,
    "Times that a running server was given a policy, by what came of it: only applied has changed anything.",
    ("outcome",),
)
ARTIFACT_INFO = Metric(
    "telltale_artifact_info",
    MetricType.GAUGE,
    "1 for each detector that runs, by its kind and the SHA-256 of its tensors.",
    ("detector", "kind", "digest"),
)
AUDIT_EVENTS = Metric(
    "telltale_audit_events_total", MetricType.COUNTER, "Events that were stored in the audit trail.", ("kind",)
)
AUDIT_SECONDS = Metric(
    "telltale_audit_seconds",
    MetricType.HISTOGRAM,
    "Time from an event to its being stored; with before_release a response waits so long.",
    (),
    AUDIT_BUCKETS,
)
AUDIT_QUEUE = Metric("telltale_audit_queue", MetricType.GAUGE, "Events that wait to be stored.")
AUDIT_DROPPED = Metric(
    "telltale_audit_dropped_total", MetricType.COUNTER, "Events that were not stored because the queue was full."
)
AUDIT_ERRORS = Metric(
    "telltale_audit_errors_total", MetricType.COUNTER, "Failed attempts to write to the audit trail; each is repeated."
)
AUDIT_WITHHELD = Metric(
    "telltale_audit_withheld_total",
    MetricType.COUNTER,
    "Responses and requests that got an error because their event was or would have been not stored.",
)
SESSIONS = Metric(
    "telltale_sessions", MetricType.GAUGE, "Sessions that are remembered in memory; 0 where a database holds them."
)
SESSION_REQUESTS = Metric(
    "telltale_session_requests_total",
    MetricType.COUNTER,
    "Requests under a policy with rules over conversations, by whether they named a session.",
    ("named",),
)
SESSION_RULES_FIRED = Metric(
    "telltale_session_rules_fired_total",
    MetricType.COUNTER,
    "Rules over conversations that fired, once per session until they stand no more.",
    ("rule", "action", "mode", "policy"),
)
SESSIONS_FORGOTTEN = Metric(
    "telltale_sessions_forgotten_total",
    MetricType.COUNTER,
    "Sessions that were forgotten before they ended, because there was no room; never one that is blocked or steered.",
)
SESSION_STORE_ERRORS = Metric(
    "telltale_session_store_errors_total",
    MetricType.COUNTER,
    "Times that the database of sessions could not be used: read, when a request came; update, when one ended.",
    ("operation",),
)
PROBING = Metric(
    "telltale_probing_total",
    MetricType.COUNTER,
    "Times that a tenant's requests lay near a threshold more often than benign ones would.",
    ("detector", "policy"),
)
SINK_DELIVERED = Metric(
    "telltale_sink_delivered_total", MetricType.COUNTER, "Messages that a sink has taken.", ("sink",)
)
SINK_FAILED = Metric(
    "telltale_sink_failed_total",
    MetricType.COUNTER,
    "Failed attempts to deliver a message to a sink, by reason.",
    ("sink", "reason"),
)
SINK_DEAD_LETTERS = Metric(
    "telltale_sink_dead_letters_total",
    MetricType.COUNTER,
    "Messages that were given up, and wait in the file of dead letters.",
    ("sink",),
)
SINK_DROPPED = Metric(
    "telltale_sink_dropped_total",
    MetricType.COUNTER,
    "Messages that were not taken in because too many waited for their sink.",
    ("sink",),
)
SINK_QUEUE = Metric("telltale_sink_queue", MetricType.GAUGE, "Messages that wait for their sink.", ("sink",))
SINK_SECONDS = Metric(
    "telltale_sink_seconds",
    MetricType.HISTOGRAM,
    "Time from an event to its delivery to a sink.",
    ("sink",),
    SINK_BUCKETS,
)
EXPLANATIONS = Metric(
    "telltale_explanations_total",
    MetricType.COUNTER,
    "Flagged requests by whether it was told which latents were active: explained, dropped (queue full) or failed.",
    ("outcome",),
)
EXPLANATIONS_WAITING = Metric(
    "telltale_explanations_waiting", MetricType.GAUGE, "Flagged requests that wait to be explained."
)

CATALOGUE: tuple[Metric, ...] = (
    REQUESTS,
    ACTIONS,
    OUTCOMES,
    DETECTOR_SCORE,
    DETECTOR_THRESHOLD,
    DETECTOR_FIRED,
    FLAGGED,
    DETECTION_DELAY,
    SCORE_PSI,
    SCORE_KS,
    FAMILIAR,
    ALARM_EVIDENCE,
    ALARM_EXCEEDED,
    RULE_TARGET_FPR,
    TOKENS_SCORED,
    TOKENS_SKIPPED,
    GAPS,
    PROMPT_EVENTS,
    TOKENS_STEERED,
    UNSIGNED,
    TURNED_AWAY,
    OBSERVE_SECONDS,
    OVERHEAD_SECONDS,
    HELD_BACK,
    TENANT_REQUESTS,
    TENANT_RULES,
    TENANT_TOKENS,
    READY,
    CANARY_OK,
    CANARY_LAST_SUCCESS,
    CANARY_SECONDS,
    CANARY_DEVIATION,
    CANARY_FAILURES,
    POLICY_INFO,
    POLICY_RELOADS,
    ARTIFACT_INFO,
    AUDIT_EVENTS,
    AUDIT_SECONDS,
    AUDIT_QUEUE,
    AUDIT_DROPPED,
    AUDIT_ERRORS,
    AUDIT_WITHHELD,
    SESSIONS,
    SESSION_REQUESTS,
    SESSION_RULES_FIRED,
    SESSIONS_FORGOTTEN,
    SESSION_STORE_ERRORS,
    PROBING,
    SINK_DELIVERED,
    SINK_FAILED,
    SINK_DEAD_LETTERS,
    SINK_DROPPED,
    SINK_QUEUE,
    SINK_SECONDS,
    EXPLANATIONS,
    EXPLANATIONS_WAITING,
)
