"""`cascade evaluate`: options that cannot be honoured, adapters, a judge and a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_runs import FakeSampler, evaluate, predictions, questions, refused
from judge_server import judges, serve

from cascade.cli import main
from internvl.sampler import Completion


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--samples=0"], "--samples is 0; give 1 or more"),
        (["--first=0"], "--first is 0; give 1 or more"),
        (["--temperature=0"], "--temperature is 0; the greedy answers are reported in any case"),
        (["--top-p=1.5"], "top_p is 1.5, give a number in (0, 1]"),
        (["--cot-style=r1"], "--cot-style has no meaning without --prompts cot"),
        (["--prompts", "cot", "cot"], "--prompts cot cot: name each set once"),
        (["--concurrency=4"], "--concurrency has no meaning without --server"),
        (["--server=http://h/v1", "--dtype=float32"], "--dtype has no meaning with --server"),
        (["--count=x"], "--count 'x': expected NAME=TEXT"),
        (["--dataset=b"], "--dataset b: not there; there are: heldout"),
        (["--judge-model=m"], "judge_model is given, but judge_base_url is not"),
        (["--model=nowhere"], "nowhere: no config.json there"),
    ],
)
def test_options_that_cannot_be_honoured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, words: list[str], told: str
) -> None:
    said = refused(
        capsys, lambda: evaluate(monkeypatch, questions(tmp_path), tmp_path / "o", *words)
    )
    assert told in said and said.count("\n") == 1


def test_an_id_twice_in_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    one = questions(tmp_path, 2, name="a", dataset="d")
    two = questions(tmp_path, 2, name="b", dataset="d")
    said = refused(capsys, lambda: evaluate(monkeypatch, [one, two], tmp_path / "o"))
    assert f"{two}:1: id 'q0' of data set 'd' is that of {one}:1, too" in said


def test_an_adapter_that_vllm_cannot_put_on_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Told before anything is loaded, with what to do."""
    import numpy as np
    from safetensors.numpy import save_file

    file, adapter, base = questions(tmp_path), tmp_path / "adapter", tmp_path / "base"
    for folder in (adapter, base):
        folder.mkdir()
    (base / "config.json").write_text("{}")
    opened: list[dict[str, Any]] = []

    def told(settings: dict[str, Any], tensor: str, backend: str, *words: str) -> str:
        whole = {"peft_type": "LORA", "base_model_name_or_path": str(base), **settings}
        (adapter / "adapter_config.json").write_text(json.dumps(whole))
        save_file({tensor: np.zeros(1, np.float32)}, adapter / "adapter_model.safetensors")
        monkeypatch.setattr("internvl.sampler.choose_backend", lambda *_: backend)
        words = (f"--model={adapter}", *words)
        said = refused(capsys, lambda: evaluate(monkeypatch, file, tmp_path / "o", *words))
        assert said.rstrip().endswith(f"internvl merge {adapter} OUTPUT")
        return said

    llm = "base_model.model.model.language_model.layers.0.q_proj.lora_A.weight"
    said = told({"r": 4}, llm, "transformers")
    assert "a LoRA adapter, which transformers does not sample from: make one checkpoint" in said
    said = told({"r": 4, "modules_to_save": ["lm_head"]}, llm, "vllm")
    assert "the adapter holds whole modules (modules_to_save)" in said
    assert "the adapter is a DoRA" in told({"use_dora": True}, llm, "vllm")
    tower = "base_model.model.model.vision_tower.layer.0.q_proj.lora_A.weight"
    said = told({"r": 4}, tower, "vllm")
    assert f"the adapter is not of the language model alone ({tower})" in said
    said = told({"r": 4}, llm, "vllm", "--server=http://h/v1")
    assert "servers are asked for a whole model" in said

    class Engine(FakeSampler):
        def update_adapter(self, folder: Path) -> None:
            opened.append({"adapter": folder})

    engine = Engine()
    told_to = {"r": 4, "rank_pattern": {"q_proj": 12}}
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(base), **told_to})
    )
    save_file({llm: np.zeros(1, np.float32)}, adapter / "adapter_model.safetensors")

    def opener(folder: Path, **options: Any) -> FakeSampler:
        opened.append({"base": folder, "rank": options["max_lora_rank"]})
        return engine

    words = ["--workers=1", f"--model={adapter}", f"--output={tmp_path / 'good'}"]
    monkeypatch.setattr("internvl.sampler.open_sampler", opener)
    main(["evaluate", str(file), *words])
    assert opened == [{"base": base, "rank": 12}, {"adapter": adapter}]
    before = json.loads((tmp_path / "good" / "settings.json").read_text())["fingerprint"]
    (base / "config.json").write_text('{"another": "base"}')
    assert "fingerprint was " in refused(capsys, lambda: main(["evaluate", str(file), *words]))
    assert len(before) == 32


# ---- a judge and a table, as `mmpr verify` has them ----

QUESTIONS = [
    {"id": "a", "question": "Colour?", "answer": "red", "matcher": "judge"},
    {"id": "b", "question": "How many?", "answer": "9", "dataset": "mine", "prompt_style": "boxed"},
    {"id": "c", "question": "How much?", "answer": "9", "matcher": "psychic"},
]
SAID = {"Colour?": "crimson", "How many?": r"about \boxed{9.2}", "How much?": "9"}


class ByRote(FakeSampler):
    """Says SAID; the last completion of several was cut."""

    def answer(self, request: Any, config: Any, n: int) -> Completion:
        cut = config.n > 1 and n == config.n - 1
        return Completion(SAID[request.question], (1, 2), (), "length" if cut else "stop")


def test_evaluation_takes_a_judge_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Questions of one batch are judged together, in their order."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    rows, table, out = tmp_path / "q.jsonl", tmp_path / "mine.yaml", tmp_path / "out"
    rows.write_text("".join(json.dumps(record) + "\n" for record in QUESTIONS))
    table.write_text("- {match: mine, matcher: relaxed, why: read off an axis}")
    words = ["--max-bad=1", f"--datasets={table}"]
    with serve() as server:
        server.answers = [judges(lambda data: data["prediction"] in ("crimson", "4"))]
        judge = [f"--judge-base-url={server.url}", "--judge-model=m"]
        evaluate(monkeypatch, rows, out, *words, *judge, sampler=ByRote())
    found = predictions(out)
    assert [record["id"] for record in found] == ["a", "b"]
    for record in found:
        said = [record["greedy"], *record["sampled"]]
        assert [one["outcome"] for one in said] == ["correct"] * 3
        assert [one["completion"] for one in said] == [SAID[record["question"]]] * 3
    assert [one["format_ok"] for one in found[1]["sampled"]] == [True, False]
    assert "matcher 'psychic' is unknown" in (out / "quarantine.jsonl").read_text()

    with pytest.raises(SystemExit):  # and without the judge
        evaluate(monkeypatch, rows, out, *words, sampler=ByRote())
    assert "'judge' needs a judge" in (out / "quarantine.jsonl").read_text()
