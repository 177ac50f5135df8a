r"""Verdicts a second on a mixed set, and mathematics against math-verify alone.

    python benchmarks/rewards.py                 # a table
    python benchmarks/rewards.py --json          # the last line is one JSON object

The set: 20,000 completions drawn from a seed, no two (completion, gold) alike, of 200 to 600
characters, with an answer in the styles that prompts ask for (English, some Chinese), right in 6
of 10 cases, missing in 3 of 100; the mix by matcher is printed. Caches of results are off. Import
of libraries and start of processes are outside of what is timed. Rounds take turns; medians. Rules
and mathematics are CPU time (of all processes that are part of it, read from /proc), which on free
cores is wall time; mixed runs and hangs are wall time.

    rules, one process     `verdicts_per_second_rules`: extraction and the rule matchers, in one
                           thread of the caller, as VerifierPool.map does it
    rules, two processes   the same set cut in two, one half a process: what two cores give
    mixed, pool of N       everything, mathematics in N processes beside the caller's
    mathematics            the mathematical pairs in chunks of which each is new to both sides,
                           the sides taking turns: a pool of one, extraction included, against
                           math_verify.parse and .verify (timeouts off) on the answers as they are;
                           8 rollouts share a gold answer, as in a group of RL.      `math_speedup`
                           The same with the cache of results, as it is by default: `.._with_cache`
    one that hangs         what an endless expression adds to a run, limit 1 s
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

# This file has the name of the package: where it lies must not be searched, here or in processes.
HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]

import math_verify  # noqa: E402

from rewards import Task, VerifierPool, extract  # noqa: E402

# of 1,000 completions
MIX = {"choice": 270, "number": 150, "relaxed": 140, "anls": 110, "math": 100, "exact": 80,
       "vqa": 80, "list": 30, "box": 30, "point": 10}  # fmt: skip
ROLLOUTS = 8  # of one mathematical question
_WORDS = """chart bar line value axis shows between year total increase price region label left
    right figure table row column from image percent highest lowest difference compare legend blue
    orange grey first second then subtract add divide multiply area length angle triangle circle
    radius side therefore because given that we can see read off approximately equals number"""
_NAMES = """Paris London Berlin Madrid Ottawa Lima Cairo Nairobi Tokyo Delhi Quito Oslo Vienna Rome
    Invoice Total Smith Johnson Brown Garcia Miller Davis Street Avenue Company Limited Holdings
    January March April June receipt salmon bicycle umbrella giraffe skateboard kitchen"""
WORDS, NAMES = _WORDS.split(), _NAMES.split()
FRAMES = [
    ("final", "{} Final answer: {}"),
    ("final", "{}\n\n**Final Answer:** {}"),
    ("boxed", "{} So the answer is \\boxed{{{}}}."),
    ("boxed", "{}\n\n$$\\boxed{{{}}}$$"),
    ("r1", "<think>{}</think>\n\n\\boxed{{{}}}"),
    ("auto", "{} The answer is {}."),
    ("final", "{}\n答案：{}"),
]


def reasoning(rng: Random) -> str:
    """200 to 600 characters of sentences with numbers in them."""
    length, text = rng.randint(180, 560), ""
    while len(text) < length:
        words = rng.choices(WORDS, k=rng.randint(6, 16))
        words.insert(rng.randrange(len(words)), str(rng.choice([rng.randint(2, 99), 2019, 3.5])))
        text += " ".join(words).capitalize() + ". "
    return text.strip()


def phrase(rng: Random, most: int = 4) -> str:
    return " ".join(rng.sample(NAMES, rng.randint(1, most)))


def make_math(rng: Random) -> tuple[str, list[str], list[str]]:
    """(gold, ways to write it, wrong answers)."""
    a, b, c = rng.randint(2, 97), rng.randint(2, 29), rng.randint(2, 9)
    half, root, line = f"\\frac{{{a}}}{{{b}}}", f"\\sqrt{{{b}}}", f"{c}x + {a}"
    angle = f"\\frac{{{a}\\pi}}{{{c}}}"
    kinds: list[tuple[str, list[str], list[str]]] = [
        (half,
         [f"{a}/{b}", f"\\dfrac{{{2 * a}}}{{{2 * b}}}", half],
         [f"\\frac{{{b}}}{{{a + 1}}}", f"{a + 1}/{b}", str(a)]),
        (f"{c}{root}",
         [f"\\sqrt{{{c * c * b}}}", f"{c} {root}", f"{root} \\cdot {c}"],
         [f"\\sqrt{{{b + 1}}}", f"{c + 1}{root}", str(c * b)]),
        (f"x^2+{a + b}x+{a * b}",
         [f"(x+{a})(x+{b})", f"x^2 + {a * b} + {a + b}x", f"(x+{b})(x+{a})"],
         [f"(x+{a})(x-{b})", f"x^2+{a + b}x+{a * b + 1}", f"x+{a}"]),
        (angle,
         [f"{a}\\pi/{c}", f"\\frac{{{a}}}{{{c}}}\\pi", f"\\pi \\cdot \\frac{{{a}}}{{{c}}}"],
         [f"\\frac{{{a + 1}\\pi}}{{{c}}}", f"{a}\\pi", f"\\frac{{{a}}}{{{c}}}"]),
        (f"\\{{{a}, {a + b}\\}}",
         [f"\\{{{a + b}, {a}\\}}", f"\\left\\{{{a}, {a + b}\\right\\}}"],
         [f"\\{{{a}, {a + b + 1}\\}}", f"\\{{{a}\\}}", f"({a}, {a + b})"]),
        (f"[{-a}, {b})",
         [f"[-{a}, {b})", f"\\left[-{a}, {b}\\right)"],
         [f"({-a}, {b})", f"[{-a}, {b + 1})"]),
        (f"y = {line}",
         [f"y={c}x+{a}", f"y = {a} + {c}x"],
         [f"y = {c}x - {a}", f"y = {c + 1}x + {a}"]),
        (str(a * b),
         [str(a * b), f"{a * b}.0", f"x = {a * b}"],
         [str(a * b + 1), str(a + b), f"{a}/{b}"]),
        (f"{a}^\\circ",
         [f"{a}^{{\\circ}}", f"{a}°", str(a)],
         [f"{a + 10}^\\circ", str(2 * a)]),
    ]  # fmt: skip
    return rng.choice(kinds)


def make_pair(matcher: str, right: bool, rng: Random) -> tuple[str, str, tuple[str, ...] | None]:
    """(answer, gold, options) of a matcher by rules."""
    number, other = rng.randint(1, 99_999), rng.randint(100_000, 199_999)
    if matcher == "choice":
        texts = tuple(rng.sample(NAMES, 4))
        gold = rng.choice("ABCD")
        letter = gold if right else rng.choice([x for x in "ABCD" if x != gold])
        text = texts["ABCD".index(letter)]
        answer = rng.choice([letter, f"({letter})", f"{letter}. {text}", text, f"**{letter}**"])
        return answer, gold, texts if rng.random() < 0.8 or answer == text else None
    if matcher in ("number", "relaxed"):
        unit = rng.choice(["", "", "", " cm", "%", " million"])
        value = number * (1 if right or matcher == "number" else 2) + (not right)
        answer = f"{value:,}{unit}" if rng.random() < 0.4 else f"{value / 10}{unit}"
        gold = str(number) if "," in answer or "." not in answer else str(number / 10)
        return answer, f"{gold}{unit}", None
    if matcher in ("exact", "vqa", "anls"):
        gold = f"{phrase(rng)} {number}" if rng.random() < 0.4 else phrase(rng)
        if not right:
            return f"{phrase(rng)} {other}", gold, None
        return rng.choice([gold, gold.lower(), f"The {gold}", f"{gold}."]), gold, None
    if matcher == "list":
        items = rng.sample(NAMES, 3)
        answer = ", ".join(reversed(items) if right else items[:2])
        return answer, json.dumps(items), None
    x, y = rng.randint(0, 500), rng.randint(0, 500)
    off = 5 if right else 400
    gold = f"<box>[[{x}, {y}, {x + 300}, {y + 200}]]</box>"
    if matcher == "box":
        return f"<box>[[{x + off}, {y}, {x + off + 300}, {y + 200}]]</box>", gold, None
    return f"({x + off + 100}, {y + 100})", gold, None


def make_tasks(count: int, seed: int) -> list[Task]:
    """The mixed set, in an order drawn from the seed; the rollouts of a question stay together."""
    rng = Random(seed)
    groups: list[list[Task]] = []
    for matcher, share in MIX.items():
        wanted = count * share // 1000
        made = 0
        while made < wanted:
            group = []
            gold, ways, wrong = make_math(rng)
            for _ in range(min(ROLLOUTS, wanted - made) if matcher == "math" else 1):
                right, options = rng.random() < 0.6, None
                if matcher == "math":
                    answer = rng.choice(ways if right else wrong)
                else:
                    answer, gold, options = make_pair(matcher, right, rng)
                _, frame = rng.choice(FRAMES)
                text = reasoning(rng)
                if rng.random() < 0.97:
                    text = frame.format(text, answer)
                group.append(Task(text, (gold,), (matcher,), options))
            made += len(group)
            groups.append(group)
    rng.shuffle(groups)
    tasks = [task for group in groups for task in group]
    assert len({(task.completion, task.answers) for task in tasks}) == len(tasks) == count
    return tasks


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def drain(pool: VerifierPool, tasks: Sequence[Task]) -> Counter[str]:
    return Counter(verdict.outcome.value for verdict in pool.map(tasks))


def serve(tasks: list[Task], pipe: Connection) -> None:
    """Half of the rules, whenever the other end says so; the CPU-seconds back."""
    with VerifierPool(cache_size=0) as pool:
        while pipe.recv():
            pipe.send(cpu_seconds(lambda: drain(pool, tasks)))


def time_rules(tasks: list[Task], rounds: int) -> dict[str, float]:
    """Median verdicts a second of the rules in one process and in two."""
    context = multiprocessing.get_context("fork")
    pipes: list[Connection] = []
    for half in (tasks[::2], tasks[1::2]):
        pipe, end = context.Pipe()
        context.Process(target=serve, args=(half, end), daemon=True).start()
        pipes.append(pipe)
    taken: dict[str, list[float]] = {"one": [], "two": []}
    with VerifierPool(cache_size=0) as pool:
        for _ in range(rounds + 1):
            taken["one"].append(cpu_seconds(lambda: drain(pool, tasks)))
            for pipe in pipes:
                pipe.send(True)
            taken["two"].append(max(pipe.recv() for pipe in pipes))
    for pipe in pipes:
        pipe.send(False)
    # the first round warms up
    return {name: len(tasks) / statistics.median(values[1:]) for name, values in taken.items()}


def time_extraction(tasks: list[Task]) -> float:
    """Extractions a second of the rules' completions, the better of three."""
    return len(tasks) / min(
        cpu_seconds(lambda: [extract(task.completion, task.style) for task in tasks])
        for _ in range(3)
    )


