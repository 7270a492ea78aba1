"""The dashboard: panels that fit beside each other, and metrics that engines have."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from vllm_ouroboros.metrics.exported import METRICS

ROOT = Path(__file__).parents[2]
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
"""Of a metric's series, by its kind."""
SELECTED = '{model_name=~"$model_name", engine=~"$engine"'
EVERYWHERE = {"model_name", "engine", "instance"}
"""Labels of all series; the last one is Prometheus's."""


def series(name: str, kind: str) -> list[str]:
    """Names of a metric's series."""
    stem = name.removesuffix("_total") if kind == "counter" else name
    return [stem + suffix for suffix in SUFFIXES[kind]]


def of_vllm() -> dict[str, str]:
    """Kinds of vLLM's metrics by the names of their series, from its source."""
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    found = re.findall(r'_(counter|gauge|histogram)_cls\(\s*name="(vllm:\w+)"', source)
    assert found
    return {one: kind for kind, name in found for one in series(name, kind)}


OURS = {one: metric for metric in METRICS for one in series(metric.name, metric.kind)}
KINDS = {**of_vllm(), **{name: metric.kind for name, metric in OURS.items()}}
DASHBOARD: dict[str, Any] = json.loads((ROOT / "dashboards" / "grafana.json").read_text())
ROWS = [panel for panel in DASHBOARD["panels"] if panel["type"] == "row"]
PANELS = [
    *(panel for panel in DASHBOARD["panels"] if panel["type"] != "row"),
    *(panel for row in ROWS for panel in row["panels"]),
]
TARGETS = [
    pytest.param(target, id=f"{panel['title']}-{target['refId']}")
    for panel in PANELS
    for target in panel["targets"]
]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
VARIABLES = {one["name"]: one for one in DASHBOARD["templating"]["list"]}


def names(expression: str) -> list[str]:
    """Names of series in a query."""
    return re.findall(r"(?:\bouroboros_|\bvllm:)\w+", expression)


def test_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
    panels = [*ROWS, *PANELS]
    ids = [panel["id"] for panel in panels]
    assert len(ids) == len(set(ids))
    for one, other in combinations(panels, 2):
        a, b = one["gridPos"], other["gridPos"]
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or above, (one["title"], other["title"])
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in panels)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panels_say_what_they_show(panel: dict[str, Any]) -> None:
    assert panel["title"] and panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    for part in (panel, *panel["targets"]):
        assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    refs = [target["refId"] for target in panel["targets"]]
    assert refs and len(refs) == len(set(refs))


def test_titles_are_different() -> None:
    titles = [panel["title"] for panel in PANELS]
    assert len(titles) == len(set(titles))


def test_variables() -> None:
    assert list(VARIABLES) == ["datasource", "model_name", "engine"]
    assert VARIABLES["datasource"]["type"] == "datasource"
    assert VARIABLES["datasource"]["query"] == "prometheus"
    for name in ("model_name", "engine"):
        variable = VARIABLES[name]
        assert variable["multi"] and variable["includeAll"]
        query = variable["query"]["query"]
        assert query.endswith(f", {name})")
        assert names(query) and set(names(query)) <= KINDS.keys()


@pytest.mark.parametrize("target", TARGETS)
def test_queries_are_of_metrics_that_there_are(target: dict[str, str]) -> None:
    expression = target["expr"]
    found = names(expression)
    assert found and set(found) <= KINDS.keys()
    for name in found:
        assert f"{name}{SELECTED}" in expression, "not of the chosen engines alone"
        changes = re.search(rf"(?:rate|increase) ?\({name}{{", expression) is not None
        assert changes == (KINDS[name] != "gauge"), name
    known = EVERYWHERE | {label for name in found if name in OURS for label in OURS[name].labels}
    if any(name.endswith("_bucket") for name in found):
        known.add("le")
    grouped = re.findall(r"\b(?:by|ignoring|on) \(([^)]*)\)", expression)
    labels = {label.strip() for group in grouped for label in group.split(",")}
    assert labels <= known
    assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels


def test_names_in_the_documents_are_of_metrics_that_there_are() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    found = set(re.findall(r"\bouroboros_\w+", text))
    assert len(found) > len(METRICS) // 2
    assert found <= OURS.keys() | {metric.name for metric in METRICS}
    missing = {m.name for m in METRICS if not found & {m.name, *series(m.name, m.kind)}}
    assert not missing


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_each_metric_is_shown(metric: Any) -> None:
    shown = {name for expression in EXPRESSIONS for name in names(expression)}
    assert shown & {*series(metric.name, metric.kind)}
