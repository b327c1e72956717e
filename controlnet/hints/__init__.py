"""Hints: what an adapter looks at; :mod:`controlnet.hints.hint` says what one is."""
