"""Images per second: decoding into the cache, reading batches from it, and what a training step consumes.

    python -m benchmarks.input --data_dir=FOLDER_OR_ZIP [--config=experiments/configs/celeba.py:small]

Reading is timed as the loop does it, on one thread, a block of steps at a time; the step without any reading, on a block that
is on the device already. Medians, of alternating runs.
"""

import pathlib
import tempfile
import time

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from avb_jax import build, data
from avb_jax.data import images
from avb_jax.data.dataset import batch_indices
from avb_jax.data.photos import Photos
from avb_jax.training.blocks import compile_blocks
from avb_jax.training.loop import initial_state

DIRECTORY = flags.DEFINE_string("data_dir", None, "A folder or zip of images.", required=True)
CONFIG = config_flags.DEFINE_config_file("config", "experiments/configs/celeba.py:small", "What trains on them.")
BLOCKS, STEPS = 5, 10


def seconds(function) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - begun


def main(argv) -> None:
    logging.set_verbosity(logging.WARNING)
    config, path = CONFIG.value, pathlib.Path(DIRECTORY.value)
    source = images.from_folder(path) if path.is_dir() else images.from_zip(path)
    print(f"{'':42}{'images/s':>10}")
    for workers in (1, 2, 4, 8, 16):
        with tempfile.TemporaryDirectory() as folder:
            count = min(len(source.images), 8192)
            part = source._replace(images=source.images[:count])
            time_taken = seconds(lambda: images.cached(part, pathlib.Path(folder), config.data.size, 0, workers).pixels)  # noqa: B023
        print(f"{f'decoding into the cache, {workers} threads':42}{count / time_taken:>10,.0f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        options = Photos(size=config.data.size, flip=config.data.flip, cache=folder)
        photos = data.load("images", DIRECTORY.value, options=options)
        count, time_taken = len(source.images), seconds(lambda: data.load("images", DIRECTORY.value, options=options).name)
        print(f"{'opening and checking a finished cache':42}{count / time_taken:>10,.0f}")
        for name, method in build.methods(config, photos.x_shape).items():
            measure_training(config, photos, name, method)


def measure_training(config, photos, name, method) -> None:
    """Reading against stepping."""
    blocks = compile_blocks(method, photos.prepare, photos.train, mode=config.parallel, batch_size=config.batch_size)
    indices = [batch_indices(len(photos.train), config.batch_size, 0, i * STEPS, STEPS) for i in range(BLOCKS + 1)]
    state, key = blocks.place(initial_state(method, photos, 0, None)), jax.random.key(0)
    state, _ = blocks.run(key, state, blocks.fetch(indices[0]))
    reading, stepping = [], []
    for i in range(1, BLOCKS + 1):
        reading.append(seconds(lambda: blocks.fetch(indices[i])))  # noqa: B023
        batches = jax.block_until_ready(blocks.fetch(indices[i]))
        begun = time.perf_counter()
        state, info = blocks.run(key, state, batches)
        jax.block_until_ready((state, info))
        stepping.append(time.perf_counter() - begun)
    count = STEPS * config.batch_size
    read, step = count / np.median(reading), count / np.median(stepping)
    print(f"{'reading batches from the cache, 1 thread':42}{read:>10,.0f}")
    print(f"{f'training step of {name}, {jax.devices()[0].device_kind}':42}{step:>10,.0f}")
    print(f"{'reading is faster by a factor of':42}{read / step:>10,.1f}")


if __name__ == "__main__":
    app.run(main)
