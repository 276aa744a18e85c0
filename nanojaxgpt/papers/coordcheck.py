"""In: a config and widths. Out: how the activations of each layer grow with the width in training.

Under muP they should not (Yang 2022, appendix D.1): the coordinate check of a parametrization.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanojaxgpt import memory, sharding
from nanojaxgpt.config import AnyConfig, typed, with_fields
from nanojaxgpt.config.sections import Config
from nanojaxgpt.console import warn
from nanojaxgpt.data.loader import prepare_data, resolve
from nanojaxgpt.data.rows import Batch
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.extras import plots_advice
from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.model.parameters import Params
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.step import make_hyper
from nanojaxgpt.trainable import merge_params
from nanojaxgpt.training import make_job

PARAMETRIZATIONS = ("mup", "standard")


def widened(cfg: Config, width: int, base: int) -> Config:
    """Return the config at this width, heads of the same size; `base` 0: not by muP."""
    model = cfg.model
    head_dim = model.head_dim or model.embed_dim // model.num_heads
    if width % head_dim:
        raise ConfigError(f"width {width} is not divisible by the head size, {head_dim}")
    groups = model.num_heads // (model.num_kv_heads or model.num_heads)
    heads = width // head_dim
    if heads % groups:
        raise ConfigError(
            f"the {heads} heads of width {width} are not divisible by the group size, {groups}"
        )
    sizes = {
        "embed_dim": width, "num_heads": heads, "head_dim": head_dim,
        "num_kv_heads": heads // groups, "mlp_dim": model.mlp_dim * width // model.embed_dim,
        "mup_base_dim": base,
    }  # fmt: skip
    return with_fields(cfg, {f"model.{name}": size for name, size in sizes.items()})


def make_sizes(model_cfg: ModelConfig) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """Return sizes(params, batch) -> mean |x| of the residual stream after each layer, and logits.

    The stream after layer k is what a model of the first k layers gives.
    """

    def sizes(params: Params, batch: Batch) -> dict[str, jax.Array]:
        found = {}
        inputs = batch.tokens_BT, batch.positions_BT, batch.segments_BT
        for depth in range(1, model_cfg.num_layers + 1):
            layers = jax.tree.map(lambda x, depth=depth: x[:depth], params["layers"])
            cut = dataclasses.replace(model_cfg, num_layers=depth, final_norm=False)
            variables = {"params": {**params, "layers": layers}}
            (x_BTD, _), _ = Transformer(cut).apply(variables, *inputs, logits=False)
            found[f"layer {depth}"] = jnp.mean(jnp.abs(x_BTD))
        logits_BTV, _ = Transformer(model_cfg).apply({"params": params}, *inputs)
        return found | {"logits": jnp.mean(jnp.abs(logits_BTV))}

    return jax.jit(sizes)


def measure_sizes(
    cfg: Config, num_steps: int, report: Callable[[str], None]
) -> list[dict[str, float]]:
    """Return the sizes before and after each of `num_steps` steps, on the first batch."""
    data = prepare_data(cfg, report)
    job_cfg = resolve(cfg, data)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    job, found = make_job(job_cfg, data, mesh), []
    sizes = make_sizes(job_cfg.model)
    hyper = make_hyper(cfg)
    with memory.training_explained(job_cfg, mesh), jax.set_mesh(mesh):
        first = job.train_batch(0)
        state, frozen = job.init(jax.random.key(cfg.train.seed))
        for step in range(num_steps + 1):
            params = merge_params(state.params, frozen)
            found.append({k: float(v) for k, v in sizes(params, first).items()})
            if step < num_steps:
                state, _ = job.train_step(state, job.train_batch(step), hyper, frozen)
    return found


def slope(widths: Sequence[int], sizes: Sequence[float]) -> float:
    """Return the slope of log size against log width: 0 is flat, 0.5 grows as the root."""
    return float(np.polyfit(np.log2(widths), np.log2(sizes), 1)[0])


def check_coordinates(
    cfg: AnyConfig, widths: Sequence[int], num_steps: int, report: Callable[[str], None] = print
) -> dict[str, Any]:
    """Return {"widths", "sizes", "slopes"}; sizes[parametrization][layer][step][width].

    Slopes are the same without the last. The base width of muP is the config's, or the least.
    Raises ConfigError for a width that can't be.
    """
    if len(widths) < 2:
        raise ConfigError(f"a slope needs at least two widths, not {list(widths)}")
    base = cfg.model.mup_base_dim or min(widths)
    result: dict[str, Any] = {"widths": list(widths), "base": base, "sizes": {}, "slopes": {}}
    for name in PARAMETRIZATIONS:
        runs = []
        for width in widths:
            report(f"{name}, width {width}")
            wide = widened(typed(cfg), width, base if name == "mup" else 0)
            runs.append(measure_sizes(wide, num_steps, lambda _: None))
        sizes = {
            layer: [[run[step][layer] for run in runs] for step in range(num_steps + 1)]
            for layer in runs[0][0]
        }
        result["sizes"][name] = sizes
        result["slopes"][name] = {
            layer: [slope(widths, values) for values in steps] for layer, steps in sizes.items()
        }
    return result


def table(result: dict[str, Any]) -> Iterator[str]:
    """Yield the slopes as lines of text: a row for each layer, a column for each step."""
    for name, layers in result["slopes"].items():
        steps = len(next(iter(layers.values())))
        header = "".join(f"{f'step {step}':>9}" for step in range(steps))
        yield f"{name:<10}{header}"
        for layer, slopes in layers.items():
            yield f"{layer:<10}" + "".join(f"{value:>9.2f}" for value in slopes)


def save_coordinates(result: dict[str, Any], folder: Path) -> Path:
    """Write coordcheck.json and coordcheck.png (a line for each step); return the last written.

    Without matplotlib there is no plot, and a warning says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "coordcheck.json").write_text(json.dumps(result, indent=2) + "\n")
    if missing := plots_advice():
        warn(f"no coordcheck.png: {missing}")
        return folder / "coordcheck.json"
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = list(result["sizes"]["mup"])
    figure, axes = plt.subplots(
        len(PARAMETRIZATIONS), len(layers), figsize=(3 * len(layers), 5),
        sharex=True, sharey="col", squeeze=False,
    )  # fmt: skip
    for row, name in zip(axes, PARAMETRIZATIONS, strict=True):
        for axis, layer in zip(row, layers, strict=True):
            for step, values in enumerate(result["sizes"][name][layer]):
                axis.loglog(result["widths"], values, marker=".", label=f"step {step}")
            axis.set_xticks(result["widths"], map(str, result["widths"]))
            axis.minorticks_off()
            axis.set_title(f"{name}: {layer}", fontsize=9)
    axes[0, 0].legend(fontsize=7)
    figure.supxlabel("width")
    figure.supylabel("mean |x|")
    figure.tight_layout()
    figure.savefig(folder / "coordcheck.png", dpi=120)
    plt.close(figure)
    return folder / "coordcheck.png"
