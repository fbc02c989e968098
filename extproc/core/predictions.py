"""What the two arms of one comparison predicted, one vote per request, in memory that does not grow with traffic.

The categories are the stable arm's: its 19 most frequent labels and the rest, or bins at the quantiles of its numbers,
or bins of 18 features of its vectors. Votes are kept as the texts that they are until the stable arm has
REFERENCE_VOTES of them; the first reading after that (or the first text too many to keep) cuts the categories and
freezes them, so that a later tick is counted in the categories of an earlier one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import unquote

from extproc.core.numberbins import (
    UNPARSABLE,
    NumberBins,
    Table,
    cut,
    number_of,
    parse_bins,
    plain_bins,
    slot_of,
)
from extproc.core.outcomes import Arm
from extproc.core.vectorbins import VectorBins, parse_vector_bins, plain_vector_bins, vector_bins

__all__ = [
    "NUMBER", "OTHER", "UNPARSABLE", "VECTOR", "Kind", "LabelBins", "PredictionComparison", "Table", "shown_as", "vote",
    "vote_of",
]  # fmt: skip

SHOWN = 32
"""Predictions that the response header shows at most."""
REFERENCE_VOTES = 2_000
NUMBER_BINS = 20
TOP_LABELS = 19
MAX_LABELS = 1_000
"""Labels of one arm that are counted exactly. The canary's may be as many again, so that what it makes up cannot
displace a label that stable has."""
MAX_TEXTS = 2_000
"""Different texts of one arm kept while nobody knows yet what they are."""
MAX_TEXT = 1_024
"""Characters of one text: a vector of 32 components in full precision."""
MAX_LABEL = 128
OTHER = "(other)"
NUMBER = "(number)"
"""What is shown of a prediction that is a number: the number itself is nobody's business but the bins'."""
VECTOR = "(vector)"
_PENDING = 256
"""Vectors that are binned together: one alone costs ten times as much."""


class Kind(StrEnum):
    """What predictions are."""

    AUTO = "auto"
    LABELS = "labels"
    NUMBERS = "numbers"
    VECTOR = "vector"


def vote(header: str, count: int | None, unit_hash: int) -> str | None:
    """The one prediction of a response that counts, as it stands in the header; None when there is none.

    The index is `unit_hash mod min(count, SHOWN)`, so that a big batch is one vote and a unit cannot choose which. A
    header shorter than `count` says is taken for as long as it is. An empty header is the empty label if `count` is 1.
    """
    if count == 1 and "," not in header:
        return header.strip()
    if not header:
        return None
    items = header.split(",", SHOWN)
    n = min(len(items), SHOWN) if count is None else min(len(items), SHOWN, count)
    return items[unit_hash % n].strip() if n > 0 else None


def _whole(header: str, count: int | None, _unit_hash: int) -> str | None:
    return header if header and count != 0 else None


def vote_of(kind: str) -> Callable[[str, int | None, int], str | None]:
    """How a response votes: a vector's header is one prediction with its components, any other a list of them."""
    return _whole if kind == Kind.VECTOR else vote


@lru_cache(4096)
def decoded(item: str) -> str:
    """The label that a percent-encoded item stands for; bytes that are no UTF-8 are replaced."""
    return unquote(item, errors="replace")


def kind_of(texts: Mapping[str, int]) -> Kind:
    """What a sample of predictions is: labels or numbers. A vector has to be declared.

    Numbers, if at least 95 % of them are, and either more than 1 % have a fraction or more than 200 are different. So
    the digits 0 .. 9 and other class ids are labels, a score of 0.731 is a number and minutes from 0 to 1000 are too.
    """
    total = sum(texts.values())
    numbers = {text: number for text in texts if (number := number_of(text)) is not None}
    if not numbers or sum(texts[text] for text in numbers) < 0.95 * total:
        return Kind.LABELS
    fractions = sum(texts[text] for text, number in numbers.items() if not number.is_integer())
    return Kind.NUMBERS if fractions > 0.01 * total or len(numbers) > 200 else Kind.LABELS


