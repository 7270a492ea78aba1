"""``vllm-ouroboros batch``: answers the rows of files with Ray Data, on any number of machines."""
