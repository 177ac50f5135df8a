"""VerifierPool: order, hangs, deaths, memory, threads, forks and ends, mostly with a fake math."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_math import ROOT, write_fake_math

from rewards import Task, VerifierPool, verify
from rewards.pool import MAX_AHEAD, shared_pool
from rewards.verdict import conclude, plan_comparisons


def math(prediction: str, gold: str = "3") -> Task:
    return Task(f"Final answer: {prediction}", (gold,), ("math",))


def plain(prediction: str, gold: str) -> Task:
    return Task(f"Final answer: {prediction}", (gold,))


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = write_fake_math(tmp_path_factory.mktemp("fake"))
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def real() -> Iterator[VerifierPool]:
    """A pool with the real math-verify."""
    with VerifierPool(limit=1) as pool:
        yield pool


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"  # ended; whoever inherited it has not waited for it yet


def wait_until_gone(pids: list[int], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not all(map(is_gone, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    assert [pid for pid in pids if not is_gone(pid)] == []


# With the real math-verify


def test_verdicts_are_those_of_this_process_and_in_order(real):
    fractions = [math(f"\\frac{{{n}}}{{7}}", f"{n + n % 2}/7") for n in range(12)]
    others = [
        plain("7", "7"), plain("red", "blue"), math("(x+1)^2", "x^2+2x+1"), math("", "3"),
        math("\\frac{", "3"), math("3", "\\frac{"), math("9**2", "81"), math("9**2", "9"),
        Task("It is 9.", ("9",)), Task("Final answer: x+1", ("1", "1+x", "x"), ("exact", "math")),
        plain("B", "B"), math("\\{1,2\\}", "\\{2,1\\}"), math("x" * 2001, "3"),
    ]  # fmt: skip
    tasks = [task for pair in zip(fractions, others, strict=False) for task in pair]
    plans = [plan_comparisons(task) for task in tasks]
    here = [conclude(plan, [c.run() for c in plan.comparisons]) for plan in plans]
    assert list(real.map(tasks)) == here
    assert [real.judge(task) for task in tasks] == here


def test_a_hanging_expression_costs_its_limit_once(real):
    before = real.counters.timeouts
    start = time.monotonic()
    first = real.judge(math("9**9**9**9"))
    assert time.monotonic() - start > 0.9
    assert (first.outcome, first.score) == ("timeout", None)
    assert first.reason == "ran past its limit of 1 s"
    both = list(real.map([math("9**9**9**9"), math("x+2", "2+x"), math("9**9**9**9")]))
    assert [verdict.outcome for verdict in both] == ["timeout", "correct", "timeout"]
    assert real.counters.timeouts == before + 1
    assert real.counters.starts == 1  # the child was replaced, the process was not


def test_a_number_too_large_for_the_memory_is_no_crash(real):
    verdict = real.judge(math("2^{10^{12}}"))
    assert verdict.outcome in ("wrong", "cannot_judge", "timeout")
    assert real.judge(math("x+5", "5+x")).outcome == "correct"


# Hangs and order


def test_a_hang_delays_nothing_else(fake):
    with VerifierPool(2, limit=1) as pool:
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
        thread = threading.Timer(1, lambda: os.kill(pool.process_ids[1], signal.SIGKILL))
        thread.start()
        assert next(verdicts).outcome == "cannot_judge"
        assert len(taken) == 100 + MAX_AHEAD  # what was judged meanwhile is bounded
        thread.join()


def test_all_golds_are_tried_fast_ones_first(fake):
    with VerifierPool(limit=0.3) as pool:
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
    with VerifierPool(limit=0.2) as pool:
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
def small(fake: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VerifierPool]:
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


def test_killed_processes_are_replaced(fake):
    with VerifierPool(limit=60) as pool:
        assert pool.judge(math("a = 3")).outcome == "correct"
        for number, who in enumerate([1, 0]):  # the judging child, then the outer process
            pids = pool.process_ids
            timer = threading.Timer(0.2, os.kill, (pids[who], signal.SIGKILL))
            timer.start()
            verdict = pool.judge(math(f"hang {number}"))
            assert verdict.reason == "the verifier process died (signal 9)"
            assert verdict.outcome == "cannot_judge"
            assert pool.judge(math(f"b{number} = 3")).outcome == "correct"
            # while idle nothing is lost
            pids = pool.process_ids
            os.kill(pids[who], signal.SIGKILL)
            wait_until_gone([pids[who]])
            time.sleep(0.1)
            assert pool.judge(math(f"c{number} = 3")).outcome == "correct"
            timer.join()
        # a death is not remembered: another process may have caused it
        assert (pool.counters.compared, len(pool.cache.new)) == (7, 5)
        pids = pool.process_ids
    wait_until_gone(pids)


def test_a_process_that_cannot_start_is_an_error(tmp_path, monkeypatch):
    write_fake_math(tmp_path / "a", "raise ImportError('no antlr here')")
    monkeypatch.syspath_prepend(tmp_path / "a")
    match = "cannot start: ImportError: no antlr here"
    with VerifierPool() as pool, pytest.raises(RuntimeError, match=match):
        pool.judge(math("a = 3"))
    write_fake_math(tmp_path / "b", "import os; os._exit(7)")
    monkeypatch.syspath_prepend(tmp_path / "b")
    match = "ended 3 times before it was ready"
    with VerifierPool() as pool:
        with pytest.raises(RuntimeError, match=match):
            pool.judge(math("a = 3"))
        assert pool.judge(plain("3", "3")).outcome == "correct"


# Threads, generators, ends


def test_many_threads_share_one_process(fake):
    with VerifierPool(limit=0.5) as pool:
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
    with VerifierPool(limit=0.5) as pool:
        left = pool.map([math("a = 3"), math("hang"), *(math(f"a{n} = 3") for n in range(50))])
        assert next(left).outcome == "correct"
        assert pool.judge(math("b = 3")).outcome == "correct"  # it stands still, but is not lost
        assert next(left).outcome == "timeout"
        left.close()
        compared = pool.counters.compared
        assert pool.judge(math("c = 3")).outcome == "correct"
        assert pool.counters.compared - compared <= 3  # what nobody waits for is dropped
        assert list(pool.map([])) == []


def test_a_pool_without_an_owner_leaves_no_process(fake):
    pool = VerifierPool(limit=60)
    verdicts = pool.map([math("a = 3"), math("hang"), math("b = 3")])
    assert next(verdicts).outcome == "correct"
    pids = pool.process_ids
    assert len(pids) == 2 and not any(map(is_gone, pids))
    del verdicts, pool
    gc.collect()
    assert all(map(is_gone, pids))


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
        rest = pool.map([plain("1", "1"), math("hang")])
        assert next(rest).outcome == "correct"
    thread.join(10)
    assert [str(failure)[:26] for failure in failures] == ["the VerifierPool is closed"]
    assert all(map(is_gone, pids)) and pool.process_ids == []
    for use in (lambda: pool.judge(plain("1", "1")), lambda: pool.map([]), lambda: next(rest)):
        with pytest.raises(ValueError, match="the VerifierPool is closed; make another"):
            use()
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


# Forks and other processes


def in_a_fork(work) -> str:
    """What `work` returns in a forked copy of this process."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, str(work()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said


