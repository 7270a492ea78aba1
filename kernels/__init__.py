"""Triton kernels of the plugin and their torch oracles; installed as `vllm_ouroboros.kernels`."""
