"""What a student is taught: the text, the float model's predictions of it, or both."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

Loss = Literal["ce", "kl", "both"]
LOSSES: tuple[Loss, ...] = get_args(Loss)


@jax.custom_vjp
def kl(teacher: jax.Array, student: jax.Array) -> jax.Array:
  """Mean KL(teacher || student) of logits [..., V] in nats; no gradient flows to the teacher.

  Its gradient, softmax(student) - softmax(teacher), is written out so that it is exactly 0 where
  both are equal.
  """
  p, q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
  return jnp.sum(jnp.exp(p) * (p - q), axis=-1).mean()


def _kl_forward(teacher: jax.Array, student: jax.Array) -> tuple[jax.Array, tuple]:
  return kl(teacher, student), (teacher, student)


def _kl_backward(saved: tuple, g: jax.Array) -> tuple[None, jax.Array]:
  teacher, student = saved
  count = student.size // student.shape[-1]
  return None, (jax.nn.softmax(student) - jax.nn.softmax(teacher)) * (g / count)


kl.defvjp(_kl_forward, _kl_backward)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Mean nats of targets int32[...] under logits [..., V]."""
  chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
  return -chosen.mean()
