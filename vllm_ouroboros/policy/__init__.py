"""How much to draft and to verify: expected accepted tokens against the cost of forwards.

`controller` decides for a batch, step by step, from `forward_costs` (seconds by rows, measured),
`acceptance_estimates` (how often nodes of a kind are accepted), `request_statistics` (what is known
of a request) and `throughput`. Called by `integration` and `draft`; never imports vLLM or torch.
"""
