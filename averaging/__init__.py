"""Average tensors with strangers who may vanish. Knows nothing of stages, trainers or models.

Layers, each importing only those above it:

    bounded                                         how much is remembered of others
    errors, network, virtual_time, memory_network   the seam to the outside and its in-memory twin
    framing, daemon, direct, hivemind_network       the real one: hivemind's daemon, frames, links past it
    codecs, reduce                                  tensors and bytes; the mean
    shares, bandwidth, grid, plan, round, repair    who averages with whom, reduces what, and does it again
    feedback, lowrank                               what a message leaves out; matrices as products
    wire                                            messages, validated
    reduction, allreduce, moshpit                   a reducer's pieces; one round in one group; all rounds
    coordinator, participant, averager              who closes a step; taking part in it; the front door
"""
