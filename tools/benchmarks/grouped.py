"""Time of the grouped product and its gradients on this machine, by form, beside one dense product.

python tools/benchmarks/grouped.py
"""

import time

import jax
import jax.numpy as jnp

from bigtrain.kernels.grouped import blocked

ROWS, DIM, HIDDEN, EXPERTS = 8192, 128, 256, 8
REPEATS = 5


def main() -> None:
  kx, kw = jax.random.split(jax.random.key(0))
  x_RD = jax.random.normal(kx, (ROWS, DIM))
  w_EDF = jax.random.normal(kw, (EXPERTS, DIM, HIDDEN))
  sizes_E = jnp.full(EXPERTS, ROWS // EXPERTS, jnp.int32)
  forms = {
    "ragged_dot": lambda x, w: jax.lax.ragged_dot(x, w, sizes_E),
    "blocked": lambda x, w: blocked(x, w, sizes_E),
    "dense": lambda x, w: x @ w[0],
  }
  for name, form in forms.items():
    step = jax.jit(jax.grad(lambda x, w, form=form: (form(x, w) ** 2).sum(), (0, 1)))
    jax.block_until_ready(step(x_RD, w_EDF))
    start = time.perf_counter()
    for _ in range(REPEATS):
      jax.block_until_ready(step(x_RD, w_EDF))
    print(
      f"{name:10} {1e3 * (time.perf_counter() - start) / REPEATS:7.1f} ms, jax {jax.__version__}"
    )


if __name__ == "__main__":
  main()
