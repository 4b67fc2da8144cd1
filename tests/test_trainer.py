"""What a trainer says of its progress."""

import time

from averaging import virtual_time
from averaging.memory_network import MemoryHub
from swarm.directory import MemoryDirectory
from tests.sim import tiny_run
from trainers.events import PeerReady
from trainers.trainer import Trainer


def test_a_newcomer_that_is_behind_takes_no_step_back():
    async def main():
        trainer = Trainer(
            network=MemoryHub().network("trainer"),
            directory=MemoryDirectory(time.monotonic, 10),
            config=tiny_run(),
            number=0,
            microbatches=iter(()),
            held_out=[],
        )
        for stage in range(3):
            trainer.pipeline.feed(PeerReady(stage, f"peer of {stage}", 4))
        assert trainer.step == trainer.metrics()["step"] == 4
        trainer.pipeline.feed(PeerReady(1, "newcomer", 0))
        assert trainer.pipeline.ledger.version == 0
        assert trainer.step == trainer.metrics()["step"] == 4

    virtual_time.run(main())
