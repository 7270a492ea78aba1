"""Draft trees: how chains and phrases become trees, and what a verified tree teaches.

`drafting` keeps the state of all requests (`request_state`) and calls the compiled loops:
`round_rows` lays out a draft forward, `best_first` (from `candidates`) and `lengthening` grow trees
(`draft_tree`), `prediction` follows what a request expects, `learning` turns verified trees into
phrases, `packing` makes arrays of them for other ranks, `node_kinds` classes what supports a node,
`warm_up` compiles the loops. Called by `policy`, `draft` and `integration`; never imports vLLM or
torch.
"""