def shown_as(kind: str, item: str) -> str:
    """The label under which a prediction is counted where people see it; `item` is as it stood in the header.

    Of numbers and vectors it says that they are, and no more: each is different, and raw outputs are not kept. What
    nobody has said or told yet is a number if it has a fraction: 3 may be a class, 0.731 is none.
    """
    if kind == Kind.VECTOR:
        return VECTOR
    label = decoded(item) if "%" in item else item
    if kind == Kind.LABELS:
        return label[:MAX_LABEL]
    number = number_of(label)
    if kind == Kind.NUMBERS:
        return UNPARSABLE if number is None else NUMBER
    return label[:MAX_LABEL] if number is None or number.is_integer() else NUMBER


class LabelBins(NamedTuple):
    """The labels that are told apart."""

    labels: tuple[str, ...]

    def place(self, texts: Mapping[str, int]) -> list[int]:
        """Counts of these labels, and of all others together."""
        known = [texts.get(label, 0) for label in self.labels]
        return [*known, sum(texts.values()) - sum(known)]


Reference = LabelBins | NumberBins | VectorBins


def reference_of(kind: Kind, texts: Mapping[str, int]) -> Reference:
    """The categories that a sample of the stable arm gives."""
    match kind_of(texts) if kind is Kind.AUTO else kind:
        case Kind.NUMBERS:
            numbers = ((number_of(text), n) for text, n in texts.items())
            return cut([number for number, n in numbers if number is not None for _ in range(n)], NUMBER_BINS)
        case Kind.VECTOR:
            return vector_bins(texts)
        case _:
            return LabelBins(tuple(_most(texts)[:TOP_LABELS]))


def _most(texts: Mapping[str, int]) -> list[str]:
    return sorted(texts, key=lambda text: (-texts[text], text))


def plain_reference(reference: Reference) -> dict[str, Any]:
    """The categories as JSON can hold them."""
    match reference:
        case LabelBins(labels):
            return {"labels": list(labels)}
        case NumberBins():
            return plain_bins(reference)
        case VectorBins():
            return plain_vector_bins(reference)


def parse_reference(data: Any) -> Reference:
    """Categories from what JSON gave. Raises ValueError for anything else."""
    match data:
        case {"labels": [*labels]} if all(isinstance(label, str) for label in labels):
            return LabelBins(tuple(dict.fromkeys(labels)))
        case {"edges": _, "positions": _}:
            return parse_bins(data)
        case {"mean": _, "features": _}:
            return parse_vector_bins(data)
        case _:
            raise ValueError("no reference: labels, edges with positions, or a mean with features")


