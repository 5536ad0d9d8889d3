"""Conformance kits and fault injection, for storages and extensions of your own. Needs neither torch nor pytest."""
