"""Who decides: the target's forward over a tree, and acceptance.

`acceptance` walks the trees with vLLM's own sampler (`token_sampler`); `tree_step` is what a
forward knows of its trees; `cpu` and `cuda` hold attention by tree mask and the moving of accepted
KV. Called by `integration` and `draft`; never imports either, nor `policy`.
"""
