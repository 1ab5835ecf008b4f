"""Folders that one process at a time writes to."""

import contextlib
import os
import pathlib
import platform
import sys
from collections.abc import Iterator

from avb_jax.types import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


@contextlib.contextmanager
def locked(folder: pathlib.Path, field: str, wait: bool = False, file_name: str = ".lock") -> Iterator[None]:
    """Keeps others who lock the folder out of it until this process leaves it, however it does; readers may come in.

    Args:
      folder: made where it is missing.
      field: the argument that names it, for messages.
      wait: for another process to leave it, which is said.
      file_name: of the lock; who locks by another name stays in.

    Raises:
      UserError: nothing can be written there, or another process is in it.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((folder / file_name).open("a+"))
        except OSError as error:
            raise UserError(f"{field}={folder}: cannot be written to ({error.strerror}); use another folder") from None
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            busy = f"{field}={folder}: {file.read()} writes to it"
            if not wait:
                raise UserError(f"{busy}; wait for its end, or use another folder") from None
            print(f"{busy}; waiting for its end", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
