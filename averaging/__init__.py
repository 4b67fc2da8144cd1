"""Average tensors with strangers who may vanish. Knows nothing of stages, trainers or models.

Layers, each importing only those above it:

    errors, network, virtual_time, memory_network   the seam to the outside and its in-memory twin
    codecs, shares, feedback, reduce, grid, plan    pure decisions and arithmetic
    allreduce, moshpit                              one round in one group; the rounds of a plan
    coordinator, participant                        who closes a step; taking part in it to its verdict
"""
