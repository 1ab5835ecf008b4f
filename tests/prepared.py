"""A set as TFDS leaves it after preparing it, in small: its own feature serialisation, in array_record files."""

import pathlib
from collections.abc import Callable

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import example_serializer, naming, utils


def write(root: pathlib.Path, name: str, counts: dict[str, int], example: Callable[[int], dict]) -> None:
    """Writes so many examples per split; `example` makes the i-th's features, as TFDS serialises them, that are not 0."""
    info = tfds.builder(name, data_dir=str(root), file_format="array_record").info
    folder = pathlib.Path(info.data_dir)
    folder.mkdir(parents=True)
    serializer = example_serializer.ExampleSerializer(info.features.get_serialized_info())
    nothing = dict.fromkeys(utils.flatten_nest_dict(info.features.get_serialized_info()), 0)
    splits = []
    for split, count in counts.items():
        path = folder / f"{name}-{split}.array_record-00000-of-00001"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for i in range(count):
            writer.write(serializer.serialize_example({**nothing, **example(i)}))
        writer.close()
        template = naming.ShardedFileTemplate(data_dir=folder, dataset_name=name, split=split, filetype_suffix="array_record")
        splits.append(tfds.core.SplitInfo(name=split, shard_lengths=[count], num_bytes=1, filename_template=template))
    info.set_splits(tfds.core.SplitDict(splits))
    info.set_file_format("array_record")
    info.write_to_directory(folder)
