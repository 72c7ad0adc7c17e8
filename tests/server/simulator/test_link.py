from __future__ import annotations

from loraplex_memory.host_tier import HostTier
from loraplex_server.simulator.link import AdapterLink


def make_link(num_host_pages=8):
    return AdapterLink(HostTier(num_host_pages), copy_page_s=1.0, disk_page_s=10.0)


def test_the_first_load_reads_the_disk_and_the_second_does_not():
    link = make_link()
    assert link.load("a", 2, now=5.0).done_s == 5.0 + 2 * 11
    assert link.load("a", 2, now=100.0).done_s == 102.0
    assert (link.num_loads, link.num_host_hits) == (2, 1)


def test_loads_queue_behind_each_other():
    link = make_link()
    first, second = link.load("a", 1, now=0.0), link.load("b", 1, now=1.0)
    assert (first.done_s, second.done_s) == (11.0, 22.0)
    assert second.took_s == 11.0
    assert list(link.under_way) == [first, second]


def test_a_prefetch_spares_the_disk_later():
    link = make_link()
    assert link.prefetch("a", 2, now=0.0)
    assert link.load("a", 2, now=20.0).done_s == 22.0


def test_a_busy_loader_prefetches_nothing():
    link = make_link()
    link.load("a", 1, now=0.0)
    assert not link.prefetch("b", 1, now=5.0)
    assert link.load("b", 1, now=11.0).done_s == 22.0


def test_what_host_memory_cannot_hold_comes_from_the_disk_each_time():
    link = make_link(num_host_pages=1)
    assert link.load("a", 2, now=0.0).done_s == 22.0
    assert link.load("a", 2, now=30.0).done_s == 52.0
    assert link.num_host_hits == 0
