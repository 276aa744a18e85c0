"""In: a config and the name of hardware that is not here. Out: what a training step takes there."""
