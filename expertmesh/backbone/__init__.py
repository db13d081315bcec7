"""The dense part of a model: transformers' own, with a callable in the place of each MoE layer's experts."""

from expertmesh.backbone.backbone import Backbone, attach_model, count_expert_parameters, load_backbone
from expertmesh.backbone.experts import MoeLayerFn
from expertmesh.backbone.gating import Gates

__all__ = ["Backbone", "Gates", "MoeLayerFn", "attach_model", "count_expert_parameters", "load_backbone"]
