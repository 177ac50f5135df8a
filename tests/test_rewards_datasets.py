"""The table that chooses matchers by data set: what it says of real names, and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rewards import VerifierPool, task_of
from rewards.audit.rollouts import Request, Rollout, parse_line
from rewards.datasets import load_table
from rewards.judging import Verifier

MATHS = ("choice", "number", "math", "exact")

# data set -> its matchers; the names with dates are those of MMPR-v1.2's meta.json
NAMES = {
    "chartqa_trainval_30k_w_csv_en_20240402_extracted_pairs_vqa_correctness_rules": ("relaxed",),
    "mmpr-1.2-chartqa_trainval_30k_w_csv_en_20240402_extracted_prefix_pair_sr0.5_wo_image": (
        "relaxed",
    ),
    "ChartQA": ("relaxed",),
    "chartqa_test_human": ("relaxed",),
    "PlotQA-v2": ("relaxed",),
    "ChartGemma": ("relaxed",),
    "dvqa_en_20240402_extracted_int_only_pairs_vqa_correctness_rules": ("number", "vqa"),
    "figureqa_en_20240402_extracted_pairs_vqa_format_rules": ("vqa", "choice"),
    "mapqa_suv_en_20240402_extracted": ("vqa", "list", "number"),
    "docvqa_train_56k_en_20240402_extracted_pairs_vqa_correctness_rules": ("anls",),
    "docvqa_val": ("anls",),
    "MP-DocVQA": ("anls",),
    "infographics_20240403_qa_20240407_v2_extracted": ("anls",),
    "infographicsvqa_val": ("anls",),
    "InfoVQA": ("anls",),
    "stvqa": ("anls",),
    "ST-VQA": ("anls",),
    "ocr/st_vqa_train": ("anls",),
    "SROIE_information_extraction_multi_turn_20240620_extracted": ("list", "vqa", "number"),
    "CORD": ("list", "vqa", "number"),
    "FUNSD": ("list", "vqa", "number"),
    "kie_receipts": ("list", "vqa", "number"),
    "OCRBench_v2": ("vqa", "number"),
    "textvqa_train_21k_wo_ocr_en_20240611_extracted_prefix_pair_sr0.0_with_image": ("vqa",),
    "textvqa_val_ocr": ("vqa",),
    "ocrvqa_test": ("vqa",),
    "A-OKVQA": ("choice", "vqa"),
    "aokvqa_train": ("choice", "vqa"),
    "scienceqa_multi_choice_en_20240402_extracted_pairs_vqa_direct_rules": ("choice", "exact"),
    "ai2d_train_12k_en_20240410_extracted": ("choice", "exact"),
    "ai2diagram_test": ("choice", "exact"),
    "MMStar": ("choice", "exact"),
    "SEED-Bench": ("choice", "exact"),
    "mmbench_dev_20230712": ("choice", "exact"),
    "koniq10k_en_20240403_pairs_vqa_correctness_rules": ("choice", "exact"),
    "nlvr2_en_20240910_ov_pairs_vqa_correctness_rules": ("choice", "exact"),
    "vsr_en_20240402_cot_ques": ("choice", "exact"),
    "MMMU_val": MATHS,
    "m3cot_train_extracted_pairs_vqa_correctness_rules": MATHS,
    "study_com_en_20240619": MATHS,
    "EMMA": MATHS,
    "CLEVR_math_en_20240402_extracted_pairs_vqa_correctness_rules": ("number", "exact"),
    "super_clevr_en_20240402_int": ("number", "exact"),
    "super_clevr_en_20240402_yorn_pairs_vqa_correctness_rules": ("number", "exact"),
    "tallyqa_vg_en_20240816_cot": ("number", "exact"),
    "FSC147": ("number", "exact"),
    "cocorem_exist_yorn_en_20241016": ("number", "exact"),
    "iconqa_train_extracted": MATHS,
    "tabmwp_en_20240402_cot": MATHS,
    "geoqa+_en_20240402_extracted_open_ended_only": MATHS,
    "geoqa+_extracted_en_version": MATHS,
    "geometry3k_en_20240402_extracted": MATHS,
    "unigeo_calc_en_20240402_extracted_open_ended_only": MATHS,
    "geos_en_20240402_extracted_pairs_vqa_correctness_rules": MATHS,
    "mmpr-1.2-geos_en_20240402_extracted_pairs_vqa_format_rules": MATHS,
    "geomverse_extracted": MATHS,
    "geo170k_extracted_full": MATHS,
    "mavis_function_poly_pairs_vqa_correctness_rules": MATHS,
    "mavis_geo_depth0_text_dominant_vision_dominant_en": MATHS,
    "MathV360K_prompts_pairs_vqa_correctness_rules": MATHS,
    "MathVista_testmini": MATHS,
    "MathVerse": MATHS,
    "MATH-Vision": MATHS,
    "We-Math": MATHS,
    "MMK12": MATHS,
    "refcoco+_testA": ("box",),
    "refcocog_val": ("box",),
    "ScreenSpot-v2": ("point",),
    "AITW": ("point", "exact"),
    "okvqa_train_9k_en_20240402_extracted": ("vqa",),
    "vqav2_en_20240402_int_pairs_vqa_correctness_rules": ("vqa",),
    "VizWiz_val": ("vqa",),
    "gqa_train_en_20240402_extracted": ("vqa",),
    "gqa_testdev_llava": ("vqa",),
    "Visual7W": ("choice", "vqa"),
    "POPE": ("vqa",),
}  # fmt: skip
# nothing is known of their answers, or their short names merely look like another's
UNKNOWN = ["wildvision", "RLAIF-V", "my-own-data", "dilemma", "gemma_sft", "medvqa", "", "x" * 9999]


def test_names() -> None:
    """Real names, written as their owners write them; every entry is reached by one of them."""
    table = load_table()
    found = {name: table.find(name) for name in NAMES}
    told = {name: entry.matchers if entry else None for name, entry in found.items()}
    assert told == NAMES
    assert {entry.number for entry in found.values() if entry} == {
        *range(1, len(table.entries) + 1)
    }
    assert [name for name in UNKNOWN if table.find(name)] == []


def test_every_pattern_counts() -> None:
    """No pattern is shadowed by an earlier entry for the plainest name that it fits."""
    table = load_table()
    for entry in table.entries:
        for pattern in entry.patterns:
            name = pattern.replace("[!a-z]", "_").replace("[_-]", "_")
            name = name.replace("*", "").replace("?", "-")
            assert table.find(name) is entry, pattern


# data set, gold, prediction, outcome, the matcher that decided
ROWS = [
    ("chartqa", "100", "104", "correct", "relaxed"),
    ("docvqa", "University of California", "University of Californa", "correct", "anls"),
    ("docvqa", "banana", "1998", "wrong", "anls"),
    ("docvqa", "1998", "1999", "wrong", "anls"),
    # nine of ten characters, and another number all the same
    ("docvqa", "1234567890", "1234567891", "wrong", "anls"),
    ("docvqa", "May 12, 1998", "May 12, 1999", "wrong", "anls"),
    ("docvqa", "1234567.50", "123456750", "wrong", "anls"),
    ("docvqa", "-$1,234,567", "$1,234,567", "wrong", "anls"),
    ("docvqa", "1,234,567,890", "1,234,567890", "correct", "anls"),
    ("docvqa", "May 12, 1998", "May 12 1998", "correct", "anls"),
    ("sroie", "NO 12, JALAN INDAH", "No. 12, Jalan Indah", "correct", "vqa"),
    ("sroie", "25/12/2018", "25/12/2013", "wrong", "list"),
    ("sroie", ["TAN CHAY YEE", "9.00"], '["9.00", "Tan Chay Yee"]', "correct", "list"),
    # letters, numbers, formulas and words in one data set
    ("geoqa+", "B", "(B)", "correct", "choice"),
    ("geoqa+", "B", "C", "wrong", "choice"),
    ("geoqa+", "30", "30°", "correct", "number"),
    ("geoqa+", "yes", "Yes", "correct", "exact"),
    ("geoqa+", "6.5 cm", "7.5 cm", "wrong", "number"),
    ("CLEVR-Math", "20", "21", "wrong", "number"),
    ("super_clevr_yorn", "yes", "No", "wrong", "exact"),
    ("ai2d", "B", "A, B", "wrong", "choice"),  # VQA's normalisation drops the "A"
    ("scienceqa", "north", "North.", "correct", "exact"),
    ("refcoco_val", [[0, 0, 100, 100]], "<box>[[0, 0, 100, 80]]</box>", "correct", "box"),
    ("nobody's", "two dogs", "2 dogs", "wrong", "exact"),
]


@pytest.mark.parametrize(("name", "gold", "prediction", "outcome", "matcher"), ROWS)
def test_rows(name: str, gold: object, prediction: str, outcome: str, matcher: str) -> None:
    task = task_of({"dataset": name, "answer": gold}, f"Final answer: {prediction}")
    with VerifierPool(1) as pool:
        verdict = pool.judge(task)
    assert (verdict.outcome, verdict.matcher) == (outcome, matcher)


def test_nothing_becomes_unjudgeable() -> None:
    """Whatever form a gold answer has, its data set's matchers can read it and accept itself."""
    golds = [
        "B",
        "9",
        "12 cm",
        "-3.5%",
        r"\frac{1}{2}",
        "x < 3",
        "yes",
        "New York",
        "a, b",
        "3 May",
    ]
    with VerifierPool(1) as pool:
        for entry in load_table().entries:
            if set(entry.matchers) & {"box", "point"}:
                continue  # places are written in a way of their own
            name = next(name for name in NAMES if load_table().find(name) is entry)
            for gold in golds:
                task = task_of({"dataset": name, "answer": gold}, f"Final answer: {gold}")
                assert pool.judge(task).outcome == "correct", (name, gold)


