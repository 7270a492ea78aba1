"""``vllm-ouroboros doctor``: versions, platform, and what would be refused and why.

`command` takes the options, `report` collects and shows. What is supported is decided in
`integration.compat`. Called by `cli.main`; never starts an engine.
"""
