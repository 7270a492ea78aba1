"""Who proposes: the draft model's forwards.

`rounds` runs them until every chain is long enough, on `model`, a second vLLM model with its own KV
cache (`kv_cache` knows which blocks are filled), or on a `head`, which reads `features` and whose
trees `expansion` widens. `loading` makes a model's configuration, `forward_rows` a forward's rows,
`causal` its metadata without masks; `alternatives` reads logits, `sampling` chooses tokens for
requests that sample. `ranks` tells other ranks what the first decides, `cuda_graphs` replays
forwards on CUDA devices. Called by `integration`, which it never imports.
"""
