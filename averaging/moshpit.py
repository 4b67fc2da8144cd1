"""Moshpit all-reduce: run the rounds of a plan, one group after the other.

    for every dimension of the plan's grid:
        find the group this peer belongs to: its line along that dimension
        all-reduce the vector within it, weighted; of those who hold the same value one speaks
        go on with the group's mean and the group's weight

After the last round everybody holds the exact weighted mean (`averaging.grid`). With one dimension, one
round does. A group of one needs no network.

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
    grid, most_weight = plan.grid, all_reduce.max_weight
    for dimension in range(grid.dimensions):
        group = grid.group_of(me, dimension)
        if len(group.members) > 1:
            result = await all_reduce.run(
                (plan.key, dimension),
                group.members,
                vector=vector,
                weight=weight if me in group.speakers else 0.0,
                most_weight=most_weight,
                feed_back=grid.dimensions == 1,
            )
            vector, weight = result.mean, result.weight
            sent_bytes += result.sent_bytes
        most_weight = all_reduce.max_weight * len(plan.members)  # members stand for whole groups now
    return RoundResult(vector, weight, sent_bytes)
