"""Measure the memory of an import: a random sharded Llama, read onto eight simulated devices.

Usage: python scripts/bench_import.py [--gigabytes=1]. Prints the size of the weights and of the
largest tensor, and the peak of the process's memory beside what it had before.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
WIDTH, MLP, HEADS, VOCABULARY = 1024, 4096, 16, 32000


def write_model(folder: Path, gigabytes: float) -> int:
    """Write a random model in bfloat16, a file per layer; return the bytes of its weights."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from nanojaxgpt.data.tokenizer_json import export_bytes

    layer = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
    layer |= {"mlp.gate_proj": (MLP, WIDTH), "mlp.up_proj": (MLP, WIDTH),
              "mlp.down_proj": (WIDTH, MLP)}  # fmt: skip
    layer |= {"input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,)}
    each = 2 * sum(a * (shape or [1])[0] for a, *shape in layer.values())
    layers = max(1, round((gigabytes * 2**30 - 2 * VOCABULARY * WIDTH) / each))
    rng, places, size = np.random.default_rng(0), {}, 0

    def save(number: int, shapes: dict[str, tuple[int, ...]]) -> int:
        name = f"model-{number:05}-of-{layers + 1:05}.safetensors"
        arrays = {f"{key}.weight": (rng.standard_normal(shape, np.float32) * 0.02)
                  .astype(ml_dtypes.bfloat16) for key, shape in shapes.items()}  # fmt: skip
        save_file(arrays, folder / name, {"format": "pt"})
        places.update(dict.fromkeys(arrays, name))
        return sum(array.nbytes for array in arrays.values())

    outside = {"model.embed_tokens": (VOCABULARY, WIDTH), "model.norm": (WIDTH,)}
    size += save(1, outside)
    for index in range(layers):
        named = {f"model.layers.{index}.{key}": shape for key, shape in layer.items()}
        size += save(index + 2, named)
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = dict(
        model_type="llama", vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=MLP,
        num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        rms_norm_eps=1e-5, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes(export_bytes("<|endoftext|>"))
    return size


def peak() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    """Write the model in a process of its own, read it in this one, print the sizes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", default="", help="a model that was written before")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(parsed.folder or made)
        if not parsed.folder:
            child = os.fork()  # so that writing doesn't count here
            if not child:
                write_model(folder, parsed.gigabytes)
                os._exit(0)
            if os.waitpid(child, 0)[1]:
                return 1
        import jax

        import nanojaxgpt

        jax.device_put(1.0, jax.devices()[0]).block_until_ready()
        before, began = peak(), time.monotonic()
        model = nanojaxgpt.load(folder, mesh={"fsdp": 8})
        jax.block_until_ready(model.params)
        after, seconds = peak(), time.monotonic() - began
        leaves = jax.tree.leaves(model.params)
        size = sum(leaf.nbytes for leaf in leaves)
        largest = 2 * VOCABULARY * WIDTH
        print(f"weights        {size / 2**20:8,.0f} MiB as {model.config.param_dtype}")
        print(f"largest tensor {largest / 2**20:8,.0f} MiB")
        print(
            f"peak           {(after - before) / 2**20:8,.0f} MiB more than before, {seconds:.0f} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
