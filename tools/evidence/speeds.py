"""Speed records in all their layouts as rows of one kind: what was measured, and what is required."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evidence.record import Claim, markdown, read, slug, verdict


@dataclass(frozen=True)
class Speed:
    """One measured speed. unit: "events/s", ...; "s" and "ms", of which less is better."""

    name: str
    value: float
    unit: str
    required: float | None = None
    quartiles: tuple[float, float] | None = None

    @property
    def at_most(self) -> bool:
        """Whether less is better."""
        return self.unit in ("s", "ms", "times")

    @property
    def met(self) -> str:
        """met, NOT met, or nothing where nothing is required."""
        return "" if self.required is None else verdict(self.value, self.required, at_most=self.at_most)

    def over(self, before: Speed) -> float:
        """How many times as fast as `before`."""
        return before.value / self.value if self.at_most else self.value / before.value

    def text(self) -> str:
        """The value with as many digits as it deserves, and its quartiles."""
        spread = "" if self.quartiles is None else f" [{plain(self.quartiles[0])}, {plain(self.quartiles[1])}]"
        return plain(self.value) + spread


def plain(x: float) -> str:
    """Three digits below 100, whole numbers above."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def limit(x: float) -> str:
    """A requirement as it was set."""
    return f"{x:,.0f}" if x >= 1000 else f"{x:g}"


def speeds(record: Any) -> dict[str, Speed]:
    """Every speed of a record that one of the suites wrote, by name."""
    return {speed.name: speed for speed in _all(record)}


def _all(record: Any) -> Iterator[Speed]:
    if isinstance(record, Mapping) and "results" in record:
        for name, row in record["results"].items():
            if "step_s" in row:
                yield Speed(f"step with {name}", 1e3 * row["step_s"]["median_s"], "ms")
        return
    rows = record if isinstance(record, list) else record.get("rows", record.get("records", []))
    for row in rows:
        found = _speed(row)
        if found is not None:
            yield found


def _speed(row: Mapping[str, Any]) -> Speed | None:
    name = row.get("stage") or row.get("name") or " ".join(str(row[k]) for k in ("bench", "way") if k in row)
    name += "".join(f" {key}={row[key]}" for key in ("n", "count", "T", "heads", "dim") if key in row)
    rates = [key for key, value in row.items() if key.endswith("_per_s") and value]
    if rates:
        # What rh-memory asks of several readouts is targets, of one readout windows.
        several = "targets_per_s" in rates and row["targets_per_s"] < 20 * row["windows_per_s"]
        key = "targets_per_s" if several else rates[0]
        low_high = row.get("quartiles")
        quartiles = (low_high[0], low_high[1]) if low_high else None
        return Speed(name, row[key], key.replace("_per_s", "/s"), row.get("required"), quartiles)
    if row.get("seconds"):
        return Speed(name, row["seconds"], "s", row.get("required"))
    if row.get("ms"):
        return Speed(name, row["ms"], "ms")
    if row.get("median_s"):
        return Speed(name, 1e3 * row["median_s"], "ms")
    return None


def table(records: Mapping[str, str], names: Mapping[str, str] | None = None) -> str:
    """Rows of speeds with a column per record. records: a column's title -> path. names: what to call some rows."""
    read_in = {title: speeds(read(path)) for title, path in records.items()}
    body = []
    for name in dict.fromkeys(name for found in read_in.values() for name in found):
        here = [found.get(name) for found in read_in.values()]
        known = [s for s in here if s is not None]
        required = next((limit(s.required) for s in known if s.required is not None), "")
        verdicts = [s.met for s in known if s.met]
        met = " / ".join(verdicts[:1] if len(set(verdicts)) == 1 else verdicts).replace("NOT met", "**NOT met**")
        body.append(
            [
                (names or {}).get(name, name),
                known[0].unit,
                required,
                *("" if s is None else s.text() for s in here),
                met,
            ]
        )
    spread = any(speed.quartiles for found in read_in.values() for speed in found.values())
    header = ["median [quartiles]" if spread else "median", "unit", "required", *records, ""]
    return markdown(header, body, "llrr".ljust(3 + len(records), "r") + "l")


def claims(part: str, path: str, where: str, label: str) -> list[Claim]:
    """A claim for every speed of a record that something is required of. where: "on one NVIDIA H200"."""
    found = []
    for speed in speeds(read(path)).values():
        if speed.required is None:
            continue
        bound = f"{'at most' if speed.at_most else 'at least'} {limit(speed.required)} {speed.unit}"
        found.append(
            Claim(
                f"{part}/speed-{_slug(path)}-{_slug(speed.name)}",
                f"{speed.name} {where}: {plain(speed.value)} {speed.unit} ({label}); required {bound}.",
                speed.unit,
                [speed.value],
                speed.met,
                [path],
                interval=speed.quartiles,
                test="median of repeats, quartiles" if speed.quartiles else "median of repeats",
                required=bound,
            )
        )
    return found


def requirements(part: str, path: str, where: str) -> tuple[str, list[Claim]]:
    """The table and the claims of a record that judges itself: "requirements" [{what, measured, required, met}]."""
    rows: Sequence[Mapping[str, Any]] = read(path).get("requirements", [])
    words = {True: "met", False: "NOT met"}
    body = [[r["what"], r["required"], f"{r['measured']:.3g}", words[r["met"]]] for r in rows]
    made = [
        Claim(
            f"{part}/required-{_slug(path)}-{_slug(r['what'])}",
            f"{r['what']} {where}: {r['measured']:.3g}, required {r['required']}.",
            r["what"],
            [r["measured"]],
            words[r["met"]],
            [path],
            test="ratio of medians",
            required=r["required"],
        )
        for r in rows
    ]
    return markdown(["what", "required", "measured", ""], body, "llrl"), made


def _slug(text: str) -> str:
    """For a file name: a record's last part, a row's name."""
    return slug(text.rsplit("/", 1)[-1].removesuffix(".json"))
