"""Moshpit all-reduce: run the rounds of a plan, one group after the other.

    for every round r of the plan:
        find the group this peer belongs to in r (its line of the grid along dimension r)
        all-reduce the vector within it, weighted
        go on with the group's mean and the group's weight

On a full grid of M^d peers the last round leaves everybody with the exact weighted mean. With one
dimension, one round does. A group of one needs no network.

I/O through `ButterflyAllReduce`. Source: Moshpit SGD, arXiv:2103.03239, algorithm 1.
"""

import torch

from averaging.allreduce import ButterflyAllReduce, RoundResult
from averaging.network import PeerId
from averaging.plan import Plan


async def average(
    plan: Plan, me: PeerId, *, vector: torch.Tensor, weight: float, all_reduce: ButterflyAllReduce
) -> RoundResult:
    """Average `vector` ([values] float32) with the members of `plan`.

    Raises:
        RoundAbandonedError: a member was lost in one of the rounds; close the step anew.
    """
    sent_bytes = 0
    for index, groups in enumerate(plan.rounds):
        group = next(group for group in groups if me in group)
        if len(group) > 1:
            result = await all_reduce.run(plan.key, index, group, vector=vector, weight=weight)
            vector, weight = result.mean, result.weight
            sent_bytes += result.sent_bytes
    return RoundResult(vector, weight, sent_bytes)
