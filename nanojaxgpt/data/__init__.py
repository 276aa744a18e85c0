"""From a source's name to batches: sources -> tokenizers -> store -> loader, in plain numpy."""
