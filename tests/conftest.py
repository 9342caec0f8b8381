"""Puts tests/ on the import path, so that a suite can share builders (`from contracts.builders import BUILDERS`)."""
