"""What is counted and timed: `counters` of the engine's life, `step_clock` for a step's time,
`forward_timer` for a forward's; `exported` names what ``/metrics`` shows of it.

Written by `integration` and `draft`, read by ``vllm_ouroboros.stats``, `integration` and the
scripts; never imports vLLM or torch.
"""
