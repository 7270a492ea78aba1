"""The phrase pool: continuations seen before, found by the tokens they follow.

`pool` is the pool, `arrays` its memory, `contexts` its keys, `insertion` and `eviction` how phrases
come and go, `scopes` who shares them; `pool_file`, `pool_format` and `file_rows` keep it in a file,
`idle_save` says when. Called by `trees` and `integration`; never imports another package, vLLM or
torch.
"""
