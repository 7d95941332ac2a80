"""Fine-tunes a pre-trained network under each penalty and seed: python train.py --help."""

from l2sp_tf.cli.train import main

if __name__ == "__main__":
    raise SystemExit(main())