def test_who_decides(tmp_path: Path) -> None:
    """The row's own matcher, then the user's file, then the built-in table, then the gold."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        "- match: ['docvqa*', 'Bills 2024']\n"
        "  matcher: [exact, number]\n  least: 0.5\n  why: ours\n",
        encoding="utf-8",
    )
    mine = load_table(path)

    def matchers(**record: object) -> tuple[str, ...]:
        return task_of({"answer": "9", **record}, "9", table=mine).matchers

    assert matchers(dataset="docvqa_val", matcher="vqa") == ("vqa",)
    assert matchers(dataset="docvqa_val") == ("exact", "number")
    assert matchers(dataset="bills 2024") == ("exact", "number")
    assert matchers(dataset="chartqa") == ("relaxed",)
    assert matchers(dataset="bills") == ()
    assert matchers(dataset=7) == ()
    task = task_of({"answer": "9", "dataset": "docvqa_val"}, "9", table=mine)
    assert (task.least, task.same_digits) == (0.5, False)
    entry = mine.find("docvqa_val")
    assert entry is not None
    assert (entry.file, entry.number, entry.why) == (str(path), 1, "ours")
    built_in = task_of({"answer": "9", "dataset": "docvqa_val"}, "9")
    assert (built_in.matchers, built_in.least, built_in.same_digits) == (("anls",), 0.9, True)


def test_what_can_be_judged_follows_the_users_table(tmp_path: Path) -> None:
    """A record is a gold answer where the user's own table says list."""
    (tmp_path / "mine.yaml").write_text("- {match: bills, matcher: list, why: ours}\n")
    mine = load_table(tmp_path / "mine.yaml")
    record = {"answer": {"total": "9.00"}, "dataset": "bills"}
    assert "neither a text nor a list" in str(Verifier(VerifierPool()).fault(record))
    assert Verifier(VerifierPool(), table=mine).fault(record) is None
    line = json.dumps({**record, "completion": "Final answer: total: 9.00"}).encode()
    assert isinstance(parse_line("f", 1, line, Request(table=mine)), Rollout)


