"""A whole run as discrete events: who comes, moves and dies, and where every microbatch goes.

    trace         how many machines there are, when: real, or drawn like real ones
    events        the clock: what happens next
    fleet         peers choose a stage, load its state, move and die, as the roster lets them see each other
    optimum       what the same peers could do at best
    run           all of it, from a trace to a result

Decisions are the product's own code: `swarm.rebalance`, `swarm.assignment`. Modelled are machines and links.
"""
