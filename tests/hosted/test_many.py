"""Many runs at once, and processes that die: nothing lost, nothing paid twice."""

import asyncio
import multiprocessing
import os
import threading
import time
from dataclasses import replace

import pytest

from flux2_pack.flux2_core.hosted import HostedError, Timing, Turns
from flux2_pack.flux2_core.hosted.journal import LIFETIME, Journal
from flux2_pack.tests.hosted.harness import Clock, ask, client_for, run
from flux2_pack.tests.hosted.server import paint

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def test_two_hundred_runs_with_24_in_flight(server, tmp_path):
    """The server answers 429 to a 25th active task: it never has to."""
    server.states = ("Pending", "Pending", "Ready")
    client = client_for(server, tmp_path, per_day="100000")

    async def all_of_them():
        return await asyncio.gather(*(client.run(ask(seed=i)) for i in range(200)))

    results = asyncio.run(all_of_them())
    assert server.paid == len(server.of("submit")) == 200 and server.peak == 24
    assert [r.seed for r in results] == list(range(200))
    assert len({r.task_id for r in results}) == 200
    assert all(r.data == paint(dict(r.request.fields)) for r in results)
    assert not list((tmp_path / "state" / "tasks").iterdir())
    assert client.spent().today == 280  # 200 at 1.4 cents


def test_failures_among_many_do_not_block_the_queue(server, tmp_path):
    server.states = ("Pending", "Content Moderated")
    client = client_for(server, tmp_path)

    async def all_of_them():
        runs = (client.run(ask(seed=i)) for i in range(30))
        return await asyncio.gather(*runs, return_exceptions=True)

    assert {e.code for e in asyncio.run(all_of_them())} == {"moderated"}
    server.states = ("Ready",)
    run(client, ask(seed=99))


def test_the_queue_spans_event_loops_and_threads(server, tmp_path):
    """Each of a host's queue runs may have a loop of its own."""
    server.states = ("Pending", "Pending", "Ready")
    client = client_for(server, tmp_path)
    client._turns = Turns(3)
    seeds, done = iter(range(100)), []

    def several():
        async def runs():
            await asyncio.gather(*(client.run(ask(seed=next(seeds))) for _ in range(5)))
            done.append(True)

        asyncio.run(runs())

    threads = [threading.Thread(target=several) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 3 and server.paid == 15 and server.peak <= 3


def test_who_gives_up_waiting_gives_his_turn_back(server, tmp_path):
    turns = Turns(1)

    async def scene():
        entered = []

        async def holder(name):
            async with turns.turn(lambda: None):
                entered.append(name)
                await asyncio.sleep(0.05)

        first = asyncio.ensure_future(holder("first"))
        await asyncio.sleep(0)
        second, third = (asyncio.ensure_future(holder(n)) for n in ("second", "third"))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(first, second, third, return_exceptions=True)
        await asyncio.wait_for(holder("last"), 5)
        return entered

    assert asyncio.run(scene()) == ["first", "third", "last"]


def test_a_turn_that_comes_too_late_goes_to_the_next():
    turns = Turns(1)

    async def use():
        async with turns.turn(lambda: None):
            pass

    async def scene():
        async with turns.turn(lambda: None):
            late = asyncio.ensure_future(use())
            await asyncio.sleep(0)
        late.cancel()  # the place is on its way to it
        await asyncio.gather(late, return_exceptions=True)
        await asyncio.wait_for(use(), 5)

    asyncio.run(scene())


def wait_for(seen, seconds=20):
    until = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < until
        time.sleep(0.01)


def work(server, folder, seed):
    """What a process of its own does."""
    client = client_for(server, folder, timing=Timing(first=0.02, longest=0.05))
    client._sleep, client._clock, client._now = asyncio.sleep, time.monotonic, Clock().now
    result = run(client, ask(seed=seed))
    result.save(folder / f"picture-{os.getpid()}")


def start(server, folder, seed=1):
    process = multiprocessing.get_context("fork").Process(target=work, args=(server, folder, seed))
    process.start()
    return process


@forks
@pytest.mark.parametrize("when", ["polling", "downloading"])
def test_a_process_killed_between_submit_and_result_pays_once(server, tmp_path, when):
    async def hang(_request, _normal):
        await asyncio.sleep(30)

    server.states = ("Pending", "Ready")
    what = "poll" if when == "polling" else "result"
    server.faults[what].append(hang)
    process = start(server, tmp_path)
    wait_for(lambda: server.of(what))
    process.kill()
    process.join()
    assert process.exitcode == -9 and server.paid == 1
    assert client_for(server, tmp_path).waiting(ask())
    other = run(client_for(server, tmp_path), ask(seed=2))  # another seed is another picture
    assert not other.resumed and server.paid == 2
    result = run(client_for(server, tmp_path))
    assert result.resumed and server.paid == 2 and len(server.of("submit")) == 2
    assert result.data == paint(dict(ask().fields))
    assert client_for(server, tmp_path).spent().today * 10 == 28
    again = run(client_for(server, tmp_path))  # wanted once more, on purpose
    assert not again.resumed and server.paid == 3


@forks
def test_a_process_killed_while_it_submits_says_so_once(server, tmp_path):
    """The service may have taken the task; nobody can know without its answer."""

    async def late(_request, normal):
        await normal()
        await asyncio.sleep(30)

    server.faults["submit"].append(late)
    process = start(server, tmp_path)
    wait_for(lambda: server.paid)
    process.kill()
    process.join()
    client = client_for(server, tmp_path)
    with pytest.raises(HostedError) as caught:
        run(client)
    assert caught.value.code == "unsure" and "may have been paid" in str(caught.value)
    assert server.paid == 1 and client.spent().today * 10 == 14
    assert not run(client).resumed and server.paid == 2


@forks
def test_two_processes_with_the_same_inputs_share_one_task(server, tmp_path):
    async def slow(_request, normal):
        await asyncio.sleep(0.3)
        return await normal()

    server.states = ("Pending",) * 40 + ("Ready",)
    server.faults["submit"].append(slow)
    processes = [start(server, tmp_path) for _ in range(3)]
    for process in processes:
        process.join(30)
    assert [p.exitcode for p in processes] == [0, 0, 0]
    assert server.paid == 1
    pictures = {p.read_bytes() for p in tmp_path.glob("picture-*.png")}
    assert len(list(tmp_path.glob("picture-*.png"))) == 3 and len(pictures) == 1


def test_entries_expire_and_damaged_ones_are_told_once(server, tmp_path):
    server.states = ("Pending",) * 9999
    clock = Clock()
    client = client_for(server, tmp_path, clock=clock, timing=Timing(wait=20))
    with pytest.raises(HostedError):
        run(client)
    assert client.waiting(ask())
    clock.passed += LIFETIME
    assert not client.waiting(ask())
    journal = Journal(tmp_path / "state", clock.now)
    with pytest.raises(HostedError):
        run(client)
    key = ask().fingerprint(client._settings.base)
    entry = journal.read(key)
    assert entry.task_id in server.tasks and entry.state == "sent"
    journal.write(key, replace(entry, state="?"))
    with pytest.raises(HostedError) as caught:
        journal.read(key)
    assert caught.value.code == "state" and "may have been paid" in str(caught.value)
    assert journal.read(key) is None
