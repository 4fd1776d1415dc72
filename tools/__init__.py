"""Run around the study path, as `python -m tools.NAME`: nothing at the root imports these."""
