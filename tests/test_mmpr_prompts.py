"""How a prompt style changes a question, and which questions keep the form that they ask for."""

import pytest

from internvl.data import Quarantine, read_rows, write_jsonl
from internvl.prompts import (
    LANGUAGES,
    PROMPT_STYLES,
    PromptedRows,
    add_instruction,
    asked_style,
    original_question,
    prompt_record,
    question_language,
)
from internvl.sampler import request_of
from rewards import STYLES, extract

ASK = "<image>\nHow many bars are red?"
ZH = "<image>\n图中有几个红色的柱子？"


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("question", [ASK, ZH])
@pytest.mark.parametrize("style", PROMPT_STYLES[1:])
def test_an_instruction_is_added_once_and_known_again(style, question, language):
    once = add_instruction(question, style, language)
    assert once.style == style and once.question.startswith(question + "\n")
    assert asked_style(once.question, once.system) == style
    assert add_instruction(once.question, style, language, once.system) == once
    # nor doubled by another style: reasoning is not asked for twice, in two forms
    for other in ("final", "boxed", "r1"):
        again = add_instruction(once.question, other, language, once.system)
        assert again == once or style in ("letter", "short")
    assert style in STYLES, "verify reads the completion by this style"


def test_the_words_are_in_the_language_of_the_question():
    assert '"Final answer: .."' in add_instruction(ASK, "final").question
    assert '"答案: .."' in add_instruction(ZH, "final").question
    assert '"答案: .."' in add_instruction(ASK, "final", "zh").question
    assert '"Final answer: .."' in add_instruction(ZH, "final", "en").question
    assert "\\boxed{" in add_instruction(ZH, "boxed").question
    assert add_instruction(ASK, "none").question == ASK


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("How many?", "en"),
        ("图中的 ABC 公司去年的 revenue 是多少？", "zh"),
        ("What does the sign 出口 mean here?", "en"),
        ("グラフの赤い棒は何本ですか。", "en"),
        ("<image>", "en"),
        ("3 + 4 = ?", "en"),
        ("<image>\n求 x", "zh"),
    ],
)
def test_question_language(text, language):
    assert question_language(text) == language


def test_r1_asks_in_the_system_prompt_after_the_rows_own():
    made = add_instruction(ASK, "r1")
    assert "<think>" in made.system and "\\boxed{}" in made.question
    both = add_instruction(ASK, "r1", system="You are a careful reader.")
    assert both.system == f"You are a careful reader.\n\n{made.system}"
    thinking = "Think in <think> and </think>."
    own = add_instruction(ASK, "r1", system=thinking)
    assert (own.question, own.system, own.style) == (made.question, thinking, "r1")
    assert add_instruction(ASK, "final", system=thinking).style == "final"
    assert asked_style(ASK, thinking) is None
    assert asked_style(f"{ASK} \\boxed{{}}", thinking) == "r1"
    assert "<think>" in add_instruction(ZH, "r1").system
    followed = "<think>2 and 3</think>\nThere are \\boxed{3}."
    assert extract(followed, made.style).format_ok


@pytest.mark.parametrize(
    ("instruction", "style"),
    [
        ("Answer with the option's letter from the given choices directly.", "letter"),
        ("Answer with the option's letter from the given choices directly", "letter"),
        ("Please answer directly with only the letter of the correct option.", "letter"),
        ("Please select the correct option letter.", "letter"),
        ("请直接用选项的字母回答。", "letter"),
        ("请直接回答选项字母", "letter"),
        ("Answer the question using a single word or phrase.", "short"),
        ("Answer in a single word.", "short"),
        ("Please answer the question with one word.", "short"),
        ("Please answer Yes or No.", "short"),
        ("Answer yes or no", "short"),
        ("Please try to answer the question with short words or phrases if possible.", "short"),
        ("Provide a short and direct response.", "short"),
        ("Answer the question directly.", "short"),
        ("Only respond with the letter A, B, C or D.", "letter"),
        ("请选择正确选项的字母。", "letter"),
        ("请直接回答问题。", "short"),
        ("请用一句话回答", "short"),
        ("请用一个词或短语回答问题。", "short"),
        ("请用单个词或短语回答这个问题。", "short"),
        ("请简短回答。", "short"),
        ("请回答是或否。", "short"),
        ("请用“是”或“否”回答。", "short"),
    ],
)
def test_a_wish_for_a_bare_answer_gives_way_to_reasoning(instruction, style):
    question = f"{ASK}\n(A) 1\n(B) 2"
    asked = f"{question}\n{instruction}"
    assert asked_style(asked) == style
    plain = add_instruction(question, "final", "en")
    assert add_instruction(asked, "final", "en") == plain
    # on the same line, after the question's own mark; and in a line in front
    assert add_instruction(f"{ASK} {instruction}", "final", "en").question.startswith(ASK + "\n")
    assert asked_style(f"{ASK} {instruction}") == style
    front = f"<image>\n{instruction}\nHow many bars are red?"
    assert add_instruction(front, "boxed", "en") == add_instruction(ASK, "boxed", "en")
    # the two bare styles do not contradict it: the question keeps its own
    for bare in ("letter", "short"):
        kept = add_instruction(asked, bare)
        assert (kept.question, kept.style) == (asked, style)


