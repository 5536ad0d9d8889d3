"""The command line, ``asyncdcp``: looks at runs and checkpoints, and cleans up, without importing torch.

One module per command in ``commands/``; ``main`` has the table of them, and turns every error into one line.
"""
