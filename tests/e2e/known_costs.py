"""Costs that a test tells the policy of a running engine."""

from __future__ import annotations


def dear_target(worker) -> None:
    """As if rows of the target were nearly free, and its forward a hundred of the draft model's.

    A new policy, which sees no forward of this machine. To be sent to workers by value.
    """
    from vllm_ouroboros.policy.controller import Policy
    from vllm_ouroboros.policy.forward_costs import CostCurve, Costs

    class Known(CostCurve):
        def observe(self, rows, seconds):
            pass

    drafter = worker.model_runner.drafter
    if drafter.policy is not None:
        draft = Known([1], [0.001]) if drafter.policy.costs.draft is not None else None
        policy = Policy(Costs(Known([1, 512], [0.1, 0.1001]), draft))
        policy.end_step = policy.observe_drafting = lambda *seen: None
        policy.costs.observe_round = lambda *seen: None
        drafter.set_policy(policy)
