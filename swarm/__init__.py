"""A pool of preemptible peers serves each stage of one large model.

One word, one thing:

peer         a process that serves one stage with one device
trainer      a process that reads data and routes microbatches; owns no weights
stage        consecutive layers of the model, numbered from 0; the last one also holds the loss
microbatch   the unit routed: token ids of a few sequences, with a 16-byte id
hop          one microbatch at one stage: a forward and a backward
step         one optimizer update of a stage; a stage's `version` is its number of steps
roster       the live peers of a stage, as read from the DHT
coordinator  the peer that closes one step of its stage; another one each step
plan         the coordinator's one decision per step: who averages with whom, in every round
grid, group, round   Moshpit's grid; the peers on one line of it; one all-reduce along one dimension
manifest     the signed description of a run: its YAML resolved, hashes, the organizer's key
"""
