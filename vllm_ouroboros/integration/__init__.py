"""Where we meet vLLM: all that knows its engine, its worker and the course of its step.

vLLM loads `plugin`, which applies `patches`; `compat` and `model_compat` refuse what cannot work.
Our `scheduler`, workers and their `runner` extend vLLM's; the runner calls `proposer` once a step,
which keeps the `live_requests` and makes `step_trees`. Called by vLLM; never imports `cli`.
"""
