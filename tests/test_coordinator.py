"""The coordinator's decisions over time, on the in-memory network."""

import asyncio
import random

from averaging import virtual_time
from averaging.coordinator import Ballot, Coordinator
from averaging.memory_network import MemoryHub
from averaging.plan import Report, StepRules


async def nothing():
    pass


def test_who_is_missing_is_waited_for_anew_when_the_target_is_lost_and_reached_again():
    async def main():
        rules = StepRules(target=8.0, max_weight=32.0)
        coordinator = Coordinator(
            network=MemoryHub().network("a"),
            rules=rules,
            version=lambda: 0,
            expected=lambda: ["a", "b", "c"],
            voters=lambda: ["a", "b", "c"],
            reporting_to=lambda: "a",
            silent=lambda: [],
            pending=lambda plan: False,
            suspect=lambda error: None,
            refresh=nothing,
            rng=random.Random(0),
        )
        target, state = rules.target, b"12345678"
        ballot = Ballot(0, reports={"a": Report(target, state), "b": Report(0, state)})
        assert "waiting" in coordinator.consider(ballot).reason
        ballot.reports["a"] = Report(target / 2, state)  # some of it is given up
        assert not coordinator.consider(ballot).close
        await asyncio.sleep(10 * rules.grace_s)
        ballot.reports["a"] = Report(target, state)
        assert "waiting" in coordinator.consider(ballot).reason
        await asyncio.sleep(2 * rules.grace_s)
        assert ballot.plan is not None

    virtual_time.run(main())
