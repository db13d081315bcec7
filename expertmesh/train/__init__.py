"""Trains the small MoE language model that ships with the package.

`python -m expertmesh.train --out FOLDER` is the whole interface: it fetches freely licensed text of a few unlike
domains (`sources`), splits it (`data`), trains a byte-level BPE (`tokenizer`) and a transformers MoE model (`model`,
`loop`, `balance`), and writes a plain checkpoint folder with every figure that describes it (`report`, `export`).

It serves nothing and no serving code imports it. Its invariant: the same corpus, options and versions give the same
run, because the learning rate follows the tokens seen, never the time.
"""
