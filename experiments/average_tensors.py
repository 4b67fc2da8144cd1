"""Average a tensor among processes, with the library alone: one line per process, on one or more machines.

python -m experiments.average_tensors FOLDER COUNT VALUE      FOLDER is where they find each other
"""

# ruff: noqa: ASYNC110, ASYNC240 - the folder holds a few names
import asyncio
import sys
from pathlib import Path

import torch

from averaging.averager import Averager
from averaging.daemon import start_daemon
from averaging.hivemind_network import HivemindNetwork


async def main(folder: Path, count: int, value: float) -> None:
    folder.mkdir(exist_ok=True)
    p2p = await start_daemon(identity=folder / f"identity-{value}")
    network = HivemindNetwork(p2p)
    (folder / f"{network.peer_id}.peer").write_text("\n".join(await network.addresses()))
    while len(found := list(folder.glob("*.peer"))) < count:
        await asyncio.sleep(0.1)

    async def addresses(peer: str) -> list[str]:
        return (folder / f"{peer}.peer").read_text().split()

    network.use_addresses(addresses)
    averager = Averager(network, peers=lambda: [path.stem for path in found], target=count, codec="float32")
    await averager.start()
    mean = await averager.average(torch.full((1000,), value))
    print(f"{value} became {mean.vector.mean():.4f} with {len(mean.members)} members", flush=True)
    await asyncio.sleep(1)  # the others may still be listening
    averager.close()
    await p2p.shutdown()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
