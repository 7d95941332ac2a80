"""The guide's table of Keras models agrees with what the library does."""

import pytest

from benchmarks import models


def test_the_table_has_models_in_order():
    rows = list(models.rows_of_page())
    assert rows == [name for name in models.MODELS if name in rows] and set(models.CHEAPEST) <= set(rows)


@pytest.mark.parametrize(
    "name", [name if name in models.CHEAPEST else pytest.param(name, marks=pytest.mark.slow) for name in models.MODELS]
)
def test_a_row_of_the_table_is_what_happens(name):
    if name.startswith("KerasHub"):
        pytest.importorskip("keras_hub")
    rows = models.rows_of_page()
    if name not in rows:
        pytest.skip(f"{name} is not in docs/models.md yet")
    assert models.check(name) == rows[name]
