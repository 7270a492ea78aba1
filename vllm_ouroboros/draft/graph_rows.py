"""How many rows the CUDA graphs of masked draft forwards have."""

SIZES = (32, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512)
MAX_GRAPH_ROWS = SIZES[-1]
