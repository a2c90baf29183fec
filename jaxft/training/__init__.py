"""A run: its recipe and set-up, the train step, the loop, and going on with it."""
