"""Naive NumPy loops that the image operations are compared with."""

import colorsys

import numpy as np


def distort(image, brightness, saturation, contrast):
    """[h, w, 3] through HSV pixel by pixel, then each channel about its mean, in float64."""
    changed = np.zeros(image.shape)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            rgb = [float(channel) + brightness for channel in image[y, x]]
            if max(rgb) > 0:
                hue, s, value = colorsys.rgb_to_hsv(*rgb)
                changed[y, x] = colorsys.hsv_to_rgb(hue, min(s * saturation, 1.0), value)
            else:
                changed[y, x] = max(rgb)
    for c in range(3):
        mean = sum(changed[:, :, c].ravel()) / changed[:, :, c].size
        changed[:, :, c] = mean + contrast * (changed[:, :, c] - mean)
    return changed


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


def resize(image, height, width):
    """Resize of [h, w, c] as one sum over all pixels for each new one, in float64.

    Along a side that shrinks a pixel counts by how much of it the new one covers; along one that is stretched
    by a tent over the new pixel's centre.
    """
    resized = np.zeros((height, width, image.shape[2]))
    for y in range(height):
        rows = _shares(y, image.shape[0], height)
        for x in range(width):
            columns = _shares(x, image.shape[1], width)
            for c in range(image.shape[2]):
                resized[y, x, c] = rows @ image[:, :, c].astype(np.float64) @ columns
    return resized


def resize_as_in_tensorflow_1(image, height, width):
    """Bilinear resize of [h, w, c] about the places (y h / height, x w / width), in float64."""
    resized = np.zeros((height, width, image.shape[2]))
    for y in range(height):
        for x in range(width):
            top, left = y * image.shape[0] / height, x * image.shape[1] / width
            for row in (int(top), int(top) + 1):
                for column in (int(left), int(left) + 1):
                    share = (1 - abs(row - top)) * (1 - abs(column - left))
                    pixel = image[min(row, image.shape[0] - 1), min(column, image.shape[1] - 1)]
                    resized[y, x] += share * pixel.astype(np.float64)
    return resized


def _shares(place, old, new):
    if new > old:
        centre = (place + 0.5) * old / new
        weights = np.array([max(0.0, 1 - abs(i + 0.5 - centre)) for i in range(old)])
    else:
        first, last = place * old / new, (place + 1) * old / new
        weights = np.array([max(0.0, min(i + 1, last) - max(i, first)) for i in range(old)])
    return weights / weights.sum()


def windows(image, size):
    """Every square of `size` in [h, w, c], by its top left corner."""
    found = {}
    for y in range(image.shape[0] - size + 1):
        for x in range(image.shape[1] - size + 1):
            found[y, x] = image[y : y + size, x : x + size]
    return found


def ten_crops(image, size):
    """Top left, top right, bottom left, bottom right and central square of [h, w, c], then their mirror images."""
    height, width = image.shape[:2]
    middle = ((height - size) // 2, (width - size) // 2)
    crops = []
    for top, left in ((0, 0), (0, width - size), (height - size, 0), (height - size, width - size), middle):
        crops.append(image[top : top + size, left : left + size])
    return crops + [np.fliplr(crop) for crop in crops]


def splitmix(first, second, draw):
    """The number in [0, 1) of one seed and draw, by Python's integers."""

    def mixed(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    return (mixed((mixed((mixed(first) + second) % 2**64) + draw) % 2**64) >> 40) / 2**24
