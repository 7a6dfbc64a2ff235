"""The errors a user can meet, one family.

Every error says four things: which file, tensor or flag; what was found; what was expected; and
what to do about it. `except q4jax.Q4JaxError` catches them all; anything else is a bug in q4jax.
"""


class Q4JaxError(Exception):
  """Base of every error raised on purpose by q4jax."""


class FormatError(Q4JaxError):
  """A file is malformed, truncated, hostile, or uses a feature that is not supported."""


class TokenizerError(Q4JaxError):
  """A vocabulary cannot be rebuilt, or a text or token id does not fit it."""


class ChatTemplateError(Q4JaxError):
  """A chat template fails, misbehaves, or takes too long."""


class ConfigError(Q4JaxError):
  """An argument or flag has a value that cannot work."""


class TrainingError(Q4JaxError):
  """Training cannot go on, e.g. because the loss is not finite; checkpoints are as they were."""


class PromptError(Q4JaxError):
  """A prompt is empty, too long for the context, or of the wrong kind."""


class PoolError(Q4JaxError):
  """A block of the KV cache is used by someone who holds no reference to it, or published twice."""


class PoolExhaustedError(Q4JaxError):
  """The KV cache has fewer free blocks than were asked for; nothing was taken."""


class DownloadError(Q4JaxError):
  """A model could not be found or fetched."""


class MissingDependencyError(Q4JaxError):
  """An optional package is needed and not installed; the message names the extra."""
