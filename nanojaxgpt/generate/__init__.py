"""Many requests at once on one model: what they ask for, the slots they run in, the engine."""
