"""What is counted and timed: `counters` of the engine's life, `step_clock` for a step's time.

Written by `integration` and `draft`, read by ``vllm_ouroboros.stats`` and the scripts; never
imports vLLM or torch.
"""
