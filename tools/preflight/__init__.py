"""Checks of the machines of a run before it starts: `python -m tools.preflight`, see __main__.py."""