def warm(pool: VerifierPool) -> None:
    """Start all processes of a pool."""
    drain(pool, [Task(f"Final answer: x+{n}", (f"{n}+x",), ("math",)) for n in range(200)])


def time_mixed(tasks: list[Task], rounds: int) -> tuple[dict[int, float], Counter[str]]:
    """Median verdicts a second of everything, by the number of processes; and the outcomes."""
    taken: dict[int, list[float]] = {1: [], 2: []}
    outcomes: Counter[str] = Counter()
    for _ in range(rounds):
        for workers, values in taken.items():
            with VerifierPool(workers, cache_size=0) as pool:  # fresh: nothing parsed before
                warm(pool)
                start = time.perf_counter()
                outcomes = drain(pool, tasks)
                values.append(time.perf_counter() - start)
    return {n: len(tasks) / statistics.median(values) for n, values in taken.items()}, outcomes


def theirs(pairs: list[tuple[str, str]]) -> list[bool]:
    """math-verify alone on (prediction, gold), as its documentation calls it."""
    found = []
    for prediction, gold in pairs:
        wanted = math_verify.parse(f"${gold}$", parsing_timeout=None)
        given = math_verify.parse(f"${prediction}$", parsing_timeout=None)
        found.append(math_verify.verify(wanted, given, timeout_seconds=None))
    return found


