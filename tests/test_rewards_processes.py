"""Verifier processes: real expressions, deaths, forks, data loaders, scripts, what is left."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_math import fake_math, is_gone, wait_until_gone

from rewards import Task, VerifierPool, verify
from rewards.pool import shared_pool
from rewards.verdict import conclude, plan_comparisons


def math(prediction: str, gold: str = "3") -> Task:
    return Task(f"Final answer: {prediction}", (gold,), ("math",))


def plain(prediction: str, gold: str) -> Task:
    return Task(f"Final answer: {prediction}", (gold,))


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[None]:
    _end_shared()  # other tests of this process may have asked it
    with fake_math(tmp_path):
        yield
    _end_shared()


def _end_shared() -> None:
    for process in shared_pool()._dispatcher.processes:
        process.end()


@pytest.fixture(scope="module")
def real() -> Iterator[VerifierPool]:
    """A pool with the real math-verify."""
    with VerifierPool(limit=2) as pool:
        yield pool


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
    assert first.reason == "ran past its limit of 2 s"
    both = list(real.map([math("9**9**9**9"), math("x+2", "2+x"), math("9**9**9**9")]))
    assert [verdict.outcome for verdict in both] == ["timeout", "correct", "timeout"]
    assert real.counters.timeouts == before + 1
    assert real.counters.starts == 1  # the child was replaced, the process was not


def test_a_number_too_large_for_the_memory_is_no_crash(real):
    verdict = real.judge(math("2^{10^{12}}"))
    assert verdict.outcome in ("wrong", "cannot_judge", "timeout")
    assert real.judge(math("x+5", "5+x")).outcome == "correct"


# Deaths


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
        # Ctrl-C is not theirs, however it reaches them
        for pid in pool.process_ids:
            os.kill(pid, signal.SIGINT)
        time.sleep(0.1)
        assert not any(map(is_gone, pool.process_ids))
        # a death is not remembered: another process may have caused it
        assert (pool.counters.compared, len(pool.cache.new)) == (7, 5)
        pids = pool.process_ids
    wait_until_gone(pids)


def test_a_process_that_does_not_react_is_ended_all_the_same(fake):
    pool = VerifierPool(limit=60)
    assert pool.judge(math("a = 3")).outcome == "correct"
    pids = pool.process_ids
    os.kill(pids[0], signal.SIGSTOP)
    thread = threading.Thread(target=pool.close, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    wait_until_gone(pids)


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


def run(code: str, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *flags, "-c", code] if "\n" in code else [sys.executable, *flags, code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


PLAIN = """
from rewards import VerifierPool, Task, verify
print(verify("\\\\boxed{a = 3}", "3", matcher="math").outcome)
with VerifierPool(2, limit=2) as pool:
    tasks = [Task(f"Final answer: {p}", ("3",), ("math",)) for p in ("b = 3", "hang", "c = 3")]
    print(*(verdict.outcome for verdict in pool.map(tasks)))
"""


def test_a_plain_script_without_a_guard_and_a_command_line(fake, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PLAIN)
    # no ResourceWarning, no zombie's warning, nothing on either's standard error
    flags = ("-X", "dev", "-W", "error::ResourceWarning")
    for code in (PLAIN, str(script)):
        process = run(code, *flags)
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
    out, err = run(code).communicate(timeout=120)
    assert (out, err) == ("correct\n", "")


HANGS = """
import signal
from rewards import VerifierPool, Task
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
pool = VerifierPool(limit={limit})
task = lambda text: Task(f"Final answer: {{text}}", ("3",), ("math",))
pool.judge(task("a = 3"))
print(*pool.process_ids, flush=True)
for verdict in pool.map([task("stop")]):
    print(verdict)
"""


def hanging(limit: float) -> tuple[subprocess.Popen, list[int]]:
    process = run(HANGS.format(limit=limit))
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    time.sleep(0.2)  # it hangs now
    return process, pids


def test_no_orphan_is_left_when_the_owner_is_killed(fake):
    process, pids = hanging(600)
    process.kill()
    wait_until_gone(pids)
    process.communicate()
    # and not even when the process between is killed, too: the kernel ends the child
    process, pids = hanging(1)
    os.kill(pids[0], signal.SIGSTOP)
    process.kill()
    os.kill(pids[0], signal.SIGKILL)
    wait_until_gone(pids)
    process.communicate()


def test_ctrl_c_ends_the_wait_and_leaves_nothing(fake):
    process, pids = hanging(600)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT and out == ""
    assert err.count("Traceback") == 1 and err.rstrip().endswith("KeyboardInterrupt")
    wait_until_gone(pids)


def test_rules_start_no_process_and_load_no_sympy():
    code = """
import sys
from rewards import verify
from rewards.pool import shared_pool
print(verify("Final answer: 7", "7").outcome)
print(verify("\\\\boxed{x+1}", "$x+1$", matcher="math").outcome)
print(shared_pool().counters.starts, {"sympy", "math_verify", "multiprocessing"} & set(sys.modules))
"""
    out, err = run(code).communicate(timeout=60)
    assert (out, err) == ("correct\ncorrect\n0 set()\n", "")


def test_an_owner_that_sigpipe_kills_outlives_its_process(fake):
    code = """
import os, signal, time
from rewards import Task, VerifierPool
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
with VerifierPool(limit=60) as pool:
    task = lambda text: Task(f"Final answer: {text}", ("3",), ("math",))
    print(pool.judge(task("a = 3")).outcome)
    process = pool._dispatcher.processes[0]
    os.kill(process.popen.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.popen.pid, os.WEXITED | os.WNOWAIT)
    time.sleep(0.2)
    process._send("kill")
    print(pool.judge(task("b = 3")).outcome)
"""
    out, err = run(code).communicate(timeout=60)
    assert (out, err) == ("correct\ncorrect\n", "")
