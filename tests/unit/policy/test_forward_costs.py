"""What forwards cost: curves, their measurement and what is learned online."""

from __future__ import annotations

import json

import pytest

from vllm_ouroboros.policy.forward_costs import MAX_DEVIATION, CostCurve, Costs, measure, read_costs

from ..helpers.policy_fakes import curve


def test_a_curve_interpolates_never_falls_and_goes_on() -> None:
    one = CostCurve([1, 2, 4, 8], [4.0, 3.0, 6.0, 8.0])
    assert [one.at(n) for n in (0, 1, 2, 3, 4, 6, 8, 10)] == [0, 3, 3, 4.5, 6, 7, 8, 9]
    assert one.table(10).tolist() == [one.at(n) for n in range(11)]
    assert one.table(100)[100] == one.at(100)
    assert CostCurve([1], [2.0]).at(3) == 6


def test_measurement_takes_the_fastest_of_some_runs() -> None:
    now, runs = [0.0], []

    def run(rows: int) -> None:
        runs.append(rows)
        now[0] += rows * (1 if runs.count(rows) == 3 else 5) * scale

    scale = 2**-10
    found = measure(run, 20, clock=lambda: now[0])
    assert list(found.sizes) == [1, 2, 4, 8, 16]
    assert found.seconds == [n * scale for n in (1, 2, 4, 8, 16)]
    runs.clear()
    scale = 2.0  # a slow model: what was measured goes on as a line
    found = measure(run, 1000, clock=lambda: now[0])
    assert list(found.sizes) == [1, 2]
    assert found.at(8) > found.at(4) > found.at(2)


def test_costs_follow_what_is_seen() -> None:
    one = curve(1.0, 0.0)
    for _ in range(200):
        one.observe(8, 2.0)
    assert one.at(8) == pytest.approx(2.0, rel=0.01)
    for _ in range(400):  # eight rows have become dear, one has not
        one.observe(8, 4.0)
        one.observe(1, 1.0)
    assert one.at(1) == pytest.approx(1.0, rel=0.1)
    assert one.at(8) == pytest.approx(4.0, rel=0.1)
    assert one.table(8)[8] == pytest.approx(one.at(8))
    before = one.factor
    one.observe(8, 1e9)  # a machine that slept
    assert one.factor < 1.2 * before
    one.observe(0, 5.0)
    costs = Costs(curve(1.0, 0.0), None)
    costs.observe_overhead(0.5, drafted=True)  # for want of a step without a draft
    assert (costs.overhead, costs.drafting) == (0.5, 0)
    costs.observe_overhead(0.75, drafted=True)
    assert (costs.overhead, costs.drafting) == (0.5, 0.25)
    costs.observe_overhead(1e9, drafted=True)
    assert costs.drafting < 0.3
    costs.observe_overhead(0.5)
    assert costs.overhead == 0.5
    costs.observe_overhead(1e9)
    assert costs.overhead < 0.6
    costs.observe_round(8, 0.2, 0.3)
    assert costs.round(8) == 0  # no draft model, no rounds
    shown = costs.as_dict()
    assert shown["target"]["1"] == 1000
    assert "draft" not in shown


def test_the_first_that_is_seen_may_have_compiled_something() -> None:
    """Half a minute of that must not make drafting look hopeless for the engine's life."""
    costs = Costs(curve(1.0, 0.0), curve(0.2, 0.0))
    costs.observe_overhead(30.0)
    costs.observe_round(8, 0.2, 30.0)
    assert (costs.overhead, costs.planning) == (
        MAX_DEVIATION * 1.0,
        pytest.approx(MAX_DEVIATION * 0.2),
    )
    for _ in range(100):
        costs.observe_round(8, 0.2, 0.3)
    assert costs.planning == pytest.approx(0.1, rel=0.1)
    assert costs.round(8) == pytest.approx(0.3, rel=0.1)


def test_costs_are_saved_beside_the_pool(tmp_path) -> None:
    costs = Costs(curve(1.0, 0.5), curve(0.1, 0.0), overhead=0.25)
    path = costs.save(f"{tmp_path}/pool")
    assert read_costs(path) == json.loads(json.dumps(costs.as_dict()))
    assert [p.name for p in tmp_path.iterdir()] == ["pool.costs.json"]
    path.write_text("[1]")
    with pytest.raises(ValueError, match="no costs"):
        read_costs(path)


def test_forwards_are_padded_to_their_graphs() -> None:
    """Rows up to a graph's size cost what it costs; behind the largest each counts again."""
    curve = CostCurve([1, 2, 4, 8, 16], [1.0, 2.0, 4.0, 8.0, 16.0], graphs=[1, 4, 8])
    assert curve.table(10).tolist() == [0, 1, 4, 4, 4, 8, 8, 8, 8, 9, 10]
    assert curve.at(3) == 4
