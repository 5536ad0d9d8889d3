"""The pipeline: one save as a task group of stages joined by bounded channels, and one load as verified range reads.

Nothing here knows torch. The same coroutines run on the engine's thread and in the background process.
"""
