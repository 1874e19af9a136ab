"""What went wrong in a step that the guard did not apply: see incidents.py."""
