"""VerifierPool: order, hangs, deaths, memory, threads, forks and ends, mostly with a fake math."""

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_math import fake_math, is_gone, wait_until_gone

from rewards import Task, VerifierPool
from rewards.pool.pool import MAX_AHEAD


def math(prediction: str, gold: str = "3") -> Task:
    return Task(f"Final answer: {prediction}", (gold,), ("math",))


def plain(prediction: str, gold: str) -> Task:
    return Task(f"Final answer: {prediction}", (gold,))


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with fake_math(tmp_path_factory.mktemp("fake")):
        yield


# Hangs and order


def test_a_hang_delays_nothing_else(fake):
    with VerifierPool(2, limit=2) as pool:
        tasks = [math("hang"), *(math(f"{n}", f"x = {n}") for n in range(200)), plain("1", "1")]
        verdicts = pool.map(tasks)
        assert next(verdicts).outcome == "timeout"
        # by now all others had been handed out, and at most the last of them is still under way
        assert pool.counters.compared == 201
        assert sum(process.job is not None for process in pool._dispatcher.processes) <= 1
        assert [verdict.outcome for verdict in verdicts] == ["correct"] * 201
        assert pool.counters.timeouts == 1


def test_rules_need_no_process_and_do_not_wait_for_one(fake):
    with VerifierPool(limit=60) as pool:
        taken = []

        def tasks() -> Iterator[Task]:
            for n in range(3 * MAX_AHEAD):
                taken.append(n)
                yield plain(str(n), str(n)) if n != 100 else math("hang")

        verdicts = pool.map(tasks())
        for _ in range(100):
            assert next(verdicts).outcome == "correct"
        assert pool.counters.starts == 0 and len(taken) == 100  # nothing is taken ahead in vain

        def kill() -> None:  # when the rules have gone as far as they may
            end = time.monotonic() + 60
            while (len(taken), pool.counters.compared) < (100 + MAX_AHEAD, 1):
                assert time.monotonic() < end
                time.sleep(0.01)
            time.sleep(0.2)  # and no further
            os.kill(pool.process_ids[1], signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        assert next(verdicts).outcome == "cannot_judge"
        assert len(taken) == 100 + MAX_AHEAD  # what was judged meanwhile is bounded
        thread.join()


def test_results_are_taken_while_rules_are_judged(fake):
    with VerifierPool(limit=60) as pool:
        process = pool._dispatcher.processes

        def tasks() -> Iterator[Task]:
            yield math("a = 3")
            end = time.monotonic() + 20
            while not process[0].idle and time.monotonic() < end:
                time.sleep(0.01)
                yield plain("1", "1")
            yield plain("7", "8" if time.monotonic() < end else "7")

        *others, last = pool.map(tasks())
        assert {verdict.outcome for verdict in others} == {"correct"} and last.outcome == "wrong"


def test_all_golds_are_tried_fast_ones_first(fake):
    with VerifierPool(limit=2) as pool:
        task = Task("Final answer: red", ("hang", "red"), ("math", "exact"))
        verdict = pool.judge(task)
        assert (verdict.outcome, verdict.matcher) == ("correct", "exact")
        assert pool.counters.starts == 0
        task = Task("Final answer: a = 1", ("hang", "b = 1"), ("math",))
        assert pool.judge(task).outcome == "correct"
        task = Task("Final answer: a = 1", ("hang", "b = 2"), ("math",))
        assert pool.judge(task).outcome == "timeout"


# The cache


def test_results_are_kept_by_matcher_prediction_and_gold(fake):
    with VerifierPool(limit=2) as pool:
        for prediction, gold, hits, compared in [
            ("a = 1", "b = 1", 0, 1),
            ("a = 1", "b = 1", 1, 1),
            ("b = 1", "a = 1", 1, 2),
            ("a = 1", "b = 2", 1, 3),
            ("hang", "3", 1, 4),
            ("hang", "3", 2, 4),
        ]:
            pool.judge(math(prediction, gold))
            assert (pool.cache.hits, pool.counters.compared) == (hits, compared)
        pool.judge(Task("Final answer: a = 1", ("b = 1",), ("exact",)))
        assert pool.cache.hits == 2
        shared = [math("c = 4", "d = 4")] * 5  # the same one under way is run once
        assert {verdict.outcome for verdict in pool.map(shared)} == {"correct"}
        assert pool.counters.compared == 5
        long = math("x" * 1500, "y" * 600)
        assert [pool.judge(long).outcome for _ in range(2)] == ["wrong", "wrong"]
        assert pool.counters.compared == 7


def test_the_cache_is_bounded_and_can_be_off(fake):
    with VerifierPool(cache_size=4) as pool:
        for n in range(10):
            pool.judge(plain(str(n), "5"))
        assert len(pool.cache.new) + len(pool.cache.old) <= 4
        pool.judge(plain("9", "5"))
        assert pool.cache.hits == 1
    with VerifierPool(cache_size=0) as pool:
        verdicts = list(pool.map([math("a = 1", "b = 1")] * 3))
        assert [verdict.outcome for verdict in verdicts] == ["correct"] * 3
        assert (pool.cache.hits, pool.counters.compared) == (0, 3)


# Deaths and memory


@pytest.fixture(scope="module")
def small(fake: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VerifierPool]:
    peak = tmp_path_factory.mktemp("peak") / "peak"
    os.environ["PEAK_FILE"] = str(peak)
    with VerifierPool(limit=20, memory_limit=2**27) as pool:
        yield pool
    del os.environ["PEAK_FILE"]


@pytest.mark.parametrize(
    ("prediction", "reason"),
    [
        ("memory", "the comparison took too much memory (limit 128 MiB)"),
        ("memory swallow", "the comparison took too much memory (limit 128 MiB)"),
        ("raise", "math: KeyError inside the matcher"),
        ("deep", "math: the expression is nested too deep"),
        ("segfault", "the verifier process died (signal 11)"),
        ("leave", "the verifier process died (exit code 3)"),
    ],
)
def test_what_goes_wrong_is_a_reason(small, prediction, reason):
    verdicts = list(small.map([math("b = 3"), math(prediction), math(f"{prediction[0]} = 3")]))
    assert [verdict.outcome for verdict in verdicts] == ["correct", "cannot_judge", "correct"]
    assert verdicts[1].reason == reason and verdicts[1].score is None
    assert small.counters.starts == 1
    if "memory" in prediction:
        peak = int(Path(os.environ["PEAK_FILE"]).read_text()) * 1024
        assert 2**26 < peak < 2**28  # 128 MiB beyond the few that a fresh child has


def test_a_child_that_has_grown_is_replaced(small):
    before, child = small.counters.recycled, small.process_ids[1]
    assert small.judge(math("grow = 3")).outcome == "correct"
    assert small.judge(math("small = 3")).outcome == "correct"
    assert small.counters.recycled == before + 1 and small.process_ids[1] != child
    wait_until_gone([child])


def test_what_a_matcher_prints_is_not_seen(small, capfd):
    assert small.judge(math("noisy = 3")).outcome == "correct"
    assert capfd.readouterr() == ("", "")


def test_a_process_that_cannot_start_is_an_error(fake, monkeypatch):
    monkeypatch.setenv("FAKE_START", "raise")
    with VerifierPool() as pool, pytest.raises(RuntimeError) as failure:
        pool.judge(math("a = 3"))
    assert str(failure.value) == "the verifier process cannot start: ImportError: no antlr here"
    monkeypatch.setenv("FAKE_START", "exit")
    with VerifierPool() as pool:
        with pytest.raises(RuntimeError, match="ended 3 times before it was ready"):
            pool.judge(math("a = 3"))
        assert pool.judge(plain("3", "3")).outcome == "correct"
        monkeypatch.delenv("FAKE_START")
        assert pool.judge(math("a = 3")).outcome == "correct"


# Threads, generators, ends


def test_many_threads_share_one_process(fake):
    with VerifierPool(limit=2) as pool:
        wrong: list[object] = []

        def work(thread: int) -> None:
            for n in range(25):
                want = "correct" if n % 2 else "wrong"
                task = math(f"a = {thread}{n}", f"{thread}{n + (n + 1) % 2}")
                if (verdict := pool.judge(task)).outcome != want:
                    wrong.append((thread, n, verdict))
            if thread == 3 and pool.judge(math("hang")).outcome != "timeout":
                wrong.append("hang")

        threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads) and wrong == []
        assert pool.counters.starts == 1


