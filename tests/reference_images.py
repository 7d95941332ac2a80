"""Naive NumPy loops that the image operations are compared with."""

import numpy as np


def blur(image, sigma, kernel_size):
    """Gaussian blur of [h, w, c] as one sum over the two-dimensional window, in float64."""
    radius = kernel_size // 2
    window = np.zeros((kernel_size, kernel_size))
    for i in range(kernel_size):
        for j in range(kernel_size):
            window[i, j] = np.exp(-((i - radius) ** 2 + (j - radius) ** 2) / (2 * sigma**2))
    window /= window.sum()
    padded = np.pad(image.astype(np.float64), [(radius, radius), (radius, radius), (0, 0)], mode="reflect")
    blurred = np.zeros(image.shape)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            for c in range(image.shape[2]):
                blurred[y, x, c] = (window * padded[y : y + kernel_size, x : x + kernel_size, c]).sum()
    return blurred


def resize(image, size):
    """Bilinear resize of [h, w, c]: a tent over each new pixel's centre, as wide as the shrinking asks for, in float64."""
    resized = np.zeros((size, size, image.shape[2]))
    for y in range(size):
        rows = _tent(y, image.shape[0], size)
        for x in range(size):
            columns = _tent(x, image.shape[1], size)
            for c in range(image.shape[2]):
                resized[y, x, c] = rows @ image[:, :, c].astype(np.float64) @ columns
    return resized


def _tent(place, old, new):
    centre, width = (place + 0.5) * old / new, max(1.0, old / new)
    weights = np.array([max(0.0, 1 - abs(i + 0.5 - centre) / width) for i in range(old)])
    return weights / weights.sum()


def windows(image, size):
    """Every square of `size` in [h, w, c], by its top left corner."""
    found = {}
    for y in range(image.shape[0] - size + 1):
        for x in range(image.shape[1] - size + 1):
            found[y, x] = image[y : y + size, x : x + size]
    return found
