"""Trains the small MoE language model that ships with the package, and shows what keeps its experts in use.

    python -m expertmesh.train --out FOLDER      text of a few unlike domains (`sources`), split (`data`), a byte-level
                                                 BPE (`tokenizer`), a transformers MoE model (`model`, `loop`), and a
                                                 plain checkpoint with every figure that describes it (`report`,
                                                 `export`)
    python -m expertmesh.train compare --out F   a smaller one under every `balance` (`trial`), as a table, a file and
                                                 a `picture` (`compare`)

It serves nothing and no serving code imports it. Its invariant: the same corpus, options and versions give the same
run, because the learning rate follows the tokens seen, never the time.
"""
