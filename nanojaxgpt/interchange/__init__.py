"""Models of other formats: one table of tensors and one of config keys for each family."""