def cpu_of(pool: VerifierPool | None) -> float:
    """CPU-seconds so far of this process, and of a pool's."""
    ticks = 0
    for pid in pool.process_ids if pool else []:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def time_math(tasks: list[Task], size: int) -> dict[str, Any]:
    """All sides on the mathematical part, a chunk each in turn."""
    answered = [(task, extract(task.completion).text) for task in tasks]
    kept = [(task, (text, task.answers[0])) for task, text in answered if text is not None]
    taken: dict[str, list[float]] = {"ours": [], "cached": [], "theirs": []}
    agreed, differ = 0, Counter[str]()
    with VerifierPool(cache_size=0) as pool, VerifierPool() as cached:
        pools = {"ours": pool, "cached": cached}
        for warmed in pools.values():
            warm(warmed)
        theirs([(f"x+{n}", f"{n}+x") for n in range(50)])
        for turn, start in enumerate(range(0, len(kept), size)):
            chunk = kept[start : start + size]
            found: dict[str, list[bool]] = {}
            for side in (list(taken) * 2)[turn % 3 : turn % 3 + 3]:
                began = cpu_of(pools.get(side))
                if side == "theirs":
                    found[side] = theirs([pair for _, pair in chunk])
                else:
                    verdicts = pools[side].map([task for task, _ in chunk])
                    found[side] = [verdict.outcome == "correct" for verdict in verdicts]
                taken[side].append((cpu_of(pools.get(side)) - began) / len(chunk))
            assert found["ours"] == found["cached"]
            for (_, (answer, gold)), mine, other in zip(
                chunk, found["ours"], found["theirs"], strict=True
            ):
                agreed += mine == other
                if mine != other:
                    differ[
                        f"gold {gold}  answer {answer}  ours {'right' if mine else 'wrong'}"
                    ] += 1
    ratios = {
        side: statistics.median(b / a for a, b in zip(taken[side], taken["theirs"], strict=True))
        for side in pools
    }
    return {
        "math_pairs": len(kept),
        "math_per_second": round(1 / statistics.median(taken["ours"])),
        "math_per_second_with_cache": round(1 / statistics.median(taken["cached"])),
        "math_verify_per_second": round(1 / statistics.median(taken["theirs"])),
        "math_speedup": round(ratios["ours"], 2),
        "math_speedup_with_cache": round(ratios["cached"], 2),
        "math_agreements": agreed,
        "math_disagreements": [f"{line}  ({count} times)" for line, count in differ.items()],
    }


