"""What people type: ``vllm-ouroboros demo``, ``bench``, ``batch``, ``pool``, ``doctor``, ``fetch``.

`main` names the commands; each has a folder with its options (`command`) and its work. `shared` has
options and exit codes, `inputs` and `tasks` what commands read, `weights` writes checkpoints,
`loops` finds texts that repeat themselves, `provenance` says where a figure is from, `ray_server`
is a replica of Ray Serve. Engines of demo and benchmark run in processes of their own
(`engine_process`), and `main` and the options import neither vLLM nor torch at their top. Called by
the console script and by Ray; never imports `draft`, `verify` or `trees`.
"""
