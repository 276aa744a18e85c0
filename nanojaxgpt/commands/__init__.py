"""The commands: each module names its own in COMMANDS, and imports jax inside, config checked."""
