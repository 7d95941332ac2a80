"""Fine-tuning Keras models with penalties anchored at the pre-trained weights.

`__init__.pyi` lists the public names. Each is imported when it is first used, so that the regularizers load without
TensorFlow (on Keras' other backends) and the commands answer at once. As soon as Keras is imported too, its `load_model`
knows the classes of this package.
"""

import importlib
import pathlib
import sys

import lazy_loader
import wrapt

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def _register(module):
    """Imports the modules whose classes register with Keras, once Keras is there and none of ours is half imported."""
    own = [other for name, other in sys.modules.items() if name.startswith(f"{__name__}.") and other is not module]
    if "keras" in sys.modules and not any(getattr(other.__spec__, "_initializing", False) for other in own):
        for name in ("penalties.formulas", "optimizers.proximal", "optimizers.decoupled"):
            importlib.import_module(f"{__name__}.{name}")


_rooms = [path.relative_to(pathlib.Path(__file__).parent) for path in pathlib.Path(__file__).parent.glob("*/*.py")]
for _name in ("keras", *(f"{__name__}.{'.'.join(room.with_suffix('').parts)}" for room in _rooms)):
    wrapt.register_post_import_hook(_register, _name)
