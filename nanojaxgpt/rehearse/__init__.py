"""In: a config and the name of hardware you don't have. Out: what a training step takes there."""
