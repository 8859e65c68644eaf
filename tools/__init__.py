"""What stands on the core, each run as `python -m tools.NAME`; nothing in the core imports it."""
