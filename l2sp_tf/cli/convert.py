"""Converts weights of TF-slim and PyTorch to a weights file of this project."""

import argparse
import pathlib
import sys

from l2sp_tf.files.errors import InputError
from l2sp_tf.models.convert import convert_tf_slim, convert_torch
from l2sp_tf.models.efficientnet_lite import LITE
from l2sp_tf.models.pixels import PIXELS, PixelFormat, three_numbers
from l2sp_tf.models.resnets import SLIM, TORCH


def main(argv=None):
    """Converts one file as the command line says, and returns the exit status: 0, 2 for bad input, 1 for a full disk."""
    parser = argparse.ArgumentParser(prog="python -m l2sp_tf.cli.convert", description=__doc__)
    parser.add_argument("source", help="TF-slim checkpoint (.ckpt) or PyTorch state dict (.pth, .pth.tar, .safetensors)")
    parser.add_argument("output", help="the .safetensors file to write")
    parser.add_argument("--backbone", required=True, help=f"one of {', '.join((*SLIM, *TORCH, *LITE))}")
    parser.add_argument("--classes", type=int, help="number of classes that the head must have; by default any")
    parser.add_argument("--pixels", help=f"how the weights see pixels: {', '.join(PIXELS)}; by default their framework's way")
    parser.add_argument("--mean", help="R,G,B from 0 to 255: the mean of the images that the weights were trained on")
    parser.add_argument("--state", help="the state dict to read, if a PyTorch checkpoint holds several, such as model_ema")
    options = parser.parse_args(argv)
    try:
        if pathlib.Path(options.output).suffix != ".safetensors":
            raise InputError(f"The output {options.output} does not end in .safetensors: give it that ending.")
        mean = None if options.mean is None else three_numbers("mean", options.mean.split(","))
        how = {"classes": options.classes, "pixels": options.pixels}
        if options.backbone in SLIM:
            weights = convert_tf_slim(options.source, options.backbone, **how)
        else:
            weights = convert_torch(options.source, options.backbone, **how, state=options.state)
        if mean is not None:
            weights.metadata["pixels"] |= {"mean": mean}
        weights.save(options.output)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    classes = f"{weights['predictions/bias'].size} classes" if "predictions/bias" in weights else "no head"
    print(f"wrote {options.output}: {options.backbone}, {classes}, pixels {PixelFormat(**weights.metadata['pixels'])}; {weights}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
