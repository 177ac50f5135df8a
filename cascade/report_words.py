"""The report in words: what came out, small pieces of text."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

from cascade.report_data import Rate, ReportData, StageResult, Step

LONGEST_TEXT = 1500  # characters of a completion that are shown


def headline(data: ReportData) -> str:
    """The result in one sentence: from where to where, and whether every step is shown.

    Computed, and as sober as the numbers: a step whose interval holds 0 is called that. Where the
    stages are no line but arms, it is told which is highest, and how far above the next end.
    """
    line = data.line
    if not line:
        return "No stage has been evaluated, so nothing can be said of its accuracy."
    n = f"{line[0].whole.n:,} held-out questions"
    if len(line) == 1:
        return f"{line[0].label} answers {percent(line[0].whole.sampled.value)} of {n} right."
    way = way_to(data, line[-1])
    if [one.name for one in way[-len(line) :]] == [one.name for one in line]:
        first, *rest = line
        course = f"{_told(first)} to " + " to ".join(map(_told, rest))
        return f"On {n}, sampled accuracy went from {course}: {_verdict(data, rest)}."
    if all(data.step_of(one) is None for one in line):
        told = listing([_told(one) for one in line])
        return f"On {n}, sampled accuracy is {told}; none began from another."
    best = max(line, key=lambda one: one.whole.sampled.value)
    way = way_to(data, best)
    highest = percent(best.whole.sampled.value)
    said = f"Highest on {n}: {best.label}, {highest} of the sampled answers right"
    if len(way) > 1:
        course = listing([_told(one) for one in way[:-1]])
        said += f", by way of {course}: {_verdict(data, way[1:])}"
    return f"{said}{_over_the_next(data, best, way)}."


def way_to(data: ReportData, result: StageResult) -> list[StageResult]:
    """The results from whose models one comes, the first first, and the one itself."""
    by_name = {one.name: one for one in data.results}
    way = [result]
    while (step := data.step_of(way[0])) is not None and by_name[step.before.name] not in way:
        way.insert(0, by_name[step.before.name])
    return way


def _told(result: StageResult) -> str:
    return f"{percent(result.whole.sampled.value)} ({result.label})"


def _verdict(data: ReportData, results: Sequence[StageResult]) -> str:
    steps = [step for one in results if (step := data.step_of(one)) is not None]
    if all(step.verdict == "up" for step in steps):
        gains = "each step is a gain" if len(steps) > 1 else "a gain"
        return f"{gains} whose 95% interval leaves out 0"
    return listing([_in_words(step) for step in steps])


def _over_the_next(data: ReportData, best: StageResult, way: Sequence[StageResult]) -> str:
    """How far the highest is above the highest that is not on its way."""
    rest = [one for one in data.line if one not in way]
    if not rest:
        return ""
    second = max(rest, key=lambda one: one.whole.sampled.value)
    for step in (*data.steps, *data.others):
        if {step.before.name, step.after.name} == {best.name, second.name}:
            gain = step.sampled if step.after.name == best.name else turned(step.sampled)
            shown = "" if gain.low > 0 else ", which shows no difference"
            return f"; over {_told(second)} it has {signed(gain)}{shown}"
    return f"; next is {_told(second)}"


def turned(gain: Rate) -> Rate:
    """A difference seen from the other side."""
    return Rate(-gain.value, -gain.high, -gain.low)


def _in_words(step: Step) -> str:
    points = f"({signed(step.sampled)})"
    if step.verdict == "up":
        return f"{step.after.label} improved on {step.before.label} {points}"
    if step.verdict == "down":
        return f"{step.after.label} made it worse than {step.before.label} {points}"
    return f"{step.after.label} shows no difference from {step.before.label} {points}"


def remarks(data: ReportData) -> list[str]:
    """What else must be known at once: the greedy answers, a control, what did not end."""
    said = []
    line = data.line
    if line:
        greedy = " to ".join(f"{percent(one.whole.greedy.value)}" for one in line)
        k = listing(sorted({str(one.whole.k) for one in line}))
        said.append(
            f"Greedy accuracy: {greedy}. Sampled: the mean of {k} answers a question; every "
            "interval is of 95%, over questions."
        )
    control = [_of_control(step) for step in data.others if data.demo_world]
    return [*said, *(sentence for sentence in control if sentence)]


def _of_control(step: Step) -> str:
    """What the demo's control says of MPO."""
    names = {step.before.name, step.after.name}
    if names != {"mpo", "control"}:
        return ""
    gain = step.sampled if step.after.name == "mpo" else turned(step.sampled)
    control = (
        "The control, SFT continued on the chosen completions alone for MPO's steps, says what the "
        "preference and quality terms add"
    )
    if gain.low > 0:
        return f"{control}: {signed(gain)}."
    if gain.high < 0:
        return f"{control}: they did harm here, {signed(gain)}."
    return f"{control}: nothing is shown, {signed(gain)}."


