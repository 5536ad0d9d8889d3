"""The layout of data files: the safetensors image with its header, and the table of its blocks. Pure, no I/O."""
