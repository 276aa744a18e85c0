"""nanojaxgpt: a JAX/Flax research framework for GPT-style language models."""

__version__ = "0.1.0"
