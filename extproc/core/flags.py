"""What a person wrote in the flag file and a program wrote beside it, as frozen values. Knows no file and no format."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum

from extproc.core.conditions import Condition


class Arm(StrEnum):
    """One of the two versions of a model; as the arm that a request was assigned it is called its cohort."""

    STABLE = "stable"
    CANARY = "canary"


class MissingUnit(StrEnum):
    """What a request without any unit gets."""

    STABLE = "stable"
    RANDOM = "random"


class SourceKind(StrEnum):
    """Where a unit is read from."""

    HEADER = "header"
    COOKIE = "cookie"
    RANDOM = "random"


@dataclass(frozen=True, slots=True)
class UnitSource:
    """One entry of a flag's `unit` list. `name` is the lower-case header name, the cookie's name as written, or ''."""

    kind: SourceKind
    name: str

    @property
    def header(self) -> str:
        """The request header that this source needs Envoy to forward."""
        match self.kind:
            case SourceKind.HEADER:
                return self.name
            case SourceKind.COOKIE:
                return "cookie"
            case SourceKind.RANDOM:
                return "x-request-id"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One stage of a rollout: the percentage, and what must be true before the next one."""

    percent: Decimal
    soak_s: float | None = None
    min_requests: int | None = None
    min_units: int | None = None
    approval: bool = False


class MarginKind(StrEnum):
    """What a margin is compared with: a factor of stable's value, a share of it, or a distance as it stands."""

    FACTOR = "x"
    SHARE = "%"
    DISTANCE = ""


@dataclass(frozen=True, slots=True)
class Margin:
    """How much worse than stable is too much: 1.2x is (1.2, FACTOR), 15% is (15, SHARE), 0.20 is (0.20, DISTANCE)."""

    value: Decimal
    kind: MarginKind

    def __str__(self) -> str:
        return f"{self.value}{self.kind}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Guardrail:
    """One guardrail as written; None means the default."""

    name: str
    rollback_if: Margin | None = None
    halt_if: Margin | None = None
    require: str | None = None
    direction: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """The plan that the controller follows for a flag that has one instead of a percentage."""

    steps: tuple[Step, ...]
    bake_s: float | None = None
    guardrails: tuple[Guardrail, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule: where `when` is true, `serve` decides, or a split of its own at `percent`; one of them is set."""

    name: str
    when: Condition
    serve: Arm | None = None
    percent: Decimal | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One flag as a person wrote it, checked and with its defaults filled in. It has a percent or a rollout."""

    key: str
    model: str
    salt: str
    percent: Decimal | None = None
    rollout: Rollout | None = None
    rules: tuple[Rule, ...] = ()
    unit: tuple[UnitSource, ...] = (
        UnitSource(SourceKind.HEADER, "x-user-id"),
        UnitSource(SourceKind.HEADER, "x-session-id"),
    )
    missing_unit: MissingUnit = MissingUnit.STABLE
    enabled: bool = True
    allow_force: bool = False
    description: str = ""
    owner: str = ""
    expires: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposure:
    """What the controller decided for one flag: how far its rollout is, and whether the warm gate lets anybody through.

    An exposure belongs to a salt: it says nothing about a flag whose salt has become another.
    """

    salt: str
    attempt: int = 0
    canary_version: str | None = None
    step: int = 0
    percent: Decimal = Decimal(0)
    cap: int = 100


@dataclass(frozen=True, slots=True)
class Exposures:
    """The machine's file as a value: `seq` grows by one with every write.

    `closed` is for a file that exists and could never be read: nobody is let through until it can.
    """

    seq: int = 0
    flags: Mapping[str, Exposure] = field(default_factory=dict)
    closed: bool = False

    def of(self, flag: Flag) -> Exposure | None:
        """The exposure that counts for this flag, or None: no entry, or one that was made for another salt."""
        if self.closed:
            return Exposure(salt=flag.salt, cap=0)
        exposure = self.flags.get(flag.key)
        return exposure if exposure is not None and exposure.salt == flag.salt else None


def wanted_percent(flag: Flag, exposure: Exposure | None) -> Decimal:
    """The percentage before the warm gate: what the person wrote, or where the rollout is (0 before it has begun)."""
    if flag.percent is not None:
        return flag.percent
    return exposure.percent if exposure is not None else Decimal(0)


def effective_percent(flag: Flag, exposure: Exposure | None) -> Decimal:
    """The percentage that is served: never above the cap, 0 while the flag is switched off."""
    if not flag.enabled:
        return Decimal(0)
    cap = Decimal(100 if exposure is None else exposure.cap)
    return min(wanted_percent(flag, exposure), cap)
