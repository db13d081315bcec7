"""An MoE layer as a service, for models that are not language models: `expertmesh.MoELayer`, a torch module.

    module.py    the module: a gate of its own, the experts of others, the weighted sum
    experts.py   what it asks of experts, and those that a mesh serves, for inference
    trained.py   experts that hosts train: gradients, steps, checkpoints, and what to do when a host is lost
    local.py     experts in this process, trained as any module: the same layer without a service
    example.py   `python -m expertmesh.layers.example`: both trained on one task, a host killed on the way

Its invariant: what a layer computes, and what it learns, do not depend on which host holds which expert.
"""
