"""Names of types that signatures share."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

Path = str | os.PathLike[str]
Weights = Mapping[str, np.ndarray]  # from the key of a weight to an array
Tensor = Any  # a tensor, a Keras variable or an array, of whichever backend
