"""Data sets and splits (Table 1), image operations, and the tf.data pipeline (sections 4.1 and 4.2)."""

from l2sp_tf.data.datasets import load_dataset, table_1_rows
from l2sp_tf.data.decoding import Images, decode
from l2sp_tf.data.images import central_crop, random_blur, random_crop, random_mirror, resize, to_three_channels
from l2sp_tf.data.pipeline import Preprocessing, Task, channel_mean, prepare, test_batches, training_batches, undecoded
from l2sp_tf.data.sets import Dataset, Split

__all__ = [
    "Dataset",
    "Images",
    "Preprocessing",
    "Split",
    "Task",
    "central_crop",
    "channel_mean",
    "decode",
    "load_dataset",
    "prepare",
    "random_blur",
    "random_crop",
    "random_mirror",
    "resize",
    "table_1_rows",
    "test_batches",
    "to_three_channels",
    "training_batches",
    "undecoded",
]
