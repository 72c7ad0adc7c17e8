from __future__ import annotations

import pytest

from loraplex_server.simulator.object_store import ObjectStore, StoreSpeed

SPEED = StoreSpeed(first_byte_s=0.5, stream_bytes_per_s=10.0, network_bytes_per_s=40.0)


def test_a_fetch_takes_the_first_byte_and_one_streams_time():
    store = ObjectStore(SPEED)
    assert store.fetch("a", 20.0, now=100.0) == 100.0 + 0.5 + 2.0


def test_streams_share_the_network_once_it_is_full():
    store = ObjectStore(SPEED)
    done = [store.fetch(name, 20.0, now=0.0) for name in "abcdefgh"]
    assert done[:4] == [2.5] * 4  # half a second each of the network, two of their own stream
    assert done[4:] == [3.0, 3.5, 4.0, 4.5]


def test_a_file_on_its_way_is_not_fetched_again():
    store = ObjectStore(SPEED)
    assert store.fetch("a", 20.0, now=0.0) == store.fetch("a", 20.0, now=1.0) == 2.5
    assert store.fetch("a", 20.0, now=3.0) == 3.0
    assert (store.num_fetches, store.fetched_bytes) == (1, 20.0)


def test_a_file_is_not_kept_for_long():
    store = ObjectStore(SPEED)
    store.fetch("a", 20.0, now=0.0)
    assert store.fetch("a", 20.0, now=60.0) == pytest.approx(62.5)
    assert store.num_fetches == 2
