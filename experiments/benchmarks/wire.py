"""What a tensor costs on its way: bytes per value, coding speed, and one hop's frame against hivemind's RPC.

    python -m experiments.benchmarks.wire [--json]

Two processes on loopback, the same float32 tensor from one to the other, until it is a tensor there and a
small answer is back. Our frame is a push: header, payload, answer. The baseline is hivemind's own way over
its streaming RPC: its serializer, its 64 KiB chunks, its deserializer. A second row per size sends bare
bytes that the baseline's receiver drops as they come: what is left is the two transports. Runs alternate;
medians of 15.
"""

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import torch
import uvloop
from hivemind.compression import deserialize_tensor_stream, serialize_torch_tensor
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto.runtime_pb2 import ExpertRequest, ExpertResponse, Tensor
from hivemind.utils.streaming import split_for_streaming

from averaging.codecs import CODECS
from averaging.network import Buffer, Calls, Frame, PeerId, Stream, answer
from experiments.benchmarks.report import median_s, report
from swarm.process import joined

VALUES = 1 << 20
SIZES = {"64 KiB": 1 << 16, "1 MiB": 1 << 20, "8 MiB": 8 << 20}
CHUNK = 1 << 16
RUNS = 15
TENSOR = b"tensor"
Work = Callable[[], Awaitable[None]]


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
    if frame.header == TENSOR:
        CODECS["float32"].decode(frame.payload, (len(frame.payload) // 4,))
    return b"ok", b""


async def _rpc_service(
    requests: AsyncIterator[ExpertRequest], context: P2PContext
) -> AsyncIterator[ExpertResponse]:
    async for _ in requests:
        pass
    yield ExpertResponse()


async def _tensor_service(
    requests: AsyncIterator[ExpertRequest], context: P2PContext
) -> AsyncIterator[ExpertResponse]:
    async def parts() -> AsyncIterator[list[Tensor]]:
        async for request in requests:
            yield list(request.tensors)

    (tensor,) = await deserialize_tensor_stream(parts())
    assert tensor.numel()
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
        await here.network._p2p.add_protobuf_handler(
            "bench-tensor", _tensor_service, ExpertRequest, stream_input=True, stream_output=True
        )
        print(here.addresses[0], flush=True)
        await asyncio.Event().wait()


async def compared(what: str, size: int, ours: Work, hivemind: Work) -> dict[str, object]:
    """Both in turns; the row of their medians."""
    times: dict[str, list[float]] = {"ours": [], "hivemind": []}
    for number in range(RUNS + 3):
        for kind, work in (("ours", ours), ("hivemind", hivemind)):
            began = time.perf_counter()
            await work()
            if number >= 3:
                times[kind].append(time.perf_counter() - began)
    ours_s, theirs_s = (statistics.median(times[kind]) for kind in ("ours", "hivemind"))
    return {
        "what": what,
        "ours ms": 1e3 * ours_s,
        "ours MB/s": size / ours_s / 1e6,
        "hivemind ms": 1e3 * theirs_s,
        "hivemind MB/s": size / theirs_s / 1e6,
        "ratio": theirs_s / ours_s,
    }


async def measure(address: str) -> list[dict[str, object]]:
    async with joined([address]) as here:
        peer = address.rsplit("/", 1)[1]
        calls = Calls(here.network, "bench", deadline_s=30)
        rows: list[dict[str, object]] = []
        p2p, peer_id = here.network._p2p, PeerID.from_base58(peer)

        async def stream(service: str, chunks: AsyncIterator[ExpertRequest]) -> None:
            async for _ in await p2p.iterate_protobuf_handler(peer_id, service, chunks, ExpertResponse):
                pass

        for name, size in SIZES.items():
            payload, tensor = os.urandom(size), torch.randn(size // 4)

            async def frame(tensor: torch.Tensor = tensor) -> None:
                await calls.call(peer, TENSOR, CODECS["float32"].encode(tensor))

            async def rpc(tensor: torch.Tensor = tensor) -> None:
                async def chunks() -> AsyncIterator[ExpertRequest]:
                    for part in split_for_streaming(serialize_torch_tensor(tensor), CHUNK):
                        yield ExpertRequest(uid="x", tensors=[part])

                await stream("bench-tensor", chunks())

            async def bare_frame(data: bytes = payload) -> None:
                await calls.call(peer, b"bytes", data)

            async def bare_rpc(data: bytes = payload) -> None:
                async def chunks() -> AsyncIterator[ExpertRequest]:
                    for start in range(0, len(data), CHUNK):
                        yield ExpertRequest(uid="x", tensors=[Tensor(buffer=data[start : start + CHUNK])])

                await stream("bench-rpc", chunks())

            rows.append(await compared(f"tensor of {name}", size, frame, rpc))
            rows.append(await compared(f"bare bytes, {name}", size, bare_frame, bare_rpc))
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
    ratios["frame_over_hivemind_8mib"] = float(frames[-2]["ratio"])  # type: ignore[arg-type]
    ratios["bare_bytes_over_hivemind_8mib"] = float(frames[-1]["ratio"])  # type: ignore[arg-type]
    report("wire", [*coding, *frames], ratios, options.json)


if __name__ == "__main__":
    main()
