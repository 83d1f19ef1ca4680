"""Tenants: which policy whose requests get, and with which thresholds. As data, and made ready."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Self

from pydantic import Field, model_validator

from monitor.access import KeyDigest, PerMinute
from monitor.rule import Rule
from monitor.strict import Name, Strict
from monitor.when import Above, When
from probes.errors import did_you_mean

if TYPE_CHECKING:
    from monitor.config import Policy
    from monitor.yaml_file import Place, PolicyFile


class Tenant(Strict):
    """Whoever holds an API key."""

    name: Name
    key_sha256: KeyDigest = Field(description="SHA-256 of the API key, 64 hexadecimal digits in lower case")
    policy: Name = Field(description="the policy of its requests, unless by_model or by_header say another")
    by_model: dict[str, Name] | None = Field(
        default=None,
        min_length=1,
        description="policies by the model name that a request asks for (see --served-model-name); others are refused",
    )
    by_header: tuple[Name, ...] = Field(
        default=(),
        description="policies that a request may name in the header x-telltale-policy. Whoever holds this key chooses: "
        "give it to a trusted proxy alone",
    )
    above: dict[Name, Above] = Field(
        default_factory=dict, description="by a rule's name, the threshold in the place of its own"
    )

    requests_per_minute: PerMinute | None = Field(
        default=None, description="in the place of the limit that all keys have (access)"
    )

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if doubles := sorted({name for name in self.by_header if self.by_header.count(name) > 1}):
            raise ValueError(f"'by_header' names {doubles[0]!r} twice; name each once")
        return self

    @property
    def policies(self) -> tuple[str, ...]:
        """Every policy that its requests may get, each once."""
        return tuple(dict.fromkeys([self.policy, *(self.by_model or {}).values(), *self.by_header]))


@dataclass(frozen=True, slots=True)
class CompiledTenant:
    """A tenant and the names under which the plan knows its policies.

    Attributes:
        name: its own.
        policy: that it gets.
        by_model: that it gets for a model name; None where the name does not matter.
        by_header: by the name that the header says.
    """

    name: str
    policy: str
    by_model: Mapping[str, str] | None
    by_header: Mapping[str, str]


class Variant(NamedTuple):
    """A policy of the file, as it stands there or with a tenant's thresholds.

    Attributes:
        where: it stands.
        policy: its name is the plan's.
        tenant: position of the tenant whose thresholds it has; None if it has its own.
    """

    where: Place
    policy: Policy
    tenant: int | None = None


def variants(file: PolicyFile) -> Iterator[Variant]:
    """All policies that a plan has to hold: those of the file, then those with thresholds of tenants.

    Raises:
        PolicyError: a tenant names what is not there, or a policy is nobody's.
    """
    config = file.config
    positions = {policy.name: number for number, policy in enumerate(config.policies)}
    for number, tenant in enumerate(config.tenants):
        _require_known(file, number, tenant, positions)
    used = {name for tenant in config.tenants for name in tenant.policies}
    for name, position in positions.items():
        if position > 0 and name not in used:
            raise file.error(
                ("policies", position, "name"),
                f"is {name!r}, which no request would get: the first policy is everybody's, and no entry of 'tenants' "
                "names this one. Name it there, or leave it out.",
            )
        yield Variant(("policies", position), config.policies[position])
    for number, tenant in enumerate(config.tenants):
        for name in tenant.policies if tenant.above else ():
            policy = config.policies[positions[name]]
            rules = tuple(_with_threshold(rule, tenant.above.get(rule.name)) for rule in policy.rules)
            changed = policy.model_copy(update={"name": _name(tenant, name), "rules": rules})
            yield Variant(("policies", positions[name]), changed, number)


def compile_tenants(tenants: Sequence[Tenant]) -> Mapping[str, CompiledTenant]:
    """Tenants by the digest of their keys."""
    return MappingProxyType({tenant.key_sha256: _compile(tenant) for tenant in tenants})


def _compile(tenant: Tenant) -> CompiledTenant:
    by_model = tenant.by_model
    return CompiledTenant(
        tenant.name,
        _name(tenant, tenant.policy),
        {model: _name(tenant, policy) for model, policy in by_model.items()} if by_model is not None else None,
        {policy: _name(tenant, policy) for policy in tenant.by_header},
    )


def _name(tenant: Tenant, policy: str) -> str:
    """What the plan calls a tenant's policy; no policy of a file can have such a name."""
    return f"{policy}@{tenant.name}" if tenant.above else policy


def _require_known(file: PolicyFile, number: int, tenant: Tenant, positions: Mapping[str, int]) -> None:
    where: Place = ("tenants", number)
    named: list[tuple[Place, str]] = [
        (("policy",), tenant.policy),
        *((("by_model", model), policy) for model, policy in (tenant.by_model or {}).items()),
        *((("by_header", place), policy) for place, policy in enumerate(tenant.by_header)),
    ]
    for key, name in named:
        if name not in positions:
            raise file.error((*where, *key), f"is {name!r}. {did_you_mean(name, positions)}")
    rules = {rule.name: rule for name in tenant.policies for rule in file.config.policies[positions[name]].rules}
    for name in tenant.above:
        key = (*where, "above", name)
        if name not in rules:
            raise file.error(key, f"{name!r} is no rule of this tenant's policies. {did_you_mean(name, rules)}")
        if not isinstance(rules[name].when, When):
            raise file.error(
                key,
                f"the rule {name!r} joins, weighs or accumulates verdicts: it has no one calibrated statistic. Write a "
                "policy of its own for this tenant.",
            )


def _with_threshold(rule: Rule, above: Above | None) -> Rule:
    if above is None or not isinstance(rule.when, When):
        return rule
    return rule.model_copy(update={"when": rule.when.model_copy(update={"above": above})})
