"""When the claims of a study were stated: before its results, or after how many of them.

`claims/000.json` is written when the first trial begins, and another file at each edit since: what decides the claims, the
looks, the time, and how many results there were. No file is changed later; each has the hash of the one before it.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from orchestrator.study.schema import Study
from trainables.config.value import digest
from trainables.storage.files import Storage, verify_checksum, with_checksum

FOLDER, REPORTS = "claims", "claims/reports"
Fields = Mapping[str, Any]


class Edit(NamedTuple):
    """A change of claims, or of the looks, after results."""

    name: str  # of the claim; "seeds" for the looks
    field: str  # empty where a whole claim was added or removed
    before: Any
    after: Any
    num_results: int
    time: str

    def text(self) -> str:
        what = f"{self.name}.{self.field}" if self.field else self.name
        return f"{what}: {_shown(self.before)} → {_shown(self.after)}"


class Stated(NamedTuple):
    """What is known of when a claim was stated."""

    num_results: int | None  # None: not known
    num_now: int

    def text(self) -> str:
        if self.num_results is None:
            return "not known to have been fixed before results"
        if self.num_results == 0:
            return "fixed before results"
        return f"stated after {self.num_results} of {self.num_now} results"


@dataclass(frozen=True)
class Entry:
    """What decided the claims from a moment on."""

    time: str  # UTC
    num_results: int  # trials of arms that were over
    looks: tuple[int, ...]
    claims: Mapping[str, Fields]
    previous: str = ""  # the hash of the file before


@dataclass(frozen=True)
class ClaimHistory:
    entries: tuple[Entry, ...] = ()
    num_results: int = 0  # there are now
    is_whole: bool = True  # no file is missing or was changed
    num_reports: int = 0
    next_file: int = 0
    is_new: bool = False  # the last entry has no file yet
    is_writable: bool = True

    @property
    def is_known(self) -> bool:
        """Whether the history reaches back to before the first result."""
        return bool(self.entries) and self.is_whole and self.entries[0].num_results == 0

    @property
    def fixed(self) -> Entry | None:
        """What was fixed before the first result."""
        before = [entry for entry in self.entries if entry.num_results == 0]
        return before[-1] if before and self.is_known else None

    @property
    def looks(self) -> tuple[int, ...]:
        return self.entries[-1].looks if self.entries else ()

    def stated(self, name: str) -> Stated:
        """Tells when a claim of the last entry was stated as it is now, under whatever name."""
        claim = self.entries[-1].claims[name]
        since = self.entries[-1]
        for entry in reversed(self.entries):
            if claim not in entry.claims.values():
                break
            since = entry
        is_first = since is self.entries[0]
        num = since.num_results if self.is_whole and not (is_first and since.num_results) else None
        return Stated(num, max(self.num_results, num or 0))

    @property
    def is_beyond_plan(self) -> bool:
        """Whether the numbers of seeds were changed after results."""
        return self.fixed is not None and self.looks != self.fixed.looks

    def edits(self) -> list[Edit]:
        """Returns all edits after results, in order."""
        start = max(0, sum(entry.num_results == 0 for entry in self.entries) - 1)
        pairs = zip(self.entries[start:], self.entries[start + 1 :], strict=False)
        return [edit for before, after in pairs for edit in _edits(before, after)]

    def with_now(self, study: Study, num_results: int, looks: tuple[int, ...] = ()) -> ClaimHistory:
        """Adds an entry where what decides the claims differs from the last one. `looks`: by default the study's."""
        claims, looks = _deciding(study), looks or study.looks
        now = replace(self, num_results=num_results)
        if self.entries and (self.entries[-1].claims, self.looks) == (claims, looks):
            return now
        entry = Entry(time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()), num_results, looks, claims)
        return replace(now, entries=(*self.entries, entry), is_new=True)


def read_history(home: Storage) -> ClaimHistory:
    """Reads the history of a study's folder."""
    names = [name for name in home.list(FOLDER) if re.fullmatch(r"\d+\.json", name)]
    entries, previous, is_whole = list[Entry](), "", True
    for number, name in enumerate(names):
        text = home.read(f"{FOLDER}/{name}") or b""
        try:
            found = verify_checksum(text)
            entries.append(Entry(**{**found, "looks": tuple(found["looks"])}))
            is_whole = is_whole and name == _file(number) and entries[-1].previous == previous
        except (ValueError, KeyError, TypeError, AttributeError):
            is_whole = False
        previous = hashlib.sha256(text).hexdigest()
    reports = home.read(REPORTS) or b""
    num_reports = int(reports) if reports.strip().isdigit() else 0
    next_file = 1 + int(names[-1].removesuffix(".json")) if names else 0
    return ClaimHistory(tuple(entries), 0, is_whole, num_reports, next_file)


def keep_history(home: Storage, history: ClaimHistory) -> None:
    """Writes the last entry, if it has no file yet. Raises OSError."""
    if history.is_new:
        number = history.next_file
        last = home.read(f"{FOLDER}/{_file(number - 1)}") if number else None
        entry = replace(history.entries[-1], previous=hashlib.sha256(last).hexdigest() if last is not None else "")
        home.create(f"{FOLDER}/{_file(number)}", with_checksum(vars(entry)))


def note_report(home: Storage, history: ClaimHistory) -> ClaimHistory:
    """Keeps the history, and counts the report that is being made, where the storage can be written."""
    try:
        keep_history(home, history)
        home.write(REPORTS, str(history.num_reports + 1).encode())
    except OSError:
        return replace(history, is_writable=False)
    return replace(history, num_reports=history.num_reports + 1)


def digest_of(study: Study) -> str:
    """Returns the hash of all that decides a study's claims."""
    return digest([_deciding(study), list(study.looks)])


def count_results(rows: Iterable[Mapping[Any, Any]]) -> int:
    """Counts the trials of arms that are over, those of arms that were changed since included."""
    return sum(row["kind"] == "trial" and isinstance(row["arm"], str) and row["status"] != "running" for row in rows)


def _deciding(study: Study) -> dict[str, Fields]:
    """Returns all fields that decide claims, as JSON has them.

    Of arms the names: what an arm trains is in the identity of its trials, so that a changed arm has no results yet.
    """
    phase = study.objective.phase
    claims = {n: {**c.judged(), "family": c.family, "phase": c.phase or phase} for n, c in study.claims.items()}
    decoded: dict[str, Fields] = json.loads(json.dumps(claims))
    return decoded


def _edits(before: Entry, after: Entry) -> Iterator[Edit]:
    about = (after.num_results, after.time)
    if before.looks != after.looks:
        yield Edit("seeds", "", _seeds(before.looks), _seeds(after.looks), *about)
    for name in {**before.claims, **after.claims}:
        old, new = before.claims.get(name), after.claims.get(name)
        if old is not None and new is not None:
            for field in {**old, **new}:
                if old.get(field) != new.get(field):
                    yield Edit(name, field, old.get(field), new.get(field), *about)
        elif new is not None and new not in before.claims.values():
            yield Edit(name, "", None, "added", *about)
        elif old is not None and old not in after.claims.values():
            yield Edit(name, "", "stated", "removed", *about)


def _seeds(looks: tuple[int, ...]) -> Any:
    return looks[0] if len(looks) == 1 else list(looks)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value) if value is not None else "none"


def _file(number: int) -> str:
    return f"{number:03d}.json"
