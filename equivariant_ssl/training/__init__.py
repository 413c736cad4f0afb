"""One run: its config as functions, the state, the step, and the loop."""
