"""Draft trees: how chains and phrases become trees, and what a verified tree teaches.

`drafting` keeps the state of all requests (`request_state`) and calls the compiled loops:
`round_rows` lays out a draft forward, `best_first` and `lengthening` grow trees (`draft_tree`),
`node_kinds` says what speaks for a node. Called by `policy`, `draft` and `integration`; never
imports vLLM or torch.
"""
