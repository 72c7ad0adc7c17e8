"""Replies over a pipe: whole, in order, and never at the cost of whoever sends them."""

from __future__ import annotations

import asyncio
import multiprocessing
import time

import pytest

from loraplex_server.engine.messages import StartFailed
from loraplex_server.engine.reply_pipe import ReplyReceiver, ReplySender


class Received:
    """What came out at the other end."""

    def __init__(self, connection):
        self.replies = []
        self.num_ends = 0
        self.receiver = ReplyReceiver(connection, self.replies.append, self._end)

    def _end(self):
        self.num_ends += 1

    async def until(self, condition):
        async with asyncio.timeout(20.0):
            while not condition():  # noqa: ASYNC110  (it comes by callback)
                await asyncio.sleep(0.001)


@pytest.fixture
def pipe():
    ours, theirs = multiprocessing.Pipe()
    sender = ReplySender(theirs)
    yield ours, theirs, sender
    sender.close()
    ours.close()
    theirs.close()


async def test_replies_of_any_size_come_whole_and_in_order(pipe):
    received, sender = Received(pipe[0]), pipe[2]
    sent = [StartFailed("x" * size) for size in (0, 3, 1 << 20, 5, 300_000)]
    for reply in sent:
        sender.send(reply)
    await asyncio.to_thread(sender.flush)
    await received.until(lambda: len(received.replies) == len(sent))
    assert received.replies == sent
    received.receiver.close()


async def test_sending_does_not_wait_for_somebody_who_does_not_read(pipe):
    sender = pipe[2]
    sent = [StartFailed(f"{number}" * 1000) for number in range(2000)]
    started = time.monotonic()
    for reply in sent:
        sender.send(reply)
    assert time.monotonic() - started < 10.0
    received = Received(pipe[0])

    def push_and_look():
        sender.push()
        return len(received.replies) == len(sent)

    await received.until(push_and_look)
    assert received.replies == sent
    received.receiver.close()


async def test_the_end_is_told_once_and_after_the_last_reply(pipe):
    received, sender = Received(pipe[0]), pipe[2]
    sender.send(StartFailed("last"))
    sender.close()
    pipe[1].close()
    await received.until(lambda: received.num_ends)
    await asyncio.sleep(0.01)
    assert (received.replies, received.num_ends) == ([StartFailed("last")], 1)


async def test_nothing_comes_from_a_closed_receiver(pipe):
    received, sender = Received(pipe[0]), pipe[2]
    received.receiver.close()
    received.receiver.close()
    sender.send(StartFailed("unread"))
    await asyncio.sleep(0.01)
    assert received.replies == []


def test_a_sender_learns_that_nobody_is_there(pipe):
    sender = pipe[2]
    pipe[0].close()
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        sender.send(StartFailed("lost"))
