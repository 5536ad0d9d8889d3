"""Crash, fault and corruption tests; ``python -m tests.reliability`` runs the long ones. See README.md."""
