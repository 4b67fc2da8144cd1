"""What a tensor costs on its way: bytes per value, coding speed, and one hop's frame against hivemind's RPC.

    python -m experiments.benchmarks.wire [--json]

Two processes on loopback. Our frame is the request/response of a push: header, payload, answer. The
baseline is hivemind's own streaming RPC (protobuf messages of 64 KiB chunks), the same bytes, answered by
one small message. Runs of the two alternate; medians of 15.
"""

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator

import torch
import uvloop
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto.runtime_pb2 import ExpertRequest, ExpertResponse, Tensor

from averaging.codecs import CODECS
from averaging.network import Buffer, Calls, Frame, PeerId, Stream, answer
from experiments.benchmarks.report import median_s, report
from swarm.process import joined

VALUES = 1 << 20
SIZES = {"64 KiB": 1 << 16, "1 MiB": 1 << 20, "8 MiB": 8 << 20}
CHUNK = 1 << 16
RUNS = 15


def coding_rows() -> list[dict[str, object]]:
    tensor = torch.randn(VALUES)
    rows: list[dict[str, object]] = []
    for name, codec in CODECS.items():
        data = bytearray(codec.encode(tensor))
        encode_s = median_s(lambda c=codec: c.encode(tensor), RUNS)
        decode_s = median_s(lambda c=codec, d=data: c.decode(d, (VALUES,)), RUNS)
        rows.append(
            {
                "what": f"codec {name}",
                "bytes/value": len(data) / VALUES,
                "encode GB/s": 4 * VALUES / encode_s / 1e9,
                "decode GB/s": 4 * VALUES / decode_s / 1e9,
            }
        )
    return rows


async def _frame_service(sender: PeerId, frame: Frame) -> tuple[bytes, Buffer]:
    return b"ok", b""


async def _rpc_service(
    requests: AsyncIterator[ExpertRequest], context: P2PContext
) -> AsyncIterator[ExpertResponse]:
    async for _ in requests:
        pass
    yield ExpertResponse()


async def serve() -> None:
    """The listening process."""
    async with joined([]) as here:

        async def frames(stream: Stream) -> None:
            await answer(stream, _frame_service)

        await here.network.serve("bench", frames, max_payload_bytes=1 << 24)
        await here.network._p2p.add_protobuf_handler(
            "bench-rpc", _rpc_service, ExpertRequest, stream_input=True, stream_output=True
        )
        print(here.addresses[0], flush=True)
        await asyncio.Event().wait()


async def measure(address: str) -> list[dict[str, object]]:
    async with joined([address]) as here:
        peer = address.rsplit("/", 1)[1]
        calls = Calls(here.network, "bench", deadline_s=30)
        rows: list[dict[str, object]] = []
        for name, size in SIZES.items():
            payload = os.urandom(size)

            async def frame(data: bytes = payload) -> None:
                await calls.call(peer, b"header" * 16, data)

            async def rpc(data: bytes = payload) -> None:
                async def chunks() -> AsyncIterator[ExpertRequest]:
                    for start in range(0, len(data), CHUNK):
                        yield ExpertRequest(uid="x", tensors=[Tensor(buffer=data[start : start + CHUNK])])

                stream = await here.network._p2p.iterate_protobuf_handler(
                    PeerID.from_base58(peer), "bench-rpc", chunks(), ExpertResponse
                )
                async for _ in stream:
                    pass

            times: dict[str, list[float]] = {"ours": [], "hivemind": []}
            for number in range(RUNS + 3):
                for kind, work in (("ours", frame), ("hivemind", rpc)):
                    began = time.perf_counter()
                    await work()
                    if number >= 3:
                        times[kind].append(time.perf_counter() - began)
            ours, theirs = (statistics.median(times[kind]) for kind in ("ours", "hivemind"))
            rows.append(
                {
                    "what": f"frame of {name}",
                    "ours ms": 1e3 * ours,
                    "ours MB/s": size / ours / 1e6,
                    "hivemind ms": 1e3 * theirs,
                    "hivemind MB/s": size / theirs / 1e6,
                    "ratio": theirs / ours,
                }
            )
        calls.close()
        return rows


async def both() -> list[dict[str, object]]:
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "experiments.benchmarks.wire", "--serve", stdout=asyncio.subprocess.PIPE
    )
    try:
        assert server.stdout is not None
        address = (await asyncio.wait_for(server.stdout.readline(), 60)).decode().strip()
        return await measure(address)
    finally:
        server.kill()
        await server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        uvloop.run(serve())
        return
    coding, frames = coding_rows(), uvloop.run(both())
    ratios = {f"{name}_bytes_per_value": CODECS[name].size_bytes(VALUES) / VALUES for name in CODECS}
    ratios["frame_over_hivemind_8mib"] = float(frames[-1]["ratio"])  # type: ignore[arg-type]
    report("wire", [*coding, *frames], ratios, options.json)


if __name__ == "__main__":
    main()
