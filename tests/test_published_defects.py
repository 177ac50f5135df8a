"""The defects of the published pipeline, and the tests that prove that each is none of ours.

The first three concern rewards and are shown here; the others are named where they are shown.
"""

import ast
import contextlib
import re
from pathlib import Path

import pytest
import torch

from internvl.logprobs import score_tokens
from internvl.packing import Example, pack
from rewards import MATCHERS, CannotJudge, verify

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

# the defect, and the tests that fail where it comes back
DEFECTS = {
    "1 ANLS is scored as distance / length: 'banana' matches '1998'": [
        "test_published_defects.py::test_anls_is_not_inverted",
        "test_rewards_matches.py::test_anls_is_the_formula",
    ],
    "2 a response is rewritten to the gold answer where it holds it: '5' in '15'": [
        "test_published_defects.py::test_a_gold_inside_the_prediction_is_no_match",
    ],
    "3 strings from data files go through eval": [
        "test_published_defects.py::test_no_string_is_evaluated",
        "test_published_defects.py::test_the_parser_evaluates_its_own_numbers_only",
    ],
    "4 Dropout-NTP cuts at spaces, and nobody compares the continuation with the original": [
        "test_mmpr_cutting.py::test_a_reply_is_cut_between_words",
        "test_mmpr_cutting.py::test_a_prefix_is_whole_text_for_any_reply",
        "test_mmpr_dropout.py::test_pairs_and_what_makes_none",
    ],
    "5 a broken sample is silently replaced by another": [
        "test_records.py::test_quarantine_lines_are_json",
        "test_rows.py::test_max_bad_holds_for_each_file",
        "test_images.py::test_half_pictures_are_never_filled_up",
    ],
    "6 pixels repeat for the two responses, rows are padded, LoRA loads a second model": [
        "test_logprobs.py::test_an_image_and_a_prompt_are_seen_once",
        "test_logprobs.py::test_no_tensor_of_tokens_by_vocabulary",
        "test_logprobs.py::test_no_logits_are_kept_for_backward",
        "test_packing.py::test_several_examples_in_a_row_are_plain",
        "test_mpo_reference.py::test_workers_score_every_pair_once",
        "test_trainer.py::test_lora_starts_from_its_base_and_leaves_it",
    ],
    "7 the generation loss drops tokens of id 0": [
        "test_published_defects.py::test_a_token_of_id_0_is_a_token",
    ],
    "8 bco_pair has no delta; vision DPO refuses a computed reference": [
        "test_mpo_losses.py::test_delta_by_hand",
        "test_mpo_losses.py::test_delta_is_the_mean_of_all_rewards_before",
        "test_losses_trl.py::test_a_set_of_losses_is_trls",
        "test_trainer.py::test_mpo_steps_are_plain",
        "test_mpo_reference.py::test_the_key_of_a_reference",
    ],
}  # fmt: skip


def test_every_defect_has_tests_that_are_there():
    assert [name.partition(" ")[0] for name in DEFECTS] == list("12345678")
    for defect, tests in DEFECTS.items():
        assert tests, defect
        for test in tests:
            file, _, function = test.partition("::")
            tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
            names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert function in names, f"{defect}: {test} is gone; name the test that shows it now"


def test_anls_is_not_inverted():
    assert verify("Final answer: banana", "1998", matcher="anls").score == 0.0
    assert verify("Final answer: 1998", "1998", matcher="anls").score == 1.0


@pytest.mark.parametrize("matcher", MATCHERS)
def test_a_gold_inside_the_prediction_is_no_match(matcher):
    gold, prediction = {
        "choice": ("B", "AB"),
        "list": ("5, 6", "15, 6"),
        "box": ("[1, 2, 5, 5]", "[1, 2, 15, 15]"),
        "point": ("[1, 2, 5, 5]", "[11, 15]"),
    }.get(matcher, ("5", "15"))
    for given in (prediction, f"It must be {gold}. Final answer: {prediction}"):
        if matcher not in ("box", "point") or given == prediction:
            style = "final" if given != prediction else "short"
            verdict = verify(given, gold, matcher=matcher, style=style)
            assert (verdict.outcome, verdict.extracted) == ("wrong", prediction)


def test_no_string_is_evaluated(tmp_path):
    for path in (ROOT / "rewards").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not names & {"eval", "exec", "compile", "__import__"}, path
    trap = tmp_path / "trap"
    attack = f"__import__('pathlib').Path({str(trap)!r}).touch()"
    for name, matcher in MATCHERS.items():
        for prediction, gold in ((attack, "3"), ("3", attack), (attack, f"1+{attack}")):
            verify(f"Final answer: {prediction}", gold, matcher=name)
            with contextlib.suppress(CannotJudge):  # `verify` runs math in another process
                matcher(prediction, gold)
    assert not trap.exists()


def test_the_parser_evaluates_its_own_numbers_only(monkeypatch):
    """math-verify's LaTeX parser makes a number of a token of digits through sympy, and no more."""
    from sympy.parsing import sympy_parser

    texts = ("x+1+x", "9+9-17.5", "sin(3) or 4", "f(x)=__import__", "2**3", r"\text{os.x} + 1")
    for text in texts:  # on the way sympy imports what it needs, with constants of its own
        MATCHERS["math"](text, r"\sqrt{77}")
    evaluated = []
    real = sympy_parser.eval_expr
    monkeypatch.setattr(
        sympy_parser, "eval_expr", lambda code, *more: evaluated.append(code) or real(code, *more)
    )
    for text in texts:  # other texts than those, for parsed ones are kept
        assert MATCHERS["math"](f"{text} + 71.5", r"\sqrt{77}") == 0.0
    numbers = re.compile(r"(Integer|Float) ?\('?[\d.]+'? ?\)")
    assert evaluated and [code for code in evaluated if not numbers.fullmatch(code.strip())] == []


def test_a_token_of_id_0_is_a_token():
    head = torch.nn.Linear(3, 5, bias=False)
    hidden, targets = torch.randn(4, 3), torch.tensor([0, 3, 0, 0])
    expected = head(hidden).log_softmax(1)[torch.arange(4), targets]
    scores = score_tokens(hidden, targets, head, vocab_size=5)
    assert torch.allclose(scores.logprobs, expected, atol=1e-6) and (scores.logprobs < 0).all()
    no_tiles = torch.zeros((0, 3, 2, 2), dtype=torch.uint8)
    assert pack([Example([1, 2], no_tiles, [[0, 3, 0], [0]], [])]).lengths.tolist() == [3, 1]
