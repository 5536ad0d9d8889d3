"""Measurements against other ways to save and load, and against what the machine can do at most; run by hand."""
