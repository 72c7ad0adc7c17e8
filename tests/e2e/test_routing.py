"""Three replicas behind HAProxy, nginx and Envoy, with the configurations that we ship.

The tests run in order: the last ones end replicas, under load, and start them again.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from loraplex import Client, NotFoundError, Stream, StreamError
from tests.support.churn import Churn
from tests.support.processes import largest_child_of, wait_until_dead
from tests.support.proxies import PROXIES, running_proxy, why_no_proxy
from tests.support.routed_load import HANG_S, REPLICA_HEADER, Outcomes, RoutedLoad
from tests.support.routed_site import Site
from tests.support.tiny_serving import NAME, save_tiny_adapter

#: Those that look at `/ready`, so that a replica may leave under load: half of it through each.
WATCHFUL = [name for name in ("haproxy", "envoy") if why_no_proxy(name) is None]
#: What they call the second replica.
SECOND = {"r2", "loraplex-1"}
ADAPTERS = [f"adapter-{number}" for number in range(9)]
CONCURRENCY = 32

pytestmark = pytest.mark.skipif(
    why_no_proxy("haproxy") is not None, reason=str(why_no_proxy("haproxy"))
)


@pytest.fixture(params=PROXIES)
def proxy(request) -> str:
    if (reason := why_no_proxy(request.param)) is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="module")
def site(fleet, tmp_path_factory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("routing")
    folder.chmod(0o755)
    with ExitStack() as stack:
        proxies = {
            name: stack.enter_context(running_proxy(name, folder / name, fleet.urls, NAME))
            for name in PROXIES
            if why_no_proxy(name) is None
        }
        site = Site(fleet, proxies, ADAPTERS)
        with site.client("haproxy") as client:
            for seed, name in enumerate(ADAPTERS):
                client.adapters.push(save_tiny_adapter(folder / name, seed=seed), name=name)
            yield site
            for name in ADAPTERS:
                client.adapters.delete(name)


@pytest.fixture(autouse=True)
def _all_replicas_run(site) -> None:
    """One that a failed test left ended is not the next test's failure too."""
    site.fleet.mend()


def test_requests_of_an_adapter_go_to_one_replica_and_adapters_to_all(site, proxy):
    homes = site.homes(proxy)
    # nginx hashes addresses, whose ports differ from run to run: nine names may leave one out.
    assert len(set(homes.values())) >= (2 if proxy == "nginx" else 3), homes
    assert site.homes(proxy) == homes


def test_prefetching_goes_where_requests_of_the_adapter_go(site, proxy):
    def prefetched() -> list[float]:
        series = "loraplex_http_requests_total"
        labels = {"route": "/v1/adapters/{name:path}/prefetch"}
        return [metrics.value(series, **labels) or 0 for metrics in site.metrics()]

    home = site.homes(proxy)[ADAPTERS[0]]
    before = prefetched()
    with site.client(proxy) as client:
        for _ in range(3):
            client.adapters.prefetch(ADAPTERS[0])
    more = [b - a for a, b in zip(before, prefetched(), strict=True)]
    assert sum(more) == 3
    assert more[home] >= 2  # as in `homes`


def test_requests_of_the_base_model_go_to_all_replicas(site, proxy):
    before = [site.asked(replica).get(NAME, 0) for replica in range(3)]
    with site.client(proxy) as client:
        # Envoy draws lots where all have as much to do.
        for _ in range(60):
            client.completions.create(model=NAME, prompt="hello", max_tokens=2)
            after = [site.asked(replica).get(NAME, 0) for replica in range(3)]
            if all(b > a for a, b in zip(before, after, strict=True)):
                return
    raise AssertionError((before, after))


def test_what_is_of_one_replica_is_not_asked_of_the_fleet(site, proxy):
    with site.client(proxy) as client:
        for ask in (client.metrics, client.pool):
            with pytest.raises(NotFoundError, match="ask the replicas themselves"):
                ask()
        assert client.ready().status == "ready"


def test_the_first_token_arrives_before_the_last_is_made(site, proxy):
    with site.client(proxy) as client:
        options = {"max_tokens": 1000, "ignore_eos": True, "n": 8}
        with client.completions.create(
            model=ADAPTERS[0], prompt="hello", stream=True, **options
        ) as stream:
            assert next(stream).choices
            assert sum(site.working()) == 1
    site.wait_for_work(0)  # the proxy told the replica that the client has left


def test_a_client_that_leaves_before_its_answer_stops_the_work(site, proxy):
    """A proxy notices by itself only when it writes to somebody who has left."""
    body = {"model": ADAPTERS[0], "prompt": "hello", "max_tokens": 100}
    before = site.num_cancelled()
    with site.frozen_engines(), site.plain(proxy) as plain, pytest.raises(httpx.ReadTimeout):
        plain.post("/v1/completions", json=body, timeout=httpx.Timeout(60, read=1))
    site.wait_for_work(0)
    assert site.num_cancelled() == before + 1


def test_one_adapter_asked_too_much_overflows_to_another_replica(site):
    assert site.spread("haproxy", 16) == [0, 8, 8]  # at most 1.5 times the mean, of 16 / 3


def test_envoy_has_that_bound_too(site):
    if (reason := why_no_proxy("envoy")) is not None:
        pytest.skip(reason)
    none, rest, most = site.spread("envoy", 16)
    # 9 and 7, give or take one: two threads may count at once.
    assert (none, rest + most) == (0, 16)
    assert most <= 10


def test_nginx_knows_no_such_bound(site):
    if (reason := why_no_proxy("nginx")) is not None:
        pytest.skip(reason)
    assert site.spread("nginx", 16) == [0, 0, 16]


Happening = Callable[[RoutedLoad], Awaitable[None]]


