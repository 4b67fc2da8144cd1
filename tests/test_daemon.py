"""The libp2p daemon's end, as its process sees it: real daemons."""

import asyncio
import gc
import signal

import pytest
import uvloop

from averaging.daemon import start_daemon

pytestmark = pytest.mark.real


def test_a_daemon_that_dies_with_unread_messages_prints_no_traceback(tmp_path):
    """As on a Ctrl-C in a terminal, which reaches the daemon as soon as us: its socket is reset."""
    complaints = []

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        p2p = await start_daemon(identity=tmp_path / "identity")
        tasks = p2p._client.control._read_task, p2p._client.control._write_task
        p2p._child.send_signal(signal.SIGSTOP)
        call = asyncio.ensure_future(p2p._client.control.call_unary_handler(p2p.peer_id, "nobody", b""))
        await asyncio.sleep(0.1)  # long enough to be written; it stays unread
        p2p._child.kill()
        async with asyncio.timeout(20):
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        call.cancel()
        await p2p.shutdown()
        return repr(tasks)  # asking for the exceptions themselves would count as having seen them

    assert "ConnectionResetError" in uvloop.run(main()), "nothing was reset"
    gc.collect()
    assert not complaints
