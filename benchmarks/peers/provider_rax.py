"""Rax's pairwise losses: value and gradient in one function, compiled ahead by XLA for the shape."""

import os

# XLA has no option for its number of threads; it takes as many as there are cores for it.
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(os.environ["OMP_NUM_THREADS"])])
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import rax  # noqa: E402

SCALES = {
    "pairwise_logistic": "mean over all pairs of the batch",
    "pairwise_distillation": "mean over all ordered pairs of the batch, i = j too",
}
RAGGED = True
PACKAGE = "rax"


def prepare(op, lists, variant):
    logistic = op == "pairwise_logistic"
    function = rax.pairwise_logistic_loss if logistic else rax.pairwise_mse_loss
    arguments = [jax.numpy.asarray(lists.scores), jax.numpy.asarray(lists.labels if logistic else lists.targets)]
    if lists.ragged:
        arguments.append(jax.numpy.asarray(lists.valid))
    loss = jax.value_and_grad(lambda scores, against, where=None: function(scores, against, where=where))
    compiled = jax.jit(loss).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments))
