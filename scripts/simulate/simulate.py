"""Tries the adaptive policy on recorded traces, against every fixed setting of a list.

\b
    python scripts/simulate/record_trace.py --target DIR --draft-model DIR --prompts FILE \
        --out TRACE
    python scripts/simulate/record_trace.py --target CHAT_MODEL --tasks FILE --out TRACE
    python scripts/simulate/simulate.py --trace code=TRACE --costs FILE.costs.json --out ROWS

No model runs here: what the target wrote and the draft model would have said comes from the
trace, drafting, trees, pool and policy are the plugin's own, and time is what the costs of an
engine (as saved beside a pool, or shown by `vllm-ouroboros doctor --costs`) say of each forward.
So settings can be compared without noise, and for machines that are not there. Each trace is also
tried with a draft model that is as sure of itself and always wrong ("misled"), unless it has none.
At batch 1 a trace of tasks has a line for each, by tokens after the first. Limits: behind a
token that the target did not write, the draft model says what it said at that place of the text,
and so does the target where a wrong branch is verified.
"""

from __future__ import annotations

import copy
import itertools
import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from simulate_engine import SimulatedEngine
from simulate_trace import Trace
from tqdm import tqdm

from vllm_ouroboros.cli.provenance import commit
from vllm_ouroboros.policy.forward_costs import Costs, read_costs

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)

DRAFT = "recorded"  # any name: the trace's draft model stands in
FIXED: dict[str, tuple[dict[str, Any] | None, int]] = {
    "vanilla": (None, 0),
    **{
        f"pool, K={k}": ({"draft_tokens": 1, "num_suffixes": k, "adaptive": False}, 1 + 6 * k)
        for k in (1, 3)
    },
    **{
        f"γ={gamma}, K={k}, W={w}": (
            {
                "draft_model": DRAFT, "draft_tokens": gamma, "num_suffixes": k,
                "window_size": w, "adaptive": False,
            },
            gamma + 6 * k,
        )
        for gamma, k, w in itertools.product((2, 4, 8), (0, 1, 3), (0, 10))
    },
}  # fmt: skip
"""Settings without the policy, by name: the plugin's options and the node budget."""
NODES = 26  # of the policy's trees


def adaptive(draft_model: str | None = DRAFT) -> tuple[dict[str, Any], int]:
    """The setting of the policy."""
    return {"draft_model": draft_model}, NODES


class Draft(StrEnum):
    """Whose draft model."""

    recorded = "recorded"
    misled = "misled"


def compare_settings(
    trace: Trace, costs: Costs, batch: int, settings: dict[str, tuple[dict[str, Any] | None, int]]
) -> list[dict[str, Any]]:
    """Serve a trace under each setting; a row for each, with tokens per second of its clock."""
    rows = []
    for name, (options, nodes) in settings.items():
        engine = SimulatedEngine(trace, copy.deepcopy(costs), batch, options, nodes)
        totals = engine.run()
        rows.append(
            {
                "setting": name,
                "batch": batch,
                "tokens_per_s": round(totals.tokens / totals.seconds, 2),
                "tokens_per_step": round(totals.tokens / totals.steps, 3),
                "nodes_per_step": round(totals.nodes / totals.steps, 2),
                "draft_forwards_per_token": round(totals.draft_forwards / totals.tokens, 3),
                "tasks": _by_task(trace, totals.answers),
            }
        )
    return rows


def _by_task(trace: Trace, answers: list[tuple[int, float]]) -> dict[str, float]:
    """Tokens per second after the first, by task, at batch 1."""
    found = {}
    for task in dict.fromkeys(text.task for text in trace.texts if text.task and answers):
        pairs = zip(trace.texts, answers, strict=True)
        tokens, seconds = map(sum, zip(*(a for t, a in pairs if t.task == task), strict=True))
        found[task] = round(tokens / seconds, 2) if seconds else 0.0
    return found


@app.command()
def compare(
    trace: Annotated[list[str], typer.Option(help="NAME=FILE; more than once for several")],
    costs: Annotated[Path, typer.Option(help="costs of an engine, as saved beside a pool")],
    batch: Annotated[list[int], typer.Option(help="requests at a time")] = [1, 8, 32],  # noqa: B006
    requests: Annotated[int, typer.Option(help="of each trace, from the start again; 0: all")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON lines to append rows to")] = None,
) -> None:
    """Serve traces under every fixed setting and under the policy."""
    of_machine = Costs.of(read_costs(costs))
    traces = {name: Trace.load(Path(file)) for name, _, file in (t.partition("=") for t in trace)}
    cases = [
        (name, said, draft, size)
        for (name, said), draft, size in itertools.product(traces.items(), Draft, batch)
        if said.has_draft or draft is Draft.recorded
    ]
    table = Table("trace", "draft", "batch", "best fixed", "× vanilla", "adaptive", "of the best")
    for name, said, draft, size in tqdm(cases):
        fixed_settings, model = FIXED, DRAFT if said.has_draft else None
        if model is None:
            fixed_settings = {n: s for n, s in FIXED.items() if "draft_model" not in (s[0] or {})}
        said = said.repeated(requests) if requests else said
        said = said.misled() if draft is Draft.misled else said
        rows = compare_settings(said, of_machine, size, {
            **fixed_settings, "adaptive": adaptive(model),
        })  # fmt: skip
        *fixed, policy = rows
        vanilla, best = fixed[0], max(fixed, key=lambda row: row["tokens_per_s"])
        for row in rows:
            row["over_vanilla"] = round(row["tokens_per_s"] / vanilla["tokens_per_s"], 3)
            if out is not None:
                facts = {
                    "trace": name, "requests": len(said.texts), "draft": draft.value,
                    "costs": costs.name, "commit": commit(),
                }  # fmt: skip
                with out.open("a") as file_out:
                    file_out.write(json.dumps({**facts, **row}, ensure_ascii=False) + "\n")
        share = policy["tokens_per_s"] / best["tokens_per_s"]
        table.add_row(
            name, draft.value, str(size), best["setting"], f"{best['over_vanilla']:.2f}",
            f"{policy['over_vanilla']:.2f}", f"{share:.2f}",
        )  # fmt: skip
        for task, speed in policy["tasks"].items():
            ratio = speed / vanilla["tasks"][task]
            table.add_row(f"  {task}", "", "", "", "", f"{ratio:.2f}", "")
    Console().print(table)


if __name__ == "__main__":
    app()
