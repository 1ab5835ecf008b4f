"""Sets that TensorFlow Datasets knows. Prepared ones are read without TensorFlow; preparing one needs it."""

import contextlib
import pathlib
from collections.abc import Sequence

import numpy as np

from avb_jax.types import UserError


def read_images(name: str, directory: str, split: str) -> np.ndarray:
    """The images [N, ...] uint8 of a split, all at once.

    Raises:
      UserError: as `open_split`.
    """
    images = np.stack([np.asarray(example["image"]) for example in open_split(name, directory, split)])
    return images[..., 0] if images.shape[-1] == 1 else images


def open_split(name: str, directory: str, split: str) -> Sequence:
    """The examples of a split, read as they are asked for through `tfds.data_source` (array_record files).

    Raises:
      UserError: the set is not prepared in `directory` and TensorFlow is missing, or preparing it failed.
    """
    import tensorflow_datasets as tfds  # seconds to import, so only when asked for

    where = directory or None
    try:
        builder = tfds.builder(name, data_dir=where, file_format="array_record")
        if not _prepared(builder):
            builder.download_and_prepare(file_format="array_record")
        return builder.as_data_source(split=split)
    except ImportError as error:
        raise UserError(
            f"data.name='tfds:{name}': not prepared in {directory or 'the default TFDS folder'}, and preparing it needs "
            f"packages that are missing ({error.name or error}); pip install 'avb_jax[tfds]', or read the set's own files "
            "with data.name='mnist' or 'celeba'"
        ) from None
    except Exception as error:  # TFDS raises what its downloaders raise
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(f"data.name='tfds:{name}': TFDS could not give its split {split!r}: {reason[0]}") from None


def _prepared(builder) -> bool:
    with contextlib.suppress(AttributeError):
        return builder.is_prepared()
    return (pathlib.Path(builder.data_path) / "dataset_info.json").exists()
