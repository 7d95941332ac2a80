"""ResNets of other frameworks as loops over pixels in float64 NumPy, written from the architectures' descriptions."""

import numpy as np

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}


def convolution(x, kernel, stride=1, padding=0, bias=None):
    """Cross-correlation of [b, h, w, c] with [h, w, c, o], zeros on `padding` = (before, after) or the same number twice."""
    before, after = padding if isinstance(padding, tuple) else (padding, padding)
    x = np.pad(x, [(0, 0), (before, after), (before, after), (0, 0)])
    size = kernel.shape[0]
    rows, columns = ((side - size) // stride + 1 for side in x.shape[1:3])
    y = np.zeros((len(x), rows, columns, kernel.shape[3]))
    for i in range(rows):
        for j in range(columns):
            window = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
            y[:, i, j] = np.tensordot(window, kernel, axes=3)
    return y if bias is None else y + bias


def max_pool(x, size, stride, before, after):
    x = np.pad(x, [(0, 0), (before, after), (before, after), (0, 0)], constant_values=-np.inf)
    rows, columns = ((side - size) // stride + 1 for side in x.shape[1:3])
    windows = [[x[:, i * stride :, j * stride :][:, :size, :size].max(axis=(1, 2)) for j in range(columns)] for i in range(rows)]
    return np.moveaxis(np.array(windows), 2, 0)


def norm(x, gamma, beta, mean, variance):
    return (x - mean) / np.sqrt(variance + 1e-5) * gamma + beta


def relu(x):
    return np.maximum(x, 0)


class Weights(dict):
    """A network's weights by name; drawn at random when they are asked for the first time, with their shape."""

    def __init__(self, seed):
        super().__init__()
        self.rng = np.random.default_rng(seed)

    def draw(self, name, shape, kind):
        if name not in self:
            fan_in = np.prod(shape[1:] if kind == "torch" else shape[:-1])
            value = {
                "positive": lambda: self.rng.uniform(0.5, 1.5, shape),
                "any": lambda: self.rng.normal(0, 0.3, shape),
            }.get(kind, lambda: self.rng.normal(0, np.sqrt(2 / fan_in), shape))()
            self[name] = value.astype("float32")
        return self[name].astype("float64")


def slim(images, weights, classes, depths=DEPTHS["resnet50"], scope="resnet_v1_50"):
    """TF-slim's resnet_v1: fills `weights` under its variable names, and returns the logits."""

    def layer(x, name, filters, size, stride=1):
        name = f"{scope}/{name}"
        # conv2d_same: "SAME" without a stride, else (size - 1) zeros, half of them in front
        kernel = weights.draw(f"{name}/weights", (size, size, x.shape[-1], filters), "kernel")
        x = convolution(x, kernel, stride, ((size - 1) // 2, size - 1 - (size - 1) // 2))
        n = f"{name}/BatchNorm"
        gamma, variance = (weights.draw(f"{n}/{v}", (filters,), "positive") for v in ("gamma", "moving_variance"))
        beta, mean = (weights.draw(f"{n}/{v}", (filters,), "any") for v in ("beta", "moving_mean"))
        return norm(x, gamma, beta, mean, variance)

    x = relu(layer(images.astype("float64"), "conv1", 64, 7, 2))
    total = max((-(-x.shape[1] // 2) - 1) * 2 + 3 - x.shape[1], 0)  # TensorFlow's "SAME"
    x = max_pool(x, 3, 2, total // 2, total - total // 2)
    for block, (depth, units, last_stride) in enumerate(zip((64, 128, 256, 512), depths, (2, 2, 2, 1), strict=True), start=1):
        for unit in range(1, units + 1):
            stride = last_stride if unit == units else 1
            name = f"block{block}/unit_{unit}/bottleneck_v1"
            if x.shape[-1] == 4 * depth:
                shortcut = x[:, ::stride, ::stride]
            else:
                shortcut = layer(x, f"{name}/shortcut", 4 * depth, 1, stride)
            y = relu(layer(x, f"{name}/conv1", depth, 1))
            y = relu(layer(y, f"{name}/conv2", depth, 3, stride))
            x = relu(shortcut + layer(y, f"{name}/conv3", 4 * depth, 1))
    kernel = weights.draw(f"{scope}/logits/weights", (1, 1, x.shape[-1], classes), "kernel")
    bias = weights.draw(f"{scope}/logits/biases", (classes,), "any")
    return convolution(x.mean(axis=(1, 2), keepdims=True), kernel, bias=bias)[:, 0, 0]


def torch(images, weights, classes, name="resnet50"):
    """torchvision's ResNet: fills `weights` under the names of its state dict, and returns the logits."""

    def conv(x, name, filters, size, stride=1):
        kernel = weights.draw(f"{name}.weight", (filters, x.shape[-1], size, size), "torch")
        return convolution(x, np.moveaxis(kernel, (0, 1), (3, 2)), stride, size // 2)

    def bn(x, name):
        count = (x.shape[-1],)
        gamma, variance = (weights.draw(f"{name}.{v}", count, "positive") for v in ("weight", "running_var"))
        beta, mean = (weights.draw(f"{name}.{v}", count, "any") for v in ("bias", "running_mean"))
        weights[f"{name}.num_batches_tracked"] = np.array(7, "int64")
        return norm(x, gamma, beta, mean, variance)

    x = relu(bn(conv(images.astype("float64"), "conv1", 64, 7, 2), "bn1"))
    x = max_pool(x, 3, 2, 1, 1)
    for stage, (planes, blocks) in enumerate(zip((64, 128, 256, 512), DEPTHS[name], strict=True), start=1):
        for block in range(blocks):
            stride, at = 2 if stage > 1 and block == 0 else 1, f"layer{stage}.{block}"
            sizes = (
                [(planes, 3, stride), (planes, 3, 1)]
                if name == "resnet18"
                else [(planes, 1, 1), (planes, 3, stride), (4 * planes, 1, 1)]
            )
            y = x
            for i, (filters, size, step) in enumerate(sizes, start=1):
                y = bn(conv(y, f"{at}.conv{i}", filters, size, step), f"{at}.bn{i}")
                y = relu(y) if i < len(sizes) else y
            if stride != 1 or x.shape[-1] != y.shape[-1]:
                x = bn(conv(x, f"{at}.downsample.0", y.shape[-1], 1, stride), f"{at}.downsample.1")
            x = relu(x + y)
    kernel = weights.draw("fc.weight", (classes, x.shape[-1]), "torch")
    return x.mean(axis=(1, 2)) @ kernel.T + weights.draw("fc.bias", (classes,), "any")
