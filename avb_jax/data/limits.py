"""How much a file may unpack to: a few bytes of a zip or an image can promise more than a machine holds."""

import os

from avb_jax.types import UserError

UNPACKED = "AVB_JAX_UNPACKED"  # the environment variable that sets it
DEFAULT = 2**30


def unpacked() -> int:
    """Bytes that one file, or one image, may unpack to. PIL has a limit of its own on pixels next to it.

    Raises:
      UserError: the environment variable holds no number of bytes.
    """
    given = os.environ.get(UNPACKED, "")
    if given and not (given.isdecimal() and int(given)):
        raise UserError(f"{UNPACKED}={given!r}: must be a number of bytes, such as {DEFAULT}")
    return int(given) if given else DEFAULT