def troubles(data: ReportData) -> list[str]:
    """What keeps the page from being that of a whole run, a sentence each."""
    said = []
    if data.unfinished:
        names = listing([process.name for process in data.unfinished])
        said.append(f"Begun, but not ended well: {names}.")
    if data.waiting:
        said.append(f"Not begun: {listing(list(data.waiting))}.")
    if data.stale:
        names = listing([data.stages[n].label if n in data.stages else n for n in data.stale])
        said.append(f"Not shown, since what they are of has begun anew: the results of {names}.")
    for gate in data.gates:
        if gate.state.startswith("closed"):
            on = "; the run went on all the same" if gate.state != "closed" else ""
            said.append(
                f"The gate behind {gate.stage} closed: {gate.metric} fell from "
                f"{measured(gate.before, gate.metric)} ({gate.against}) to "
                f"{measured(gate.after, gate.metric)}{on}."
            )
    return said


def listing(words: Sequence[str]) -> str:
    """Join words as English does: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else list(words))


def percent(rate: float | None) -> str:
    """A rate in 0..1 as a percentage with one decimal; None (not measured) as a dash."""
    return "-" if rate is None else f"{100 * rate:.1f}%"


def measured(value: float | None, metric: str) -> str:
    """A metric's value: numbers of tokens as they are, all others are rates.

    >>> measured(42.13, "mean_tokens"), measured(0.4213, "sampled")
    ('42.1', '42.1%')
    """
    if "tokens" not in metric:
        return percent(value)
    return "-" if value is None else f"{value:.1f}"


def span(rate: Rate) -> str:
    """An interval in percent, without its value.

    >>> span(Rate(0.5, 0.456, 0.544))
    '45.6 to 54.4'
    """
    return f"{100 * rate.low:.1f} to {100 * rate.high:.1f}"


def signed(rate: Rate) -> str:
    """A difference in points, with its interval.

    >>> signed(Rate(0.477, 0.456, 0.498))
    '+47.7 points, +45.6 to +49.8'
    """
    return f"{100 * rate.value:+.1f} points, {100 * rate.low:+.1f} to {100 * rate.high:+.1f}"


def chance(p: float | None) -> str:
    """A p value; None (not tested) as a dash.

    >>> chance(0.00004), chance(0.0213), chance(0.4)
    ('< 0.001', '0.021', '0.40')
    """
    if p is None:
        return "-"
    if p < 0.001:
        return "< 0.001"
    return f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def duration(seconds: float | None) -> str:
    """Seconds as "9.5 s", "47 s", "6 min 12 s" or "2 h 5 min"; None as a dash."""
    if seconds is None:
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def count(number: int | None) -> str:
    """A number with its thousands apart; None as a dash."""
    return "-" if number is None else f"{number:,}"


def clip(text: str) -> str:
    """A text, cut where it is too long for the page, and then saying so."""
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]} ... ({len(text) - LONGEST_TEXT:,} more characters)"


def mark_words(text: str, other: str) -> list[tuple[str, bool]]:
    """Cut `text` into runs of words: (run, True where `other` has other words there).

    >>> mark_words("The red bar is 2.", "The red bar is 3.")
    [('The red bar is', False), ('2.', True)]
    """
    words, others = clip(text).split(), clip(other).split()
    blocks = SequenceMatcher(None, words, others, autojunk=False).get_opcodes()
    return [
        (" ".join(words[start:end]), kind != "equal")
        for kind, start, end, _, _ in blocks
        if end > start
    ]
