"""Measure the gradient of a kernel, x^T dy, in two forms: `bench_products.py`.

The forms take turns on one core. `plain` is the product as it stands, `transposed` that of
products.py, whose first operand is transposed in a way that XLA does not fold into the product.
bfloat16 is worth something only on a CPU with instructions for it (AMX, AVX512-BF16).
"""

import os
import statistics
import time

# Tokens and the widths of the operands; the first, which is transposed, is the narrower one.
SHAPES = ((768, 128, 128), (768, 128, 512), (1024, 384, 384), (1024, 384, 1536), (1024, 768, 3072))
ROUNDS = 9


def main() -> None:
    """Print GFLOP/s of each form, their ratio, and the largest error against float64."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])  # before jax starts its threads
    import jax
    import jax.numpy as jnp
    import numpy as np

    from nanojaxgpt import cpu
    from nanojaxgpt.products import multiply, transposed

    @jax.jit
    def plain(first_TA: jax.Array, second_TB: jax.Array) -> jax.Array:
        return multiply("TA,TB->AB", first_TA, second_TB, jnp.float32)

    @jax.jit
    def turned(first_TA: jax.Array, second_TB: jax.Array) -> jax.Array:
        return multiply("AT,TB->AB", transposed(first_TA), second_TB, jnp.float32)

    print(f"instructions for bfloat16: {'yes' if cpu.multiplies_bfloat16() else 'no'}")
    print(f"{'tokens x A x B':<20}dtype        plain  transposed   ratio     error")
    rng = np.random.default_rng(0)
    for tokens, *widths in SHAPES:
        for dtype in ("float32", "bfloat16"):
            pair = [jnp.asarray(rng.normal(size=(tokens, width)), dtype) for width in widths]
            times: dict[str, list[float]] = {"plain": [], "transposed": []}
            for _ in range(ROUNDS + 1):  # the first compiles
                for name, form in zip(times, (plain, turned), strict=True):
                    began = time.perf_counter()
                    for _ in range(5):
                        found = form(*pair).block_until_ready()
                    times[name].append((time.perf_counter() - began) / 5)
            work = 2e-9 * tokens * widths[0] * widths[1]
            before, after = (work / statistics.median(took[1:]) for took in times.values())
            right = np.asarray(pair[0], np.float64).T @ np.asarray(pair[1], np.float64)
            error = np.abs(np.asarray(found, np.float64) - right).max() / np.abs(right).max()
            print(
                f"{' x '.join(map(str, (tokens, *widths))):<20}{dtype:<10}{before:>8.0f}"
                f"{after:>12.0f}{after / before:>8.2f}{error:>10.1e}"
            )


if __name__ == "__main__":
    main()