ERRORS = [
    ("", "FILE: holds nothing, not a list of entries"),
    ("match: a", "FILE: holds a mapping, not a list of entries"),
    ("- a", "FILE: entry 1 is a text, not a mapping: 'a'"),
    ("- {match: a, why: w}", "FILE: entry 1 (match: 'a') lacks 'matcher'"),
    ("- {matcher: vqa}", "FILE: entry 1 (match: None) lacks 'match' and 'why'"),
    (
        "- {match: a, matcher: vqa, why: w}\n- {match: b, matcher: psychic, why: w}",
        "FILE: entry 2 (match: 'b'): matcher 'psychic' is unknown; one of: exact, vqa,",
    ),
    ("- {match: a, matcher: [], why: w}", "matcher is []; give a text or a list of texts"),
    ("- {match: 7, matcher: vqa, why: w}", "match is 7; give a text or a list of texts"),
    ("- {match: a, matcher: vqa, why: ''}", "why is ''; give one line of text"),
    ("- {match: a, matcher: vqa, why: w, least: 1.5}", "least is 1.5; give a score above 0"),
    ("- {match: a, matcher: vqa, why: w, least: true}", "least is True; give a score above 0"),
    ("- {match: a, matcher: vqa, why: w, same_digits: 1}", "same_digits is 1; give true or false"),
    ("- {match: a, matcher: vqa, why: w, leest: 1}", "key 'leest' is unknown; one of: match,"),
    ("- {match: a, match: b}", "FILE:1: not YAML: key 'match' is given twice"),
    ("- {match: a", "FILE:1: not YAML: expected ',' or '}'"),
    ("- !!python/object/apply:os.getcwd []", "FILE:1: not YAML: could not determine a constructor"),
    ("- \x00", "FILE: not YAML: unacceptable character"),
]


@pytest.mark.parametrize(("text", "message"), ERRORS)
def test_errors(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        load_table(path)
    told = str(error.value)
    assert told.startswith(str(path))
    assert message.replace("FILE", str(path)) in told
