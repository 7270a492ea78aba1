"""``vllm-ouroboros demo``: the same prompts through vanilla vLLM and through Ouroboros.

`command` takes the options, `job` checks them, `run` lets two engines (`engine`) generate in turns,
`report` shows texts with the origin of each token, and speeds; `picture` draws them as an SVG.
Called by `cli.main`; never imports `cli.bench`.
"""