def test_a_forked_copy_starts_its_own_process(fake):
    with VerifierPool(limit=60) as pool:
        verdicts = pool.map([math("a = 3"), math("b = 3"), math("c = 4")])
        assert next(verdicts).outcome == "correct"
        pids = pool.process_ids

        def work() -> list[object]:
            outcomes = [verdict.outcome.value for verdict in verdicts]
            outcomes.append(pool.judge(math("d = 3")).outcome.value)
            theirs = pool.process_ids
            pool.close()
            return [*outcomes, len(theirs), len(set(theirs) & set(pids))]

        assert in_a_fork(work) == "['correct', 'wrong', 'correct', 2, 0]"
        assert not any(map(is_gone, pids)) and pool.process_ids == pids
        assert [verdict.outcome for verdict in verdicts] == ["correct", "wrong"]
        assert pool.counters.starts == 1


def judge_two(index: int) -> list[str]:
    hang = verify(f"\\boxed{{a = {index}}}", f"b = {index}", matcher="math")
    return [hang.outcome.value, verify("Final answer: 7", "8").outcome.value]


class Verdicts:
    """A data set whose items are verdicts."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> list[str]:
        return judge_two(index)


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_in_the_workers_of_a_data_loader(fake, start):
    from torch.utils.data import DataLoader

    assert judge_two(9) == ["correct", "wrong"]  # the parent has a process that is not theirs
    loader = DataLoader(
        Verdicts(), num_workers=2, batch_size=None, multiprocessing_context=start, timeout=120
    )
    assert list(loader) == [["correct", "wrong"]] * 4
    shared_pool()._dispatcher.processes[0].end()  # the real one is for the other tests


def run(code: str, fake: Path, *flags: str) -> subprocess.Popen:
    path = os.pathsep.join([str(fake), str(ROOT)])
    return subprocess.Popen(
        [sys.executable, *flags, "-c", code] if "\n" in code else [sys.executable, *flags, code],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


PLAIN = """
from rewards import VerifierPool, Task, verify
print(verify("\\\\boxed{a = 3}", "3", matcher="math").outcome)
with VerifierPool(2, limit=0.3) as pool:
    tasks = [Task(f"Final answer: {p}", ("3",), ("math",)) for p in ("b = 3", "hang", "c = 3")]
    print(*(verdict.outcome for verdict in pool.map(tasks)))
