"""The control plane: decides where experts are. Pure decisions here; `ray_cluster` and `actor` are the shells.

Never imports the engine, the backbone or the moe package: the two planes meet in a placement and in load reports only.
"""