@contextmanager
def churning(site: Site, folder: Path) -> Iterator[Churn]:
    """Let adapters come and go; those that stayed are deleted at the end of the block."""
    with site.client("haproxy") as client:
        churn = Churn(client, save_tiny_adapter(folder / "new", seed=99))
        yield churn
        churn.clear()


async def busy(site: Site, churn: Churn, happen: Happening) -> Outcomes:
    """Keep the fleet busy while something happens to it; return what became of the requests."""
    urls = [site.proxies[proxy] for proxy in WATCHFUL]
    load = RoutedLoad(urls, site.fleet.key, ADAPTERS)
    changes = asyncio.create_task(asyncio.to_thread(churn.run))
    try:
        async with load.running(CONCURRENCY):
            await load.wait_for(100)
            await happen(load)
            await load.wait_for(100)
    finally:
        churn.stop()
        await changes
    return load.outcomes


def check_registry(site: Site, churn: Churn, replicas: Sequence[int]) -> None:
    """Replicas have the same adapters, those that were promised, and serve them."""
    lists = []
    for replica in replicas:
        with site.fleet.client(replica) as client:
            names = {adapter.name for adapter in client.adapters.list()}
            for name in names:
                client.completions.create(model=name, prompt="hello", max_tokens=1)
            lists.append(names)
    assert all(names == lists[0] for names in lists)
    assert {*ADAPTERS, *churn.kept} <= lists[0] <= {*ADAPTERS, *churn.kept, *churn.failures}


def stream_of_the_second_replica(client: Client) -> Stream:
    """Return a long answer of it that has begun; the caller's to close."""
    options = {"max_tokens": 1000, "ignore_eos": True, "n": 8, "stream": True}
    for _ in range(60):
        stream = client.completions.create(model=NAME, prompt="hello", **options)
        if stream.response.headers[REPLICA_HEADER] in SECOND:
            next(stream)
            return stream
        stream.close()
    raise AssertionError("no stream came from the second replica")


def kill_while_it_streams(site: Site) -> None:
    """Kill the second replica in the middle of long answers, which end at once and say why."""
    with ExitStack() as stack:
        clients = [stack.enter_context(site.client(proxy)) for proxy in WATCHFUL]
        streams = [stack.enter_context(stream_of_the_second_replica(client)) for client in clients]
        site.fleet.kill(1)
        for stream in streams:
            with pytest.raises(StreamError) as broken:
                list(stream)
            assert broken.value.code == "connection_lost"


def check_only_streams_of_the_second_broke_off(outcomes: Outcomes) -> None:
    """What had been read of a stream cannot be unread; all else was asked again, and answered."""
    others = [f for f in outcomes.failures if not (f.replica in SECOND and f.had_begun)]
    assert others == []
    assert outcomes.contradictions == {}
    assert outcomes.slowest_s < HANG_S


def test_a_killed_replica_takes_nothing_but_its_own_streams_along(site, tmp_path):
    before = {proxy: site.homes(proxy) for proxy in site.proxies}
    engine = site.fleet.replicas[1].engine_pid()

    async def kill(load: RoutedLoad) -> None:
        await asyncio.to_thread(kill_while_it_streams, site)
        await load.wait_for(200)

    with churning(site, tmp_path) as churn:
        outcomes = asyncio.run(busy(site, churn, kill))
        check_only_streams_of_the_second_broke_off(outcomes)
        wait_until_dead(engine)
        check_registry(site, churn, (0, 2))
        for proxy in site.proxies:
            for name, home in site.homes(proxy, (0, 2)).items():
                assert home == before[proxy][name] or before[proxy][name] == 1
        site.fleet.restart(1)
        check_registry(site, churn, (0, 1, 2))
    for proxy in WATCHFUL:
        site.wait_until_all_take_part(proxy)
    assert {proxy: site.homes(proxy) for proxy in site.proxies} == before


def test_a_killed_rank_takes_nothing_but_the_streams_of_its_replica_along(site, tmp_path):
    second = site.fleet.replicas[1]
    assert second.stop() == 0, second.log.read_text()
    site.fleet.restart(1, "--tensor-parallel", "2")
    second = site.fleet.replicas[1]
    for proxy in WATCHFUL:
        site.wait_until_all_take_part(proxy)
    engine = second.engine_pid()

    def kill_a_rank() -> None:
        os.kill(largest_child_of(engine), signal.SIGKILL)
        wait_until_dead(engine)
        site.wait_for_restart(1)

    async def kill(load: RoutedLoad) -> None:
        killing = asyncio.create_task(asyncio.to_thread(kill_a_rank))
        await load.wait_for(CONCURRENCY)
        with load.resting():
            await killing
        await load.wait_for(200)

    with churning(site, tmp_path) as churn:
        outcomes = asyncio.run(busy(site, churn, kill))
        check_only_streams_of_the_second_broke_off(outcomes)
        check_registry(site, churn, (0, 1, 2))
    for proxy in WATCHFUL:
        site.wait_until_all_take_part(proxy)


def test_restarting_all_replicas_one_by_one_loses_no_request(site, tmp_path):
    async def roll(load: RoutedLoad) -> None:
        for replica, process in sorted(site.fleet.replicas.items()):
            assert await asyncio.to_thread(process.stop) == 0, process.log.read_text()
            with load.resting():
                await asyncio.to_thread(site.fleet.restart, replica)
            await load.wait_for(100)

    with churning(site, tmp_path) as churn:
        outcomes = asyncio.run(busy(site, churn, roll))
        assert outcomes.failures == []
        assert churn.failures == {}
        assert outcomes.contradictions == {}
        check_registry(site, churn, (0, 1, 2))
