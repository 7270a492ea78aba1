"""The verdict on a run, a row for each thing that had to hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abuse_latencies import TOLERANCE, Window
from abuse_slope import METHOD, Growth

COUNTERS = ("ouroboros_faults_total", "ouroboros_pool_saves_total",
            "ouroboros_pool_save_failures_total", "ouroboros_paused")  # fmt: skip
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"


@dataclass(frozen=True)
class Row:
    """A thing that had to hold; ``passed`` is None where it could not be judged."""

    name: str
    passed: bool | None
    found: str

    @property
    def verdict(self) -> str:
        """In a word."""
        return {True: "pass", False: "FAIL", None: "not judged"}[self.passed]


def requests(counts: Mapping[str, int], failures: Sequence[Mapping[str, Any]]) -> Row:
    """No request may be lost or answered wrongly, but for those that a kill cut."""
    found = (
        f"{counts.get('answered', 0)} answered, {counts.get('left', 0)} left by their clients "
        f"({counts.get('left mid-stream', 0)} mid-stream), "
        f"{counts.get('cut', 0)} cut by kills and {counts.get('refused', 0)} refused meanwhile, "
        f"all asked again; {len(failures)} failed"
    )
    if failures:
        found += f", the first: {'; '.join(failures[0]['problems'])[:300]}"
    return Row("requests", not failures and counts.get("answered", 0) > 0, found)


def connected(samples: Sequence[int], wanted: int) -> Row:
    """As many connections as there are clients; an active one may be between two of its own."""
    if not samples:
        return Row("connections", False, "none seen")
    middle = sorted(samples)[len(samples) // 2]
    return Row("connections", middle >= 0.95 * wanted, f"{middle} open (median), {wanted} clients")


def log(complaints: Sequence[str]) -> Row:
    """No error in a server's log before its kill."""
    found = "no ERROR or traceback" if not complaints else "; ".join(complaints)[:600]
    return Row("logs", not complaints, found)


def memory(found: Growth, judged: bool) -> Row:
    """Resident memory of the longest life is flat after its warm-up, and in its latter half."""
    if found.latter is None or found.warm is None:
        return Row("memory", None if not judged else False, "too few samples")
    text = (
        f"{found.latter} of {found.latter.mean / 1e6:.0f} MB in the latter half of the longest "
        f"life, {found.warm} without its first minutes; {METHOD}"
    )
    return Row("memory", found.warm.flat and found.latter.flat if judged else None, text)


def same_texts(checks: Sequence[Mapping[str, Any]], needed: int) -> Row:
    """The probes have vanilla's answers: at the start, after each restart and at the end."""
    found = ", ".join(f"{one['when']} {one['right']}/{one['of']}" for one in checks)
    right = all(one["right"] == one["of"] for one in checks) and len(checks) >= needed
    return Row("deterministic texts", right, f"vanilla's: {found}")


def latency(windows: Sequence[Window], judged: bool) -> Row:
    """Probes after the first window, which the last one has together, take no longer; and those of
    no window certainly do.
    """
    *windows, rest = windows
    if rest.ratio is None:
        return Row("latency", False if judged else None, "no window besides the first one")
    text = ", ".join(f"{one.ratio - 1:+.1%}" for one in windows[1:] if one.ratio is not None)
    found = (
        f"median {windows[0].seconds:.2f} s in the first window, then {rest.ratio - 1:+.1%} "
        f"(limit {TOLERANCE:.0%}); window by window {text}"
    )
    passed = rest.within and not any(one.slower for one in windows)
    return Row("latency", passed if judged else None, found)


def speculation(counters: Sequence[Mapping[str, float]]) -> Row:
    """Every life of the server accepted drafted tokens."""
    accepted = [int(one.get(ACCEPTED, 0)) for one in counters]
    return Row("speculation", bool(accepted) and all(accepted), f"accepted {accepted} tokens")


def events(rows: Sequence[Mapping[str, Any]], planned: int) -> Row:
    """Every event had its effect and was got over; one that cannot be had here is no failure."""
    bad = [f"{row['event']}: {', '.join(row['problems'])}" for row in rows if row["problems"]]
    skipped = [f"{row['event']} ({row['skipped']})" for row in rows if "skipped" in row]
    text = f"{len(rows) - len(skipped)} of {planned} happened"
    if skipped:
        text += f"; skipped: {', '.join(skipped)}"
    if bad:
        text += f"; {'; '.join(bad)}"
    return Row("events", not bad and len(rows) == planned, text)


def own_counters(counters: Sequence[Mapping[str, float]]) -> Row:
    """Our counters at the end of each life: what was broken is no fault of drafting."""
    known = [name for name in COUNTERS if any(name in one for one in counters)]
    if not known:
        return Row("counters", None, "no ouroboros_* on /metrics")
    text = "; ".join(f"{name} {[int(one.get(name, 0)) for one in counters]}" for name in known)
    return Row("counters", not sum(one.get(COUNTERS[0], 0) for one in counters), text)


def at_rest(left: Sequence[str]) -> Row:
    """Without clients the server holds nothing."""
    return Row("idle at the end", not left, "; ".join(left) or "no request, no KV block")


def ended(why: str | None) -> Row:
    """The run came to its end."""
    return Row("run", why is None, why or "to its end")
