"""The strategies by name: what each is, where it comes from, what it is for and costs, and what it is told.

Data only, for documentation and for checking a `GateSpec`. Invariant: `route.GATES` has a gate for each name here, and
no other.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """One way to choose experts."""

    title: str
    paper: str
    purpose: str
    cost: str
    """In expert rows for each token, and in what else it takes."""
    needs: tuple[str, ...] = ()
    """Fields of GateSpec that it cannot do without."""
    takes: tuple[str, ...] = ()
    """Fields of GateSpec that it may have besides."""
    inputs: tuple[str, ...] = ()
    """Fields of GateInput that it needs besides the logits."""
    fixed_k: int | None = None
    """How many experts a token gets, where the strategy says so."""
    is_alone: bool = True
    """Whether a token's experts depend on nothing but itself, whatever the spec. See also `GateSpec.is_alone`."""


_SELECTION = ("normalize", "scale", "num_groups", "groups_kept", "group_score")
_CAPACITY = ("capacity_factor", "overflow", "by_confidence")

STRATEGIES: dict[str, Strategy] = {
    "softmax-topk": Strategy(
        title="softmax, then the k best",
        paper="Mixtral (arXiv 2401.04088), OLMoE (2409.02060), DeepSeek-V2 (2405.04434)",
        purpose="the common gate of language models; probabilities say how sure it is",
        cost="k rows",
        needs=("k",),
        takes=_SELECTION,
    ),
    "topk-softmax": Strategy(
        title="the k best, then softmax over them",
        paper="Shazeer et al. 2017 (arXiv 1701.06538, equations 3 and 5), gpt-oss, JetMoE",
        purpose="the same as softmax-topk with normalize, without a sum over all experts",
        cost="k rows",
        needs=("k",),
    ),
    "sigmoid-topk": Strategy(
        title="sigmoid scores, then the k best",
        paper="DeepSeek-V3 (arXiv 2412.19437, equations 12 to 16), Llama 4",
        purpose="many experts: scores do not compete, a bias balances load, groups bound the machines of a token",
        cost="k rows",
        needs=("k",),
        takes=_SELECTION,
    ),
    "sqrt-softplus-topk": Strategy(
        title="square roots of softplus as scores, then the k best",
        paper="DeepSeek-V4",
        purpose="as sigmoid-topk, with scores that do not saturate",
        cost="k rows",
        needs=("k",),
        takes=_SELECTION,
    ),
    "switch": Strategy(
        title="top-1 with capacity",
        paper="Switch Transformers: Fedus et al. 2021 (arXiv 2101.03961, equations 1 to 3)",
        purpose="the least work for a token, and a bound on each expert's",
        cost="1 row; tokens past an expert's capacity lose it",
        takes=_CAPACITY,
        fixed_k=1,
        is_alone=False,
    ),
    "gshard": Strategy(
        title="top-2 with capacity and a random second expert",
        paper="GShard: Lepikhin et al. 2020 (arXiv 2006.16668, algorithm 1); NLLB-MoE with normalize",
        purpose="two opinions for a token, with a bound on each expert's work",
        cost="2 rows, fewer with random_second; choices past an expert's capacity are lost",
        takes=(*_CAPACITY, "random_second", "normalize"),
        fixed_k=2,
        is_alone=False,
    ),
    "noisy-topk": Strategy(
        title="learned noise on the logits, then the k best, then softmax",
        paper="Shazeer et al. 2017 (arXiv 1701.06538, equations 3 to 5)",
        purpose="training: experts that are not the best so far are tried, and load has a gradient",
        cost="k rows, and a second projection of the token for the noise",
        needs=("k",),
        inputs=("noise_TE",),
    ),
    "hash": Strategy(
        title="a fixed function of the token id",
        paper="Hash layers: Roller et al. 2021 (arXiv 2106.04426)",
        purpose="a baseline without learning, with even load from the first step on",
        cost="k rows, and no projection",
        needs=("k",),
        inputs=("token_T", "table_VK"),
    ),
    "top-p": Strategy(
        title="as many experts as it takes for their probabilities to sum to p",
        paper="Huang et al. 2024 (arXiv 2403.07652, section 2.2)",
        purpose="few experts for easy tokens and more for hard ones",
        cost="1 to k rows, by how sure the gate is",
        needs=("top_p",),
        takes=("k", "normalize", "scale"),
    ),
    "threshold": Strategy(
        title="of the k best, those that are not far behind the best",
        paper="Dynamic expert skipping: Lu et al. 2024 (arXiv 2402.14800)",
        purpose="to serve a model of k experts with fewer, where the others would weigh little",
        cost="1 to k rows, by how far the best expert is ahead",
        needs=("k", "ratio"),
        takes=("normalize", "scale"),
    ),
    "expert-choice": Strategy(
        title="each expert takes its best tokens",
        paper="Zhou et al. 2022 (arXiv 2202.09368, equations 1 and 2)",
        purpose="training of models that are not causal: even load without any balancing term",
        cost="capacity_factor rows on average, none to E for a single token",
        needs=("capacity_factor",),
        is_alone=False,
    ),
    "dense": Strategy(
        title="all experts",
        paper="Jacobs et al. 1991 (Adaptive mixtures of local experts)",
        purpose="the reference that sparse gates approximate",
        cost="E rows",
    ),
}
"""By the name in a config."""
