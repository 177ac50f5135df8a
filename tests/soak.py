"""Mutated completions through a pool, in a process of its own, so that its memory can be measured.

python tests/soak.py --count 10000 --hangs 30    # the last line is one JSON object
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random

from rewards import MATCHERS, Task, Verdict, VerifierPool
from rewards.verdict import Outcome

MEGABYTE = 2**20
LIMIT = 1.0
# a text, and the gold answer under each matcher
GOLDS = {
    "exact": ("the red bar", "the red bar"),
    "vqa": ("two dogs", "2 dogs"),
    "choice": ("(B) London", "B"),
    "number": ("1,234.5 cm", "1234.5"),
    "relaxed": ("20.5%", "20"),
    "anls": ("bananas and apples", "banana and apple"),
    "math": ("\\frac{\\sqrt{3}}{2} + x^2", "x^2 + \\sqrt{3}/2"),
    "list": ("red, green, blue", '["blue", "red", "green"]'),
    "box": ("<box>[[10, 20, 300, 400]]</box>", "<box>[[12, 20, 300, 390]]</box>"),
    "point": ("(120, 340)", "[100, 300, 200, 400]"),
}
FRAMES = (
    "Final answer: {}",
    "So it is.\n**Final Answer:** {}",
    "\\boxed{{{}}}",
    "<think>9? No.</think> \\boxed{{{}}}",
    "答案：{}",
    "The answer is {}.",
    "{}",
)
PIECES = [
    "\\frac{", "}{", "}", "{", "\\boxed{", "\\sqrt{", "$", "$$", "\\(", "\\)", "\\left(", "^", "_",
    "\\text{", "**", "Final answer: ", "答案：", "<think>", "</think>", "<box>", "[[", "]]", "\n",
    "\u202e", "\u202c", "\u200f", "\ud800", "\udfff", "\x00", "\u3000", "\uff11", "½", "²", "−",
    "%", "\\%", "or", ",", ".", "(", ")", "&", "\\\\", "\\", "#", "~", "'", '"', "e", "i", "=", "|",
]  # fmt: skip
HUGE = ["(", "\\boxed{", "Final answer: ", "{", "$", "A. ", "\\frac{", "9", "<box>[[", "**",
        "答案：", " ", "\n", "1,", "\\", "-", "\u202e", "[", "answer is ", "\ud800"]  # fmt: skip
SUMS = ("\\sum_{k=1}^{N} k^2", "N! + x", "\\int_0^N x dx")
# each of these keeps sympy busy for minutes, or for ever
HANGS: tuple[Callable[[int], str], ...] = (
    lambda n: f"9**9**9**{n}",
    lambda n: f"9^{{9^{{9^{{{n}}}}}}}",
    lambda n: f"{n + 10**9}!",
    lambda n: f"2^{{{n + 10**11}}}",
    lambda n: f"\\int_0^1 \\sin(x^{{{n}}}) e^{{x^3}} \\log(x+{n}) dx",
    lambda n: f"\\binom{{{n + 10**9}}}{{{10**8}}}",
)


def mutate(text: str, rng: Random) -> str:
    """Cut, insert, double or swap at a few places."""
    for _ in range(rng.randint(1, 6)):
        at, to = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        text = rng.choice(
            [
                text[:at] + rng.choice(PIECES) + text[at:],
                text[:at] + rng.choice(PIECES) + text[at:],
                text[:at] + text[to:] or "?",
                text[:to] + text[at:to] + text[to:],
                text[:at] + text[at:to][::-1] + text[to:],
            ]
        )
    return text


def answers(matcher: str, rng: Random) -> dict[str, Callable[[], str]]:
    """Ways to make an answer."""
    good = GOLDS[matcher][0]
    size = rng.randint(1, 8)
    return {
        "mutated": lambda: mutate(good, rng),
        "bytes": lambda: rng.randbytes(rng.randint(0, 60)).decode("utf-8", "surrogateescape"),
        "pieces": lambda: "".join(rng.choices(PIECES, k=rng.randint(1, 12))),
        "marks": lambda: "".join(c + rng.choice(["", "\u202e", "\u200f", "\ufeff"]) for c in good),
        "fractions": lambda: "\\frac{1}{1+" * size + "x" + "}" * rng.choice([size, size - 1]),
        "boxes": lambda: "\\boxed{" * size + good + "}" * rng.randint(0, size + 1),
        "sums": lambda: rng.choice(SUMS).replace("N", str(size)),
        "towers": lambda: f"{size}^{{2^{{{rng.randint(0, 3)}}}}}",
    }  # fmt: skip


def make_tasks(count: int, hangs: int, seed: int = 0) -> Iterator[tuple[str, Task]]:
    """(how it was made, task); `hangs` of them hang, spread evenly, and one in 100 is huge."""
    rng = Random(seed)
    matchers = [*MATCHERS, "math"]  # twice: it is the one that can hang
    hanging = {round((k + 0.5) * count / hangs): k for k in range(hangs)}
    for index in range(count):
        matcher = matchers[(index + index // 100) % len(matchers)]
        if index in hanging:
            k = hanging[index]
            text = HANGS[k % len(HANGS)](k + 20)
            yield "hang", Task(f"Final answer: {text}", ("3",), ("math",))
            continue
        family, make = rng.choice(list(answers(matcher, rng).items()))
        text = make()
        completion = rng.choice(FRAMES).format(text)
        gold = GOLDS[matcher][1] if rng.random() < 0.9 else mutate(GOLDS[matcher][1], rng)
        if index % 100 == 50:
            family = "huge"
            unit = HUGE[index // 100 % len(HUGE)]
            completion = rng.choice(["", "Final answer: "]) + unit * (MEGABYTE // len(unit))
        yield family, Task(completion, (gold,), (matcher,))


def fault_of(verdict: Verdict, matcher: str) -> str | None:
    """What a verdict says against its own rules, or None."""
    open_ = verdict.outcome in (Outcome.CANNOT_JUDGE, Outcome.TIMEOUT)
    if not isinstance(verdict.outcome, Outcome) or verdict.matcher != matcher:
        return "outcome or matcher"
    if (verdict.score is None) != open_ or (verdict.reason is None) == open_:
        return "score or reason"
    if verdict.score is not None and not 0 <= verdict.score <= 1:
        return "score out of range"
    if (verdict.extracted is None) != (verdict.outcome == Outcome.NO_ANSWER):
        return "extracted"
    return None if isinstance(verdict.format_ok, bool) else "format_ok"


def soak(count: int, hangs: int, workers: int) -> dict[str, object]:
    """Judge them all; what came of it."""
    made = list[tuple[str, Task]]()
    held = 0

    def tasks() -> Iterator[Task]:
        nonlocal held
        for item in make_tasks(count, hangs):
            made.append((item[0], item[1]) if item[0] != "huge" else (item[0], shortened(item[1])))
            held = max(held, len(item[1].completion))
            yield item[1]

    def shortened(task: Task) -> Task:
        return Task(task.completion[:100], task.answers, task.matchers)

    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: Counter[str] = Counter()
    faults, by_accident, in_time = list[str](), list[str](), list[str]()
    began = last = time.monotonic()
    longest = 0.0
    with VerifierPool(workers, limit=LIMIT) as pool:
        for index, verdict in enumerate(pool.map(tasks())):
            now = time.monotonic()
            longest, last = max(longest, now - last), now
            family, task = made[index]
            outcomes[verdict.outcome.value] += 1
            if fault := fault_of(verdict, task.matchers[0]):
                faults.append(f"{index} {family}: {fault}: {verdict}"[:300])
            if (verdict.outcome == Outcome.TIMEOUT) != (family == "hang"):
                which = in_time if family == "hang" else by_accident
                which.append(f"{index} {family}: {task.answers} {verdict}"[:400])
        counters = pool.counters
    seconds = time.monotonic() - began
    return {
        "completions": sum(outcomes.values()),
        "families": dict(Counter(family for family, _ in made)),
        "outcomes": dict(outcomes),
        "faults": faults,
        "hung_by_accident": by_accident,
        "hung_not": in_time,
        "processes_started": counters.starts,
        "comparisons_in_processes": counters.compared,
        "timeouts": counters.timeouts,
        "deaths": counters.deaths,
        "seconds": round(seconds, 1),
        "longest_wait": round(longest, 2),
        "longest_completion": held,
        "grown_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) // 1024,
        "worker_peak_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--hangs", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    print(json.dumps(soak(args.count, args.hangs, args.workers)))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
