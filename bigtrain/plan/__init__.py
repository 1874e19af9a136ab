"""The planner: asks the real compiler what a step will take, on a machine without the chip."""
