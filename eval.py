"""Draws tables and figures of finished runs, reports on a model and names the classes of images: python eval.py --help."""

from l2sp_tf.cli.eval import main

if __name__ == "__main__":
    raise SystemExit(main())
