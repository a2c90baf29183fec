"""What a run will need, before the hardware is paid for: memory, traffic and time per chip, from the real train step."""
