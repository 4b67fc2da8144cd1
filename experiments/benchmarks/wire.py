"""What a tensor costs on its way: bytes per value, coding speed, and one hop's frame against hivemind's RPC.

    python -m experiments.benchmarks.wire [--json]

Two processes on loopback, a float32 tensor from one to the other, until it is a tensor there and a small
answer is back. Ours is a push as our peers do it: header, payload, answer, in processes set up like theirs.
The baseline is hivemind's own way over its streaming RPC: its serializer, its 64 KiB chunks, its
deserializer. It is measured twice: in processes as hivemind leaves them, and in processes set up like our
peers' (freed memory kept, one thread, a daemon on one core). `bare bytes` sends ready bytes that the
baseline's receiver drops as they come: what is left is the two transports. Runs alternate; medians of 15.
"""

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import torch
import uvloop
from hivemind.compression import deserialize_tensor_stream, serialize_torch_tensor
from hivemind.p2p import PeerID
from hivemind.proto.runtime_pb2 import ExpertRequest, ExpertResponse, Tensor
from hivemind.utils.streaming import split_for_streaming

from averaging.codecs import CODECS
from averaging.network import Buffer, Calls, Frame, PeerId, Stream, answer
from experiments.benchmarks.report import median_s, report
from swarm.allocator import keep_freed_memory
from swarm.process import joined

VALUES = 1 << 20
SIZES = {"64 KiB": 1 << 16, "1 MiB": 1 << 20, "8 MiB": 8 << 20}
CHUNK = 1 << 16
RUNS, WARM_UP = 15, 3
OURS, THEIRS, TUNED = "ours", "hivemind", "hivemind, set up like ours"
TENSOR, BYTES = "tensor", "bare bytes"


def coding_rows() -> list[dict[str, Any]]:
    tensor = torch.randn(VALUES)
    rows: list[dict[str, Any]] = []
    for name, codec in CODECS.items():
        data = bytearray(codec.encode(tensor))
        encode_s = median_s(lambda c=codec: c.encode(tensor), RUNS)
        decode_s = median_s(lambda c=codec, d=data: c.decode(d, (VALUES,)), RUNS)
        rows.append(
            {
                "codec": name,
                "bytes/value": len(data) / VALUES,
                "encode GB/s": 4 * VALUES / encode_s / 1e9,
                "decode GB/s": 4 * VALUES / decode_s / 1e9,
            }
        )
    return rows


# ---- our frames


