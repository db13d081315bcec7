"""The dense part of a model: transformers' own, with its experts taken out and a callable in the place of each layer's."""

from expertmesh.backbone.backbone import Backbone, MoeLayerFn, attach_model, count_expert_parameters, load_backbone

__all__ = ["Backbone", "MoeLayerFn", "attach_model", "count_expert_parameters", "load_backbone"]
