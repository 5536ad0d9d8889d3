"""The layout of data files: the safetensors image, its header, and the table of its blocks. Pure, no I/O."""