def time_hang(tasks: list[Task]) -> dict[str, float]:
    """Seconds that one endless expression adds, first alone and then in the midst of others."""
    hang = Task("Final answer: 9**9**9**9", ("3",), ("math",))
    with VerifierPool(limit=1) as pool:
        warm(pool)
        alone = seconds(lambda: pool.judge(hang))
        again = seconds(lambda: pool.judge(hang))
    taken: list[list[float]] = [[], []]
    both = (tasks, [*tasks[: len(tasks) // 2], hang, *tasks[len(tasks) // 2 :]])
    with VerifierPool(limit=1, cache_size=0) as pool:
        warm(pool)
        for _ in range(5):
            for many, values in zip(both, taken, strict=True):
                values.append(seconds(lambda many=many: drain(pool, many)))  # type: ignore[misc]
    return {
        "hang_seconds": round(alone, 3),
        "hang_again_seconds": round(again, 5),
        "hang_added_seconds": round(min(taken[1]) - min(taken[0]), 3),
    }


def measure(count: int, rounds: int, seed: int) -> dict[str, Any]:
    """All numbers of the module's docstring."""
    tasks = make_tasks(count, seed)
    rules = [task for task in tasks if task.matchers != ("math",)]
    maths = [task for task in tasks if task.matchers == ("math",)]
    rates = time_rules(rules, rounds)
    mixed, outcomes = time_mixed(tasks, max(1, rounds // 2))
    return {
        "verdicts_per_second_rules": round(rates["one"]),
        "verdicts_per_second_rules_two_processes": round(rates["two"]),
        "extractions_per_second_rules": round(time_extraction(rules)),
        "verdicts_per_second_mixed_pool_1": round(mixed[1]),
        "verdicts_per_second_mixed_pool_2": round(mixed[2]),
        **time_math(maths, max(ROLLOUTS, len(maths) // 20)),
        **time_hang(rules[:500] + maths[:50]),
        "mix": dict(Counter(task.matchers[0] for task in tasks)),
        "outcomes": dict(outcomes),
        "characters": round(statistics.mean(len(task.completion) for task in tasks)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000, help="completions (default: 20000)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # math-verify says that its timeouts are off
    result = measure(args.count, args.rounds, args.seed)
    print(f"{args.count:,} completions of {result['characters']} characters on average")
    for name in ("mix", "outcomes"):
        print(f"{name:42}" + ", ".join(f"{key} {n}" for key, n in result[name].items()))
    for name, value in result.items():
        if not isinstance(value, dict | list):
            print(f"{name:42}{value:,}")
    print(f"{'math_disagreements':42}{result['math_pairs'] - result['math_agreements']}")
    for line in result["math_disagreements"]:
        print(f"    {line}")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
