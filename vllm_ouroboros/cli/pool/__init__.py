"""``vllm-ouroboros pool``: phrase pools in files, from texts and from each other."""
