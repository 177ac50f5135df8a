r"""How a question asks for its answer: the instruction that a prompt style adds to it.

    style    what is asked for                                   read by rewards.extract's style
    none     nothing is added                                    auto
    final    reasoning, then a line "Final answer: .." (答案: ..)   final
    boxed    reasoning, then a line "Answer: \boxed{..}"          boxed
    r1       <think>reasoning</think> (a system prompt asks for it), then \boxed{}   r1
    letter   the letter of an option, at once                    letter
    short    a word or a phrase, at once                         short

The forms are those of the published MMPR pipeline (InternVL's reasoning_data_pipeline, prompt
versions en, en_v2, en_r1 and their Chinese twins); the words around them are ours. As published,
`question` holds the instruction, and what it was before is kept as `question_orig`.

An instruction is not doubled. A question that asks for a form itself keeps its own, and
`prompt_style` names that one. Only where it asks for a bare answer (a word, a letter, yes or no) in
its last sentence or in a line of its own, and the style wants reasoning first, that sentence is
taken out: it says the opposite, and the published pipeline does the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from internvl.data import IMAGE_PLACEHOLDER, Row, RowSequence

PromptStyle = Literal["none", "final", "boxed", "r1", "letter", "short"]
Language = Literal["auto", "en", "zh"]
PROMPT_STYLES: tuple[PromptStyle, ...] = get_args(PromptStyle)
LANGUAGES: tuple[Language, ...] = get_args(Language)

_INSTRUCTIONS: dict[str, dict[str, str]] = {
    "final": {
        "en": "Reason step by step before you answer. When you are ready, end your response with a "
        'line of the form "Final answer: .."',
        "zh": '回答之前请先逐步推理。准备好之后，请用这样一行结束你的回答："答案: .."',
    },
    "boxed": {
        "en": "Reason step by step before you answer. The last line of your response has the form "
        '"Answer: \\boxed{..}", with nothing but your conclusion in the braces. Where you are '
        "unsure, give your best guess instead of going on and on.",
        "zh": "回答之前请先逐步推理。回答的最后一行请写成“答案：\\boxed{..}”，花括号里只写结论。"
        "如果没有把握，请给出最合理的猜测，不要反复推理。",
    },
    "r1": {
        "en": "Answer the question and put the final answer within \\boxed{}.",
        "zh": "请回答这个问题，并把最终答案放在 \\boxed{} 里。",
    },
    # the words that models are trained on everywhere, from LLaVA on
    "letter": {
        "en": "Answer with the option's letter from the given choices directly.",
        "zh": "请直接用选项的字母回答。",
    },
    "short": {
        "en": "Answer the question using a single word or phrase.",
        "zh": "请用一个词或短语回答问题。",
    },
}
_R1_SYSTEM = {
    "en": "Before you answer, think the question through step by step, from every side that "
    "matters, and enclose all of this thinking in <think> and </think>. After it, on a new line, "
    "give a clear and direct answer that can be read without the thinking.",
    "zh": "回答之前，请先逐步、全面地思考问题，并把全部思考过程写在 <think> 和 </think> 之间。"
    "之后另起一行，给出清楚、直接的答案，不看思考过程也能读懂。",
}

# ---- what a question may ask for already

_QUOTE = "[\"'“”‘’「『`*]"
_BOXED = re.compile(r"\\(?:boxed|fbox)\b")
_THINK = re.compile(r"<think>", re.IGNORECASE)
_FINAL = re.compile(
    r"\bfinal answer\b\s{0,3}[*\"”]{0,2}\s{0,3}[:：]"
    rf"|{_QUOTE}\s{{0,3}}(?:最终|最后的?)?答案\s{{0,3}}[:：]"
    r"|(?:格式|形式|写成|以|用)[^。！？\n]{0,15}答案\s{0,3}[:：]",
    re.IGNORECASE,
)
# a form that no style here has: "Answer: ..." in quotes, <answer> tags
_OTHER = re.compile(
    rf"{_QUOTE}\s{{0,3}}(?:the\s+|correct\s+)?answer\s{{0,3}}[:：]|<answer>", re.IGNORECASE
)
_LETTER = re.compile(
    r"(?:please\s+)?(?:(?:directly|only)\s+)?(?:answer|respond|reply)\s(?:with|using|by|only|just|"
    r"directly)"
    r"[^.\n]{0,60}?\bletters?\b[^.\n]{0,60}\.?"
    r"|(?:please\s+)?(?:select|choose|give|provide)\s[^.\n]{0,60}?\b(?:option|choice)(?:['’]s)?"
    r"\s+letters?\b[^.\n]{0,60}\.?"
    r"|(?:请)?(?:直接|只)?(?:用|以|回答|给出|写出|输出|选择)[^。\n]{0,15}"
    r"选项(?:的|对应的)?(?:字母|标号|序号)[^。\n]{0,20}。?",
    re.IGNORECASE,
)
_SHORT = re.compile(
    r"(?:please\s+)?(?:try\s+to\s+)?(?:answer|respond|reply)\b[^.\n]{0,40}?\b(?:a\s+)?"
    r"(?:single|one|few|short)\s+(?:words?|numbers?|phrases?|answers?|sentences?)[^.\n]{0,40}\.?"
    r"|(?:please\s+)?(?:answer|respond|reply)\b[^.\n]{0,25}?\b(?:briefly|concisely|directly)\.?"
    r"|(?:please\s+)?(?:give|provide)\s+(?:a\s+|an?\s+)?(?:short|brief|concise|direct)\b"
    r"[^.\n]{0,20}\b(?:answer|response|reply)\.?"
    r"|(?:please\s+)?answer\s+(?:with\s+|only\s+|just\s+)*[\"'“]?yes[\"'”]?(?:\s+or\s+|/)[\"'“]?no"
    r"[\"'”]?\.?"
    r"|(?:请)?(?:直接|只)?(?:用|以)[^。\n]{0,8}(?:单词|词语|词组|短语|词|数字|一句话)[^。\n]{0,10}"
    r"(?:回答|作答)[^。\n]{0,10}。?"
    r"|(?:请)?(?:用|以)?一句话(?:来)?(?:回答|作答)[^。\n]{0,8}。?"
    r"|(?:请)?(?:直接|简短|简要|简洁)(?:地)?(?:回答|作答)[^。\n]{0,8}。?"
    r"|(?:请)?(?:直接|只)?(?:用|以)?(?:回答)?[“\"]?是[”\"]?(?:或者?|/)[“\"]?(?:否|不是)[”\"]?"
    r"(?:来?(?:回答|作答))?。?",
    re.IGNORECASE,
)
_HAN, _KANA = re.compile(r"[\u3400-\u9fff]"), re.compile(r"[\u3040-\u30ff]")
_WORD = re.compile(r"[A-Za-z]{2,}")


@dataclass(frozen=True)
class Prompted:
    """A question with its instruction; style: what it asks for now ("none": not known)."""

    question: str
    system: str | None
    style: PromptStyle


def question_language(question: str) -> Literal["en", "zh"]:
    """Chinese where a question has at least as many Chinese characters as Latin words.

    >>> [question_language(text) for text in ("<image>\\n图中的 ABC 多大", "What does 出口 mean?")]
    ['zh', 'en']
    """
    text = question.replace(IMAGE_PLACEHOLDER, "")
    han = len(_HAN.findall(text))
    return "zh" if han and han >= len(_WORD.findall(text)) and not _KANA.search(text) else "en"


def asked_style(question: str, system: str | None = None) -> PromptStyle | None:
    r"""The style that a question asks for by itself; None: no form. "none": a form of its own.

    A system prompt that asks for <think> makes r1 of boxed, but alone it asks for no form.

    >>> asked_style("How many? Put your final answer within \\boxed{}.")
    'boxed'
    """
    if _THINK.search(question):
        return "r1"
    if _BOXED.search(question):
        return "r1" if _THINK.search(system or "") else "boxed"
    if _FINAL.search(question):
        return "final"
    if _OTHER.search(question):
        return "none"
    return _bare_instruction(question)[1]


def _bare_instruction(question: str) -> tuple[str, Literal["letter", "short"] | None]:
    """The question without a sentence that asks for a bare answer, and what that asked for.

    Only its last sentence, or a line of its own, is such a sentence.
    """
    kinds: tuple[tuple[Literal["letter", "short"], re.Pattern[str]], ...] = (
        ("letter", _LETTER),
        ("short", _SHORT),
    )
    lines = question.rstrip().split("\n")
    for number in (len(lines) - 1, *range(len(lines) - 1)):
        line = lines[number].removeprefix(IMAGE_PLACEHOLDER).strip()
        for kind, pattern in kinds:
            if not pattern.fullmatch(line):
                continue
            head = IMAGE_PLACEHOLDER if lines[number].startswith(IMAGE_PLACEHOLDER) else ""
            rest = [*lines[:number], *([head] if head else []), *lines[number + 1 :]]
            return "\n".join(rest).strip(), kind
    last = lines[-1]
    for kind, pattern in kinds:
        for start in (found.end() for found in re.finditer(r"[.?!。？！)）]\s*", last)):
            if start < len(last) and pattern.fullmatch(last[start:].strip()):
                return "\n".join([*lines[:-1], last[:start]]).strip(), kind
    return question, None


def add_instruction(
    question: str, style: PromptStyle, language: Language = "auto", system: str | None = None
) -> Prompted:
    r"""A question that asks for its answer in a style; see the module for what is kept.

    system: the row's own system prompt; that of "r1" comes after it, where it does not ask for
    <think> itself. language "auto": the question's own.

    >>> add_instruction("<image>\nHow many?", "short").question
    '<image>\nHow many?\nAnswer the question using a single word or phrase.'
    """
    if style == "none":
        return Prompted(question, system, "none")
    own = asked_style(question, system)
    reasons = style in ("final", "boxed", "r1")
    if own is not None and not (reasons and own in ("letter", "short")):
        return Prompted(question, system, own)
    bare = _bare_instruction(question)[0] if reasons else question
    if not bare.replace(IMAGE_PLACEHOLDER, "").strip():
        return Prompted(question, system, own or "none")  # nothing but the instruction
    words = question_language(bare) if language == "auto" else language
    if style == "r1" and not _THINK.search(system or ""):
        system = f"{system}\n\n{_R1_SYSTEM[words]}" if system else _R1_SYSTEM[words]
    return Prompted(f"{bare.rstrip()}\n{_INSTRUCTIONS[style][words]}", system, style)


def prompt_record(
    record: dict[str, Any], style: PromptStyle, language: Language = "auto"
) -> dict[str, Any]:
    """A question's record with its instruction; `prompt_style` says what it asks for now.

    A question or system prompt that was changed is kept as `question_orig`, `system_orig`. A record
    that has a `prompt_style` was through this before, and stays.
    """
    if style == "none" or "prompt_style" in record:
        return record
    system = record.get("system")
    prompted = add_instruction(record["question"], style, language, system)
    made = {**record, "question": prompted.question, "prompt_style": prompted.style}
    if prompted.question != record["question"]:
        made["question_orig"] = record["question"]
    if prompted.system != system:
        made |= {"system": prompted.system, "system_orig": system}
    return made


def original_question(record: dict[str, Any]) -> dict[str, Any]:
    """The record as it was before `prompt_record`: the question without the added instruction."""
    back = {
        name: value
        for name, value in record.items()
        if name not in ("question_orig", "system_orig", "prompt_style")
    }
    back["question"] = record.get("question_orig", record["question"])
    if "system_orig" in record:
        back["system"] = record["system_orig"]
        if back["system"] is None:
            del back["system"]
    return back


class PromptedRows(RowSequence):
    """Question rows in a prompt style, made as they are read."""

    def __init__(self, rows: RowSequence, style: PromptStyle, language: Language = "auto"):
        self._rows, self._style, self._language = rows, style, language

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Row:
        """The row of a number from 0."""
        row = self._rows.row(index)
        return replace(row, data=prompt_record(row.data, self._style, self._language))
