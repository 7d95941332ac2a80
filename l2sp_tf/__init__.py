"""Fine-tuning Keras models with penalties anchored at the pre-trained weights."""

from l2sp_tf.anchors import Anchors
from l2sp_tf.attach import AnchorGuard, Coverage, attach, detach
from l2sp_tf.errors import InputError
from l2sp_tf.models import freeze_first, with_new_head
from l2sp_tf.regularizers import L1SP, L2, L2SP, GroupLassoSP, GroupLassoSPFisher, L2SPFisher, UnboundPenaltyError

__all__ = [
    "AnchorGuard",
    "Anchors",
    "Coverage",
    "GroupLassoSP",
    "GroupLassoSPFisher",
    "InputError",
    "L1SP",
    "L2",
    "L2SP",
    "L2SPFisher",
    "UnboundPenaltyError",
    "attach",
    "detach",
    "freeze_first",
    "with_new_head",
]
