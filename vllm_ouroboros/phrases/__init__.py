"""The phrase pool: continuations seen before, found by the tokens they follow.

`pool` is the pool, `arrays` its memory, `contexts` its keys, `insertion` and `eviction` how phrases
come and go, `scopes` who shares them; `pool_file`, `pool_format` and `file_rows` keep it in a file,
which several may replace (`shared_file`) by the union of what they have (`merging`); `idle_save`
says when. Called by `trees`, `integration` and `cli`; never imports another package, vLLM or torch.
"""
