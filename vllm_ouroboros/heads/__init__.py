"""Draft heads: one-layer drafters on the target's features, as models that vLLM serves.

`fspad` is the model, `feature_sampling` and `decoder_layer` are its parts, `short_vocabulary` its
logits; `integration.plugin` registers it. Knows vLLM's layers, and nothing of Ouroboros.
"""
