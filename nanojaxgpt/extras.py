"""Optional packages, which come with an extra of setup.cfg: whether they are there, what to do."""

import importlib.util

from nanojaxgpt.errors import ConfigError


def install_advice(package: str, extra: str) -> str:
    """Return how to install a package that is missing, or "" where it is installed."""
    if importlib.util.find_spec(package):
        return ""
    return f"{package} is not installed: pip install 'nanojaxgpt[{extra}]'"


def plots_advice() -> str:
    """Return how to install what plots need, or "" where it is installed."""
    return install_advice("matplotlib", "plots")


def require_package(package: str, extra: str, what: str) -> None:
    """Raise ConfigError, naming the feature, where its package is missing; nothing is imported."""
    if text := install_advice(package, extra):
        raise ConfigError(f"{what}: {text}")
