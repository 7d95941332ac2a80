"""What is said of a PyTorch network beside its weights: weights of one shape and name may belong to networks that differ."""

import dataclasses
import re

from l2sp_tf.files.errors import InputError
from l2sp_tf.files.reading import read_json
from l2sp_tf.models.pixels import PixelFormat, three_numbers

AVERAGES = (None, "", "avg", "fast", "fastavg")  # timm's names of average pooling
WITHOUT_EFFECT = ("num_classes", "in_chans", "global_pool", "drop_rate", "drop_path_rate", "drop_block_rate", "zero_init_last")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a file says of a network.

    Attributes:
        where: the file.
        network: its name, such as "resnet50" or "resnetaa50.a1_in1k"; None if it is not said.
        pool: timm's name of the last pooling; None if it is not said.
        options: other arguments of its constructor, a dict.
        mean, deviation: of its pixels, three numbers from 0 to 1 each; None if they are not said.
    """

    where: str
    network: str | None = None
    pool: str | None = None
    options: dict = dataclasses.field(default_factory=dict)
    mean: object = None
    deviation: object = None

    def check(self, backbone):
        """Checks that this is said of one of `resnets.TORCH`.

        Raises:
            InputError: the network is another, or was built with options that ours does not have.
        """
        name = backbone.removesuffix("_torch")
        sized = re.search(r"resnet\w*\d", self.network or "")  # a bare "resnet" names no network
        if sized and not re.search(rf"(^|[^a-z0-9]){name}($|[^a-z0-9])", self.network):
            raise InputError(
                f"{self.where} says that the network is {self.network!r}, which differs from {backbone} even where its weights "
                "have the same names: give the --backbone that it was made with."
            )
        options = {key: value for key, value in self.options.items() if key not in WITHOUT_EFFECT and value is not None}
        options |= {} if self.pool in AVERAGES else {"global_pool": self.pool}
        if options:
            said = ", ".join(f"{key}={value!r}" for key, value in options.items())
            raise InputError(f"{self.where} says that the network was built with {said[:200]}: {backbone} has no such option.")

    def pixels(self):
        """Returns the `PixelFormat`, or None if it is not said.

        Raises:
            InputError: the numbers are not from 0 to 1, so that their scale is unknown.
        """
        if self.mean is None or self.deviation is None:
            return None
        mean, deviation = three_numbers("mean", self.mean), three_numbers("std", self.deviation)
        if not all(0 <= m <= 1 for m in mean) or not all(0 < d <= 1 for d in deviation):
            raise InputError(
                f"{self.where} says that pixels have mean {mean} and std {deviation}, not from 0 to 1: give --pixels."
            )
        return PixelFormat(scale=tuple(1 / (255 * d) for d in deviation), mean=tuple(255 * m for m in mean))


def settings_of(path, contents):
    """Finds what is said of the network of a file of weights.

    Args:
        path: the file, a `pathlib.Path`. timm writes a config.json beside it.
        contents: what the file holds besides weights, a dict. Trainers keep the network's name in it, and their flags.

    Returns:
        A list of `Settings`.

    Raises:
        InputError: config.json is damaged.
    """
    found, beside = [], path.with_name("config.json")
    if beside.is_file():
        config = read_json(beside, f"{beside} is damaged")
        if isinstance(config, dict) and isinstance(config.get("architecture"), str):
            found.append(_of_timm(beside, config))
    flags = contents.get("args")
    flags = flags if isinstance(flags, dict) else {}
    names = (contents.get("arch"), flags.get("arch"), flags.get("model"))
    name = next((name for name in names if isinstance(name, str)), None)
    options = flags.get("model_kwargs")
    values = {"pool": flags.get("gp"), "mean": flags.get("mean"), "deviation": flags.get("std")}
    return [*found, Settings(str(path), name, options=options if isinstance(options, dict) else {}, **values)]


def _of_timm(path, config):
    """Reads the configuration that timm saves with a model."""
    trained = config.get("pretrained_cfg")
    trained = trained if isinstance(trained, dict) else config  # the first ones had no inner part
    options = config.get("model_args")
    values = {"mean": trained.get("mean"), "deviation": trained.get("std"), "pool": config.get("global_pool")}
    return Settings(str(path), config["architecture"], options=options if isinstance(options, dict) else {}, **values)
