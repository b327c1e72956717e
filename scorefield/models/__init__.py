"""Frozen models: what a folder or a name of the hub holds, read without running any of its code."""
