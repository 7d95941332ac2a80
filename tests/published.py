"""Files of weights as keras.applications publishes them."""

import h5py
import numpy as np


def write_published(path, model, drop=0):
    """Writes weights in Keras' older format: for each layer, its arrays under a group, and their names in attributes."""
    layers = [layer for layer in model.layers if layer.weights]
    layers = layers[: len(layers) - drop]
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = np.array([layer.name.encode() for layer in [*model.layers[:1], *layers]])
        file.create_group(model.layers[0].name).attrs["weight_names"] = np.array([], "S1")
        for layer in layers:
            group, variables = file.create_group(layer.name), layer.trainable_weights + layer.non_trainable_weights
            group.attrs["weight_names"] = np.array([f"{layer.name}/{v.name}:0".encode() for v in variables])
            for variable in variables:
                group[f"{layer.name}/{variable.name}:0"] = variable.numpy()
