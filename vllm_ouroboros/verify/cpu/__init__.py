"""Verification on the CPU: tree attention over vLLM's paged KV cache.

`attention` is vLLM's backend with tree rows in our kernel (`attention_kernel`, compiled by numba;
`matmul_tile` its products); `tree_step` keeps the KV of tree rows and moves what was accepted.
Called by vLLM's layers and `integration.cpu_worker`; never imports `verify.cuda`.
"""