@dataclass(slots=True)
class PredictionComparison:
    """Predictions of stable and canary side by side.

    `kind` says what they are, `auto` leaves it to `kind_of`. With a `reference` (of an earlier step, of another
    replica) the categories are frozen from the start. Arms are "stable" and "canary"; another one is a KeyError.
    """

    kind: str = Kind.AUTO
    reference: Reference | None = None
    _texts: dict[str, dict[str, int]] = field(default_factory=lambda: {arm: {} for arm in Arm})
    _overflow: dict[str, int] = field(default_factory=lambda: dict.fromkeys(Arm, 0))
    _slots: dict[str, list[int]] = field(default_factory=dict)
    _pending: dict[str, dict[str, int]] = field(default_factory=lambda: {arm: {} for arm in Arm})
    _edges: tuple[float, ...] | None = None
    _max_texts: int = MAX_TEXTS
    _max_text: int = MAX_TEXT

    def __post_init__(self) -> None:
        if self.reference is not None:
            self._freeze(self.reference)
        elif Kind(self.kind) is Kind.LABELS:
            self._max_texts, self._max_text = MAX_LABELS, MAX_LABEL

    @property
    def settled(self) -> bool:
        """Whether what `export` gives only grows from now on: with labels always, otherwise once frozen."""
        return self.reference is not None or self.kind == Kind.LABELS

    @property
    def told(self) -> Kind:
        """What the predictions are, as declared or as the categories say; `auto` until there are some."""
        match self.reference:
            case NumberBins():
                return Kind.NUMBERS
            case LabelBins():
                return Kind.LABELS
            case VectorBins():
                return Kind.VECTOR
            case None:
                return Kind(self.kind)

    def looks_like(self) -> Kind:
        """The same, and before that what the votes until now look like: it may change."""
        self._settle()
        if self.told is not Kind.AUTO:
            return self.told
        return kind_of(self._texts[Arm.STABLE] or self._texts[Arm.CANARY])

    def observe(self, arm: str, header: str, count: int | None, unit_hash: int) -> None:
        """Counts the vote of one response of an arm, from its two headers and its unit's hash."""
        item = (_whole if self.kind == Kind.VECTOR else vote)(header, count, unit_hash)
        if item is not None:
            self.add(arm, item)

    def add(self, arm: str, item: str, n: int = 1) -> None:
        """Counts a vote of an arm `n` times; `item` is as it stood in the header."""
        if self._edges is not None:
            self._slots[arm][slot_of(self._edges, item)] += n
        else:
            self._count(arm, decoded(item) if "%" in item else item, n)

    def _count(self, arm: str, text: str, n: int) -> None:
        if self._edges is not None:
            self._slots[arm][slot_of(self._edges, text)] += n
        elif isinstance(self.reference, VectorBins):
            self._count_vector(arm, text, n)
        elif text in self._texts[arm]:
            self._texts[arm][text] += n
        else:
            self._count_new(arm, text[: self._max_text], n)

    def _count_new(self, arm: str, text: str, n: int) -> None:
        texts = self._texts[arm]
        if text in texts or len(texts) < self._max_texts or (arm == Arm.CANARY and text in self._texts[Arm.STABLE]):
            texts[text] = texts.get(text, 0) + n
        elif self.reference is None and arm == Arm.STABLE:
            self._freeze(reference_of(Kind(self.kind), texts))
            self._count(arm, text, n)
        else:
            self._overflow[arm] += n

    def _count_vector(self, arm: str, text: str, n: int) -> None:
        pending = self._pending[arm]
        pending[text[:MAX_TEXT]] = pending.get(text[:MAX_TEXT], 0) + n
        if len(pending) >= _PENDING:
            self._place_pending()

    def _settle(self) -> None:
        """Before anything is read. Not sooner: a batch of votes may come sorted, and its beginning is no sample."""
        if self.reference is None and sum(self._texts[Arm.STABLE].values()) >= REFERENCE_VOTES:
            self._freeze(reference_of(Kind(self.kind), self._texts[Arm.STABLE]))
        self._place_pending()

    def _place_pending(self) -> None:
        if isinstance(self.reference, VectorBins):
            for arm, pending in self._pending.items():
                if pending:
                    self._slots[arm] = _sum(self._slots[arm], self.reference.place(pending))
                    pending.clear()

    def _freeze(self, reference: Reference) -> None:
        """From here on votes are counted in these categories, those that were kept as texts too."""
        self.reference = reference
        if isinstance(reference, LabelBins):
            if self._max_texts > MAX_LABELS:
                self._max_texts, self._max_text = MAX_LABELS, MAX_LABEL
                for arm in Arm:
                    self._trim(arm, self._texts[arm])
            return
        self._slots = {arm: reference.place(texts) for arm, texts in self._texts.items()}
        for texts in self._texts.values():
            texts.clear()
        if isinstance(reference, NumberBins):
            self._edges = reference.edges

    def _trim(self, arm: Arm, texts: dict[str, int]) -> None:
        """Keeps the most frequent labels, as many as labels may be."""
        self._texts[arm] = {}
        for text in _most(texts):
            self._count_new(arm, text[:MAX_LABEL], texts[text])

    def tables(self) -> list[Table]:
        """The counts of both arms: one table, or one for each of a vector's 18 features.

        Before the categories are frozen they are those that stable's votes until now would give, and may change.
        """
        self._settle()
        reference = self.reference or reference_of(Kind(self.kind), self._texts[Arm.STABLE])
        if isinstance(reference, LabelBins):
            stable, canary = (reference.place(self._texts[arm]) for arm in Arm)
            stable[-1] += self._overflow[Arm.STABLE]
            canary[-1] += self._overflow[Arm.CANARY]
            return [Table("", stable, canary, [*reference.labels, OTHER], None)]
        stable, canary = (self._slots.get(arm) or reference.place(self._texts[arm]) for arm in Arm)
        if isinstance(reference, NumberBins):
            return [reference.table("", stable, canary)]
        return reference.tables(stable, canary)

    def counts(self) -> tuple[list[int], list[int], list[str]]:
        """Stable's counts, canary's counts and the names of the categories; a vector's 18 tables one after another."""
        stable, canary, names = [], [], []
        for table in self.tables():
            stable += table.stable
            canary += table.canary
            names += [f"{table.name} {name}" if table.name else name for name in table.names]
        return stable, canary, names

    def top(self, arm: str, limit: int = 5) -> list[tuple[str, int]]:
        """What an arm predicted most, with its number: labels, or ranges of numbers; nothing for vectors."""
        self._settle()
        reference = self.reference or reference_of(Kind(self.kind), self._texts[Arm.STABLE])
        if isinstance(reference, VectorBins):
            return []
        counted = self._texts[arm]
        if isinstance(reference, NumberBins):
            table = self.tables()[0]
            row = table.stable if arm == Arm.STABLE else table.canary
            counted = {name: n for name, n in zip(table.names, row, strict=True) if n}
        return [(text, counted[text]) for text in _most(counted)[:limit]]

    def unplaced(self, arm: str) -> int:
        """Votes in no category: numbers or vectors that came before stable had cut the bins, and too many to keep."""
        return 0 if isinstance(self.reference, LabelBins) else self._overflow[arm]

    def export(self) -> dict[str, int]:
        """All counts as one flat mapping; two replicas' are merged by adding if their references are the same.

        Keys: the arm, then `=` and a text, `#` and the number of a category, or `~` for what was too much to keep.
        """
        self._settle()
        found = {f"{arm}~": n for arm, n in self._overflow.items() if n}
        for arm, texts in self._texts.items():
            found.update({f"{arm}={text}": n for text, n in texts.items()})
        for arm, slots in self._slots.items():
            found.update({f"{arm}#{slot}": n for slot, n in enumerate(slots) if n})
        return found

    def absorb(self, counts: Mapping[str, int]) -> None:
        """Adds what another comparison with the same reference exported. ValueError, and nothing added, for others."""
        parsed = [(*self._parse_key(key), n) for key, n in counts.items()]
        if any(type(n) is not int or n < 0 for *_, n in parsed):
            raise ValueError("no counts: a number below 0, or none")
        for arm, mark, rest, n in parsed:
            if mark == "=":
                self._count(arm, rest, n)
            elif mark == "#":
                self._slots[arm][int(rest)] += n
            else:
                self._overflow[arm] += n

    def _parse_key(self, key: str) -> tuple[str, str, str]:
        for arm in Arm:
            mark, rest = key[len(arm) : len(arm) + 1], key[len(arm) + 1 :]
            if key.startswith(arm) and (
                mark == "="
                or (mark == "~" and not rest)
                or (mark == "#" and rest.isdecimal() and int(rest) < len(self._slots.get(arm, ())))
            ):
                return arm, mark, rest
        raise ValueError(f"no counts of this comparison: {key!r}")


def _sum(first: list[int], second: list[int]) -> list[int]:
    return [one + other for one, other in zip(first, second, strict=True)]
