"""The public names, as editors and type checkers see them; `__init__.py` imports each when it is first used."""

from .evaluation.accuracy import evaluate as evaluate, retention as retention
from .evaluation.predictions import Predictions as Predictions
from .evaluation.report import RetentionReport as RetentionReport, retention_report as retention_report
from .experiments.folders import predict_images as predict_images
from .experiments.selection import Selection as Selection, cross_validate as cross_validate
from .files.errors import InputError as InputError
from .fisher.diagonal import Fisher as Fisher
from .fisher.estimator import fisher_diagonal as fisher_diagonal
from .models.batch_norm import fuse_batch_norm as fuse_batch_norm, keep_statistics as keep_statistics
from .models.heads import with_new_head as with_new_head
from .models.units import freeze_first as freeze_first
from .models.zoo import load_pretrained as load_pretrained
from .optimizers.decoupled import Decoupled as Decoupled
from .optimizers.proximal import Proximal as Proximal, frozen_share as frozen_share
from .penalties.anchors import Anchors as Anchors
from .penalties.attachment import AnchorGuard as AnchorGuard, Coverage as Coverage, attach as attach, detach as detach
from .penalties.delta import DeltaSize as DeltaSize, load_delta as load_delta, save_delta as save_delta
from .penalties.formulas import (
    L1SP as L1SP,
    L2 as L2,
    L2SP as L2SP,
    GroupLassoSP as GroupLassoSP,
    GroupLassoSPFisher as GroupLassoSPFisher,
    L2SPFisher as L2SPFisher,
    UnboundPenaltyError as UnboundPenaltyError,
)
from .training.recipe import Recipe as Recipe
from .training.trainer import Run as Run, finetune as finetune, train_source as train_source
