"""``vllm-ouroboros bench``: ways to decode, on the same prompts and machine, in turn.

`command` and `options` make a `plan` of `methods`; `run` goes through it with engines (`engine`,
`process`) and servers (`serve`); `rows` become lines of JSON and a table (`report`).
Called by `cli.main`; never imports `cli.demo`.
"""
