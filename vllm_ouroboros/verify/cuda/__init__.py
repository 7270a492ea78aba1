"""Verification on CUDA devices: tree attention and acceptance without leaving the device.

`attention` is vLLM's backends with tree rows in our Triton kernel, `tree_step` the buffers that
kernels and CUDA graphs read, `acceptance` the walk for greedy batches. Called by vLLM's layers,
`integration.cuda_worker` and `draft.cuda_graphs`; never imports `verify.cpu`.
"""
