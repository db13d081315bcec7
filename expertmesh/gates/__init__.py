"""Gates: every way of the literature to choose experts for tokens, as pure functions of tensors.

    select.py      each token takes its best experts: top-k of softmax, sigmoid and more, noise, groups, top-p, all
    capacity.py    experts have limited room: Switch, GShard, and what overflows; or they do the choosing
    hashing.py     the token id decides
    choices.py     what comes out, and the convention for "no expert"
    spec.py        which gate, as a checked value          -> strategies.py, what there is; route.py, from name to gate
    balancing.py   losses and the bias that keep load even while a gate is learned
    measures.py    how even it is, and how sure

Needs torch and nothing else; `spec` and `strategies` not even that. Knows no model, no host and no placement: a gate
says which experts, never where.
"""
