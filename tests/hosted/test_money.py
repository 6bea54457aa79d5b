"""Ceilings stop a run before it is submitted, over runs, days and processes."""

import json
import multiprocessing
import os
import stat

import pytest

from flux2_pack.flux2_core.hosted import HostedError, in_cents
from flux2_pack.flux2_core.hosted.money import Ledger
from flux2_pack.flux2_core.hosted.outcomes import cents_of
from flux2_pack.tests.hosted.harness import Clock, ask, client_for, money, run
from flux2_pack.tests.hosted.server import answer


def stopped(client, *words, **more):
    with pytest.raises(HostedError) as caught:
        run(client, more.pop("request", None), **more)
    assert caught.value.code == "ceiling"
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_the_ceiling_per_day_stops_before_submitting(server, tmp_path):
    clock = Clock()
    client = client_for(server, tmp_path, clock=clock, per_day="4.2")
    for seed in range(3):  # exactly the ceiling
        run(client, ask(seed=seed))
    assert (client.spent().today, client.spent().left_today) == (money("4.2"), 0)
    stopped(client, "4.2 ¢ per day", "1.4 ¢ on top of 4.2 ¢", "nothing was submitted")
    assert len(server.of("submit")) == 3
    clock.passed += 86400
    assert client.spent().today == 0
    run(client, ask(seed=9))
    assert server.paid == 4


def test_the_ceiling_per_run_counts_all_requests_of_a_run(server, tmp_path):
    client = client_for(server, tmp_path, per_run="3")
    run(client, ask(seed=1), run_id="one")
    run(client, ask(seed=2), run_id="one")
    stopped(client, "3 ¢ per run", "2.8 ¢ in this run", request=ask(seed=3), run_id="one")
    run(client, ask(seed=3), run_id="two")
    for seed in range(4, 7):  # runs without an id stand alone
        run(client, ask(seed=seed))
    assert server.paid == 6


def test_a_workflow_lowers_a_ceiling_and_cannot_raise_it(server, tmp_path):
    client = client_for(server, tmp_path, per_run="3", per_day="3")
    stopped(client, "1 ¢ per run", per_run=1)
    stopped(client, "1 ¢ per day", per_day=1.0)
    stopped(client, "0 ¢ per run", per_run=0)
    dear = ask(model="flux-2-pro", size=1040)  # 4.5 cents
    stopped(client, "3 ¢ per", request=dear, per_run=10**6, per_day=10**6)
    assert not server.seen


def test_what_was_not_submitted_is_given_back(server, tmp_path):
    client = client_for(server, tmp_path, per_day="1.4")
    for status in (401, 402, 422):
        server.faults["submit"].append(answer(status))
        with pytest.raises(HostedError):
            run(client)
    run(client)
    stopped(client, request=ask(seed=2))


def test_a_resumed_task_is_not_booked_again(server, tmp_path):
    client = client_for(server, tmp_path, per_day="1.4")
    server.faults["result"].extend([answer(503)] * 6)
    with pytest.raises(HostedError):
        run(client)
    assert run(client).resumed and client.spent().today == money("1.4")


def test_a_damaged_ledger_stops_everything(server, tmp_path):
    client = client_for(server, tmp_path)
    run(client)
    ledger = tmp_path / "state" / "spending.json"
    for damage in ("{", "[1]", '{"a": {}}', '{"a": {"day": "x", "run": "y", "cents": "-5"}}'):
        ledger.write_text(damage)
        with pytest.raises(HostedError) as caught:
            run(client, ask(seed=2))
        assert caught.value.code == "state" and str(ledger) in str(caught.value)
    assert server.paid == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
def test_files_are_for_their_owner_alone(server, tmp_path):
    server.faults["result"].extend([answer(503)] * 6)
    before = os.umask(0)
    try:
        with pytest.raises(HostedError):
            run(client_for(server, tmp_path))
    finally:
        os.umask(before)
    state = tmp_path / "state"
    files = [p for p in state.rglob("*") if p.is_file()]
    assert len(files) == 3  # the ledger, its lock, the task
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o600}
    assert {stat.S_IMODE(p.stat().st_mode) for p in (state, state / "tasks")} == {0o700}
    state.chmod(0o770)
    with pytest.raises(HostedError) as caught:
        run(client_for(server, tmp_path), ask(seed=2))
    assert caught.value.code == "state" and "chmod 700" in str(caught.value)


def test_a_journal_entry_holds_no_prompt_and_no_picture(server, tmp_path):
    server.faults["result"].extend([answer(503)] * 6)
    with pytest.raises(HostedError):
        run(client_for(server, tmp_path))
    (entry,) = (tmp_path / "state" / "tasks").glob("*.json")
    text = entry.read_text()
    assert "fox" not in text and set(json.loads(text)) == {
        "endpoint", "state", "started", "booking", "estimate", "task_id", "polling_url", "cost"
    }  # fmt: skip


def test_a_place_that_cannot_be_written_is_told_and_nothing_is_sent(server, tmp_path):
    (tmp_path / "state").write_text("a file in the way")
    with pytest.raises(HostedError) as caught:
        run(client_for(server, tmp_path))
    assert caught.value.code == "state" and "FLUX2KIT_HOSTED_STATE" in str(caught.value)
    assert not server.seen
    for look in (
        client_for(server, tmp_path).spent,
        lambda: client_for(server, tmp_path).waiting(ask()),
    ):
        with pytest.raises(HostedError):
            look()


def test_a_disk_that_fills_after_the_submission_loses_nothing(server, tmp_path, monkeypatch):
    from flux2_pack.flux2_core.hosted import storage

    real = storage.write_bytes

    def full(path, data, mode=0o666):
        if server.paid:
            raise OSError(28, "No space left on device")
        real(path, data, mode)

    monkeypatch.setattr(storage, "write_bytes", full)
    assert run(client_for(server, tmp_path)).width == 64 and server.paid == 1


def reserve_many(folder, times, queue):
    ledger = Ledger(folder, Clock().now)
    queue.put(sum(reserve(ledger) for _ in range(times)))


def reserve(ledger) -> bool:
    try:
        ledger.reserve("x", money("1.4"), "shared", money("1000"), money("14"))
    except HostedError as error:
        assert error.code == "ceiling"
        return False
    return True


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_ceilings_hold_over_processes(tmp_path):
    """4 processes ask 8 times each for 1.4 of 14 cents: exactly 10 get them."""
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    workers = [
        fork.Process(target=reserve_many, args=(tmp_path / "state", 8, queue)) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    took = [queue.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join()
    assert sum(took) == 10
    assert Ledger(tmp_path / "state", Clock().now).spending(money("14")).left_today == 0


@pytest.mark.parametrize(
    ("cents", "text"),
    [("4.5", "4.5 ¢"), ("10", "10 ¢"), ("0", "0 ¢"), ("3.0", "3 ¢"), ("100", "$1.00"), ("125", "$1.25")],
)  # fmt: skip
def test_amounts_as_people_write_them(cents, text):
    assert in_cents(money(cents)) == text


@pytest.mark.parametrize(
    ("reported", "cents"),
    [
        (1.5, "1.5"), ("4.5", "4.5"), (4.8999999999999995, "4.9"), (0, "0"), (100, "100"),
        (1e-300, "0"), ("1e-999999", "0"), (-1, None), (True, None), (None, None), ("nan", None),
        ("1e999999", None), (float("inf"), None), ([], None), ("free", None),
    ],
)  # fmt: skip
def test_reported_costs_are_amounts_or_nothing(reported, cents):
    read = cents_of(reported)
    assert read is None if cents is None else str(read) == cents