"""


def test_a_plain_script_without_a_guard_and_a_command_line(fake, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PLAIN)
    # no ResourceWarning, no zombie's warning, nothing on either's standard error
    flags = ("-X", "dev", "-W", "error::ResourceWarning")
    for code in (PLAIN, str(script)):
        process = run(code, fake, *flags)
        out, err = process.communicate(timeout=120)
        assert (out, err) == ("correct\ncorrect timeout correct\n", "")


def test_in_a_daemonic_process(fake):
    code = """
import multiprocessing
from rewards import verify

def work(queue):
    queue.put(verify("\\\\boxed{a = 3}", "3", matcher="math").outcome.value)

context = multiprocessing.get_context("fork")
queue = context.Queue()
context.Process(target=work, args=(queue,), daemon=True).start()
print(queue.get(timeout=60))
"""
    out, err = run(code, fake).communicate(timeout=120)
    assert (out, err) == ("correct\n", "")


HANGS = """
from rewards import VerifierPool, Task
import threading
pool = VerifierPool(limit={limit})
task = lambda text: Task(f"Final answer: {{text}}", ("3",), ("math",))
pool.judge(task("a = 3"))
print(*pool.process_ids, flush=True)
for verdict in pool.map([task("stop")]):
    print(verdict)
"""


def hanging(fake: Path, limit: float) -> tuple[subprocess.Popen, list[int]]:
    process = run(HANGS.format(limit=limit), fake)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    time.sleep(0.2)  # it hangs now
    return process, pids


def test_no_orphan_is_left_when_the_owner_is_killed(fake):
    process, pids = hanging(fake, 600)
    process.kill()
    wait_until_gone(pids)
    process.communicate()
    # and not even when the process between is killed, too: the kernel ends the child
    process, pids = hanging(fake, 1)
    os.kill(pids[0], signal.SIGSTOP)
    process.kill()
    os.kill(pids[0], signal.SIGKILL)
    wait_until_gone(pids)
    process.communicate()


def test_ctrl_c_ends_the_wait_and_leaves_nothing(fake):
    process, pids = hanging(fake, 600)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT and out == ""
    assert err.count("Traceback") == 1 and err.rstrip().endswith("KeyboardInterrupt")
    wait_until_gone(pids)


def test_rules_start_no_process_and_load_no_sympy(fake):
    code = """
import sys
from rewards import verify
from rewards.pool import shared_pool
print(verify("Final answer: 7", "7").outcome)
print(verify("\\\\boxed{x+1}", "$x+1$", matcher="math").outcome)
print(shared_pool().counters.starts, {"sympy", "math_verify", "multiprocessing"} & set(sys.modules))
"""
    out, err = run(code, fake).communicate(timeout=60)
    assert (out, err) == ("correct\ncorrect\n0 set()\n", "")
