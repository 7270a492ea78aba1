"""What people type: ``vllm-ouroboros demo``, ``bench``, ``doctor`` and ``fetch``.

`main` names the commands; each has a folder with its options (`command`) and its work. Engines run
in processes of their own (`engine_process`), so nothing here imports vLLM or torch at its top.
Called by the console script alone; never imports `draft`, `verify` or `trees`.
"""