def test_a_generator_left_half_way_keeps_nothing_from_others(fake):
    with VerifierPool(limit=2) as pool:
        left = pool.map([math("a = 3"), math("hang"), *(math(f"a{n} = 3") for n in range(50))])
        assert next(left).outcome == "correct"
        assert pool.judge(math("b = 3")).outcome == "correct"  # it stands still, but is not lost
        assert next(left).outcome == "timeout"
        left = pool.map([math("d = 3"), math("hang 2"), *(math(f"d{n} = 3") for n in range(50))])
        assert next(left).outcome == "correct"
        compared = pool.counters.compared
        left.close()
        assert pool.judge(math("c = 3")).outcome == "correct"
        assert pool.counters.compared == compared + 1  # what nobody waits for is dropped
        assert list(pool.map([])) == []


def test_a_pool_without_an_owner_leaves_no_process(fake):
    pool = VerifierPool(limit=60)
    verdicts = pool.map([math("a = 3"), math("hang"), math("b = 3")])
    assert next(verdicts).outcome == "correct"
    pids = pool.process_ids
    assert len(pids) == 2 and not any(map(is_gone, pids))
    del verdicts, pool
    gc.collect()
    assert not Path(f"/proc/{pids[0]}").exists()  # not even a zombie
    wait_until_gone(pids)


def test_a_closed_pool_is_a_clear_error(fake):
    with VerifierPool(limit=60) as pool:
        assert pool.judge(math("a = 3")).outcome == "correct"
        pids = pool.process_ids
        failures: list[BaseException] = []

        def wait() -> None:
            try:
                pool.judge(math("hang"))
            except ValueError as error:
                failures.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        while pool.counters.compared < 2:
            time.sleep(0.01)
        rest = pool.map([plain("1", "1"), math("another hang")])
        assert next(rest).outcome == "correct"
    thread.join(10)
    assert [str(failure)[:26] for failure in failures] == ["the VerifierPool is closed"]
    wait_until_gone(pids)
    assert pool.process_ids == []
    for use in (lambda: pool.judge(plain("1", "1")), lambda: pool.map([]), lambda: next(rest)):
        with pytest.raises(ValueError, match="the VerifierPool is closed; make another"):
            use()
    assert pool.counters.starts == 1 and pool.process_ids == []
    pool.close()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"workers": 0}, "workers is 0; at least 1"),
        ({"limit": 0}, "limit is 0 s; it must be over 0"),
        ({"limit": float("nan")}, "limit is nan s"),
        ({"cache_size": -1}, "cache_size is -1; give 0"),
        ({"memory_limit": 1000}, "memory_limit is 1000 bytes; at least 64 MiB"),
    ],
)
def test_arguments_without_sense_are_errors(arguments, match):
    with pytest.raises(ValueError, match=match):
        VerifierPool(**arguments)
