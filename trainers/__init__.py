"""Route microbatches through the stages; own no weights.

ledger      pure: the life of a microbatch, events in, commands out
throttle    pure: how many microbatches to keep under way
packing     pure: texts -> sequences of token ids
data        texts from the Hub, from files, or from Python's own library
pipeline    executes the ledger's commands on the network and feeds it events
trainer     the process
"""
