"""The background process: the pipeline of a checkpointer's saves in a small, torch-free process of its own.

The child is ``main.py``, the trainer's side ``process.py`` (one process) and ``pipeline.py`` (which one a save runs
in). ``protocol.py`` says what they say to each other, and what may happen when.
"""