async def _frame_service(sender: PeerId, frame: Frame) -> tuple[bytes, Buffer]:
    if frame.header == TENSOR.encode():
        CODECS["float32"].decode(frame.payload, (len(frame.payload) // 4,))
    return b"ok", b""


async def _send_frame(calls: Calls, peer: PeerId, what: str, tensor: torch.Tensor, data: bytes) -> None:
    payload = CODECS["float32"].encode(tensor) if what == TENSOR else data
    await calls.call(peer, what.encode(), payload)


# ---- hivemind's RPC


async def _serve_rpc(p2p: Any) -> None:
    async def drop(requests: AsyncIterator[ExpertRequest], context: object) -> AsyncIterator[ExpertResponse]:
        async for _ in requests:
            pass
        yield ExpertResponse()

    async def decode(
        requests: AsyncIterator[ExpertRequest], context: object
    ) -> AsyncIterator[ExpertResponse]:
        async def parts() -> AsyncIterator[list[Tensor]]:
            async for request in requests:
                yield list(request.tensors)

        (tensor,) = await deserialize_tensor_stream(parts())
        assert tensor.numel()
        yield ExpertResponse()

    for name, service in ((TENSOR, decode), (BYTES, drop)):
        await p2p.add_protobuf_handler(name, service, ExpertRequest, stream_input=True, stream_output=True)


async def _send_rpc(p2p: Any, peer: PeerId, what: str, tensor: torch.Tensor, data: bytes) -> None:
    async def chunks() -> AsyncIterator[ExpertRequest]:
        if what == TENSOR:
            for part in split_for_streaming(serialize_torch_tensor(tensor), CHUNK):
                yield ExpertRequest(uid="x", tensors=[part])
        else:
            for start in range(0, len(data), CHUNK):
                yield ExpertRequest(uid="x", tensors=[Tensor(buffer=data[start : start + CHUNK])])

    remote = PeerID.from_base58(peer)
    async for _ in await p2p.iterate_protobuf_handler(remote, what, chunks(), ExpertResponse):
        pass


# ---- the processes: one that serves and one that sends for each way


def _set_up(kind: str) -> None:
    """Settle what a process of this kind has around its transport."""
    if kind == THEIRS:
        os.environ["GOMAXPROCS"] = str(os.cpu_count())  # of its daemon, as without us
    else:
        keep_freed_memory()
        torch.set_num_threads(1)


async def serve(kind: str) -> None:
    async with joined([]) as here:
        if kind == OURS:

            async def frames(stream: Stream) -> None:
                await answer(stream, _frame_service)

            await here.network.serve("bench", frames, max_payload_bytes=1 << 24)
        else:
            await _serve_rpc(here.network._p2p)
        print(here.addresses[0], flush=True)
        await asyncio.Event().wait()


async def send(kind: str, address: str) -> None:
    """For every line `WHAT,BYTES` that is asked for, say how many seconds it took."""
    peer = address.rsplit("/", 1)[1]
    loop = asyncio.get_running_loop()
    async with joined([address]) as here:
        calls = Calls(here.network, "bench", deadline_s=30)
        print("ready", flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            what, size = line.strip().split(",")
            tensor, data = torch.randn(int(size) // 4), os.urandom(int(size))
            began = time.perf_counter()
            if kind == OURS:
                await _send_frame(calls, peer, what, tensor, data)
            else:
                await _send_rpc(here.network._p2p, peer, what, tensor, data)
            print(time.perf_counter() - began, flush=True)
        calls.close()


class Pair:
    """The two processes of one way to send."""

    def __init__(self) -> None:
        self.processes: list[asyncio.subprocess.Process] = []

    async def start(self, kind: str) -> None:
        address = await self._spawn("--serve", kind)
        await self._spawn("--send", kind, "--address", address)

    async def _spawn(self, *options: str) -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "experiments.benchmarks.wire",
            *options,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        self.processes.append(process)
        return await self._line(process)

    @staticmethod
    async def _line(process: asyncio.subprocess.Process) -> str:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode().strip()
        if not line:
            raise SystemExit("a process of the benchmark died; its error is above")
        return line

    async def time_s(self, what: str, size: int) -> float:
        sender = self.processes[-1]
        assert sender.stdin is not None
        sender.stdin.write(f"{what},{size}\n".encode())
        return float(await self._line(sender))

    async def end(self) -> None:
        for process in self.processes:
            process.kill()
            await process.wait()


async def frame_rows() -> list[dict[str, Any]]:
    pairs = {kind: Pair() for kind in (OURS, THEIRS, TUNED)}
    rows = []
    try:
        for kind, pair in pairs.items():
            await pair.start(kind)
        for name, size in SIZES.items():
            for what in (TENSOR, BYTES):
                times: dict[str, list[float]] = {kind: [] for kind in pairs}
                for _ in range(WARM_UP + RUNS):
                    for kind, pair in pairs.items():
                        times[kind].append(await pair.time_s(what, size))
                median = {kind: statistics.median(seen[WARM_UP:]) for kind, seen in times.items()}
                row: dict[str, Any] = {"frame": f"{what}, {name}"}
                for kind, seconds in median.items():
                    row |= {f"{kind}: ms": 1e3 * seconds, f"{kind}: MB/s": size / seconds / 1e6}
                row |= {"ratio": median[THEIRS] / median[OURS], "ratio, tuned": median[TUNED] / median[OURS]}
                rows.append(row)
    finally:
        for pair in pairs.values():
            await pair.end()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    for internal in ("--serve", "--send", "--address"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if kind := options.serve or options.send:
        _set_up(kind)
        return uvloop.run(serve(kind) if options.serve else send(kind, options.address))
    coding, frames = coding_rows(), uvloop.run(frame_rows())
    ratios = {f"{name}_bytes_per_value": CODECS[name].size_bytes(VALUES) / VALUES for name in CODECS}
    tensor, bare = frames[-2], frames[-1]
    ratios["frame_over_hivemind_8mib"] = tensor["ratio"]
    ratios["frame_over_tuned_hivemind_8mib"] = tensor["ratio, tuned"]
    ratios["bare_bytes_over_hivemind_8mib"] = bare["ratio"]
    report("wire", [*coding, *frames], ratios, options.json)


if __name__ == "__main__":
    main()
