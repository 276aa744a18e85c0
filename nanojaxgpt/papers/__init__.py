"""Papers: claims and their reproduction, and the measures that they need."""