@pytest.mark.parametrize(
    ("instruction", "style"),
    [
        ('When ready to answer, please use the format "Final answer: .."', "final"),
        ("End with **Final Answer:** and the number.", "final"),
        ('当你准备好给出答案时，请使用以下格式："答案: ..."', "final"),
        ("最后一行请写成 答案：X", "final"),
        ("Please put your final answer within \\boxed{}.", "boxed"),
        ("“答案：\\boxed{$FINAL_ANSWER}”（不包含引号）", "boxed"),
        ("Reason in <think></think>, then put the answer within \\boxed{}.", "r1"),
        ("The last line has the form 'Answer: $LETTER' (without quotes).", "none"),
        ("Write it between <answer> and </answer>.", "none"),
    ],
)
def test_a_question_keeps_the_form_that_it_asks_for(instruction, style):
    asked = f"{ASK}\n{instruction}"
    assert asked_style(asked) == style
    for wanted in PROMPT_STYLES[1:]:
        kept = add_instruction(asked, wanted)
        assert (kept.question, kept.system, kept.style) == (asked, None, style)


@pytest.mark.parametrize(
    "question",
    [
        "What is the final answer of the exercise on the board?",
        "Which letter comes after the option B on the sign?",
        "下列哪一个是正确答案？",
        "Did the teacher ask for a single word?",
        'The note says "Answer yes or no." Who wrote it?',
        "Which phrase is written in a single word on the wall?",
        "What does the sign say: yes or no?",
        "他回答的是或不是？为什么",
        "Please answer the question. Why is the sky in the picture so dark?",
        "直接税和间接税各是多少？",
    ],
)
def test_a_question_that_asks_for_no_form(question):
    assert asked_style(question) is None
    assert add_instruction(question, "final").question.startswith(question + "\n")


def test_a_question_that_is_an_instruction_stays():
    alone = "<image>\nAnswer briefly."
    assert add_instruction(alone, "final").question == alone


def test_a_record_keeps_its_question_and_can_go_back():
    for record in (
        {"id": "1", "question": f"{ASK} Answer yes or no.", "answer": "3"},
        {"id": "1", "question": ASK, "answer": "3", "system": "Be kind."},
    ):
        for style in PROMPT_STYLES:
            made = prompt_record(record, style)
            assert original_question(made) == record
            assert prompt_record(made, "boxed") == (
                made if style != "none" else prompt_record(record, "boxed")
            )
    made = prompt_record(record, "final")
    assert (made["question_orig"], made["prompt_style"]) == (ASK, "final")
    assert "system_orig" not in made and made["system"] == "Be kind."
    own = prompt_record({"question": f"{ASK} \\boxed{{}}"}, "final")
    assert own == {"question": f"{ASK} \\boxed{{}}", "prompt_style": "boxed"}


def test_rows_get_their_instruction_as_they_are_read(tmp_path):
    write_jsonl(tmp_path / "q.jsonl", [{"id": i, "question": ASK[8:], "answer": "3"} for i in "ab"])
    rows = read_rows(tmp_path / "q.jsonl", kind="question", quarantine=Quarantine(None))
    prompted = PromptedRows(rows, "r1")
    assert len(prompted) == 2 and prompted[1:][0].data["id"] == "b"
    request = request_of(prompted[0], seed=0)
    assert request.question.endswith("\\boxed{}.") and "<think>" in request.system
    assert prompted[0].line == 1 and "prompt_style" not in rows[0].data
