"""Verification on CUDA devices: tree attention and acceptance without leaving the device.

`attention` is vLLM's backends with rows of trees in our Triton kernel, `tree_step` the buffers that
kernels and CUDA graphs read, `acceptance` the walk for greedy batches, `warm_up` compiles what
steps launch, `device_timer` times forwards. Called by vLLM's layers, `integration.cuda_runner` and
`draft.cuda_graphs`; never imports `verify.cpu`.
"""
