"""Fine-tuning Keras models with penalties anchored at the pre-trained weights.

Each name is imported when it is first used, so that the regularizers load without TensorFlow (on Keras' other
backends) and the entry points answer at once. As soon as Keras is imported too, its `load_model` knows the classes of this
package.
"""

import importlib
import pkgutil
import sys
import types

import wrapt

_MODULES = {
    "anchors": ["Anchors"],
    "attach": ["AnchorGuard", "Coverage", "attach", "detach"],
    "batch_norm": ["fuse_batch_norm"],
    "decoupled": ["Decoupled"],
    "delta": ["DeltaSize", "load_delta", "save_delta"],
    "errors": ["InputError"],
    "evaluation": ["evaluate", "retention"],
    "fisher": ["Fisher", "fisher_diagonal"],
    "heads": ["with_new_head"],
    "predictions": ["Predictions", "predict_images"],
    "proximal": ["Proximal", "frozen_share"],
    "recipe": ["Recipe"],
    "regularizers": ["L1SP", "L2", "L2SP", "GroupLassoSP", "GroupLassoSPFisher", "L2SPFisher", "UnboundPenaltyError"],
    "retention_report": ["RetentionReport", "retention_report"],
    "selection": ["Selection", "cross_validate"],
    "training": ["Run", "finetune", "train_source"],
    "units": ["freeze_first"],
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AnchorGuard",
    "Anchors",
    "Coverage",
    "Decoupled",
    "DeltaSize",
    "Fisher",
    "GroupLassoSP",
    "GroupLassoSPFisher",
    "InputError",
    "L1SP",
    "L2",
    "L2SP",
    "L2SPFisher",
    "Predictions",
    "Proximal",
    "Recipe",
    "RetentionReport",
    "Run",
    "Selection",
    "UnboundPenaltyError",
    "attach",
    "cross_validate",
    "detach",
    "evaluate",
    "finetune",
    "fisher_diagonal",
    "freeze_first",
    "frozen_share",
    "fuse_batch_norm",
    "load_delta",
    "predict_images",
    "retention",
    "retention_report",
    "save_delta",
    "train_source",
    "with_new_head",
]


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__():
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """Keeps the import of a submodule from hiding the public name that it shares (`attach`)."""

    def __setattr__(self, name, value):
        super().__setattr__(name, getattr(value, name) if name in _HOMES and isinstance(value, types.ModuleType) else value)


sys.modules[__name__].__class__ = _Package


def _register(module):
    """Imports the modules whose classes register with Keras, once Keras is there and none of ours is half imported."""
    own = [other for name, other in sys.modules.items() if name.startswith(f"{__name__}.") and other is not module]
    if "keras" in sys.modules and not any(getattr(other.__spec__, "_initializing", False) for other in own):
        for name in ("regularizers", "proximal", "decoupled"):
            importlib.import_module(f"{__name__}.{name}")


for _name in ("keras", *(f"{__name__}.{found.name}" for found in pkgutil.iter_modules(__path__))):
    wrapt.register_post_import_hook(_register, _name)
