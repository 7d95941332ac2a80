"""Prepares data sets for train.py: python prepare.py --help."""

from l2sp_tf.cli.prepare import main

if __name__ == "__main__":
    raise SystemExit(main())
