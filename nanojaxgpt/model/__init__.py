"""The model: its layers as a pattern, THE table of its parameters, its forward pass."""
