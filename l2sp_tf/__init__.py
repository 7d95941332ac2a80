"""Fine-tuning Keras models with penalties anchored at the pre-trained weights."""

from l2sp_tf.anchors import Anchors
from l2sp_tf.attach import AnchorGuard, Coverage, attach, detach
from l2sp_tf.errors import InputError
from l2sp_tf.evaluation import evaluate, retention
from l2sp_tf.fisher import Fisher, fisher_diagonal
from l2sp_tf.models import freeze_first, with_new_head
from l2sp_tf.recipe import Recipe
from l2sp_tf.regularizers import L1SP, L2, L2SP, GroupLassoSP, GroupLassoSPFisher, L2SPFisher, UnboundPenaltyError
from l2sp_tf.selection import Selection, cross_validate
from l2sp_tf.training import Run, finetune, train_source

__all__ = [
    "AnchorGuard",
    "Anchors",
    "Coverage",
    "Fisher",
    "GroupLassoSP",
    "GroupLassoSPFisher",
    "InputError",
    "L1SP",
    "L2",
    "L2SP",
    "L2SPFisher",
    "Recipe",
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
    "retention",
    "train_source",
    "with_new_head",
]
