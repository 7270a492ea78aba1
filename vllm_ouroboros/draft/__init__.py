"""Who proposes: the draft model's forwards.

`rounds` runs them until every chain is long enough, on `model`, a second vLLM model with its own KV
cache (`kv_cache` knows which blocks are filled); `sampling` chooses tokens for requests that
sample, `cuda_graphs` replays forwards on CUDA devices. Called by `integration`, which it never
imports.
"""
