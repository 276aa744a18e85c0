"""Commands, a module each; they import jax inside, after the config has been checked."""
