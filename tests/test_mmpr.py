"""mmpr's command line, from questions to pairs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sampling_cases import (
    command,
    fake_checkpoint,
    write_questions,
)

from internvl.data import Quarantine, read_rows, write_jsonl
from mmpr.verify import as_asked, judged_record
from rewards import VerifierPool, task_of


@pytest.fixture
def questions(tmp_path):
    return write_questions(tmp_path)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    return fake_checkpoint(tmp_path, monkeypatch)


def rollout(completion, answer="9", **more):
    return {
        "id": "q", "question": "?", "answer": answer, "sample": 0, "completion": completion,
        "finish_reason": "stop", **more,
    }  # fmt: skip


def test_from_questions_to_pairs(questions, checkpoint, tmp_path, capsys):
    model, opened = checkpoint
    with questions.open("a") as out:
        out.write('{"id": "broken"\n')
    rollouts, verdicts = tmp_path / "out/rollouts.jsonl", tmp_path / "out/verdicts.jsonl"
    sampling = ("sample", questions, "--model", model, "--output", rollouts, "--n", 6)
    assert command(*sampling, "--max-bad", 1) == 0
    bad = json.loads((tmp_path / "out/rollouts.jsonl.quarantine.jsonl").read_text())
    assert bad["line"] == 8 and "not valid JSON" in bad["reason"]
    assert "1 bad row(s) put aside" in capsys.readouterr().out
    assert command(*sampling, "--max-bad", 1) == 0
    assert "is complete: 7 questions x 6" in capsys.readouterr().out
    assert len(opened) == 1, "nothing was left to do, and yet the model was loaded"

    assert command("verify", rollouts, "--output", verdicts) == 0
    stats = json.loads((tmp_path / "out/verdicts.jsonl.stats.json").read_text())
    assert stats["rollouts"] == 42 and sum(stats["outcomes"].values()) == 42
    assert "correct" in capsys.readouterr().out

    meta, pairs = tmp_path / "meta.json", tmp_path / "out/pairs.jsonl"
    pairing = ("pair", verdicts, "--output", pairs, "--meta", meta, "--name", "charts")
    assert command(*pairing) == 2
    assert "give --image-root" in capsys.readouterr().err
    assert command(*pairing, "--image-root", tmp_path) == 0
    assert json.loads(meta.read_text()) == {
        "charts": {
            "root": ".", "annotation": "out/pairs.jsonl", "data_augment": False,
            "repeat_time": 1, "length": len(pairs.read_text().splitlines()),
        }
    }  # fmt: skip
    rows = read_rows(meta, kind="pair", quarantine=Quarantine(None, 0))
    assert all(Path(str(path)).is_file() for row in rows for path in row.image_sources())

    assert command("select", verdicts, "--output", tmp_path / "rl.jsonl") == 0
    chosen = read_rows(tmp_path / "rl.jsonl", kind="question", quarantine=Quarantine(None, 0))
    assert set(chosen[0].data) == {"id", "image", "question", "answer"}
    capsys.readouterr()
    for path, kind in [(rollouts, "rollout"), (verdicts, "verdict"), (meta, "pair")]:
        assert command("stats", path) == 0
        assert kind in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verify", "nowhere.jsonl", "--output", "v.jsonl"], "nowhere.jsonl: no such file"),
        (["verify", "x.jsonl", "--output", "x.jsonl"], "--output x.jsonl is the input itself"),
        (["verify", "x.jsonl"], "the following arguments are required: --output"),
        (["verify", "x", "--output", "v", "--style", "xml"], "invalid choice: 'xml'"),
        (["pair", "x", "--output", "p", "--max-pair", "3"], "unrecognized arguments: --max-pair"),
        (["pair", "x", "--output", "p", "--name", "a"], "give --meta too"),
        (["pair", "x", "--output", "p", "--max-format-share", "2"], "it lies in [0, 1]"),
        (
            ["pair", "x", "--output", "p", "--format-negatives", "off", "--max-format-share", "1"],
            "has no meaning with --format-negatives off",
        ),
        (["sample", "x", "--model", "m", "--output", "r"], "no config.json there"),
        (["sample", "x", "--model", "m", "--output", "r", "--top-p", "2"], "top_p is 2.0"),
        (["sample", "x", "--model", "m", "--output", "r", "--limit", "0"], "--limit is 0"),
        (["stats", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["shuffle"], "invalid choice: 'shuffle'"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_an_unknown_matcher_is_quarantined(tmp_path, capsys):
    good = [rollout("Final Answer: 9", sample=i) for i in range(30)]
    write_jsonl(tmp_path / "r.jsonl", [*good, rollout("?", sample=30, matcher="fuzzy")])
    assert command("verify", tmp_path / "r.jsonl", "--output", tmp_path / "v.jsonl") == 0
    bad = json.loads((tmp_path / "v.jsonl.quarantine.jsonl").read_text())
    assert bad["line"] == 31 and bad["reason"].startswith("matcher 'fuzzy' is unknown; one of:")


def test_a_verdict_that_is_not_whole_is_quarantined(tmp_path):
    record = rollout("Final Answer: 9")
    whole = judged_record(
        record, VerifierPool().judge(task_of(as_asked(record), record["completion"]))
    )
    rows = [whole | {"sample": i} for i in range(3)]
    rows[1] = rows[1] | {"outcome": "maybe"}
    rows[2] = rows[2] | {"extracted": None}
    write_jsonl(tmp_path / "v.jsonl", rows)
    args = ("select", tmp_path / "v.jsonl", "--output", tmp_path / "s.jsonl")
    assert command(*args) == 2
    assert command(*args, "--max-bad", 2) == 0
    bad = (tmp_path / "s.jsonl.quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in bad] == [2, 3]


def test_the_module_runs_and_imports_nothing_heavy():
    root = Path(__file__).resolve().parent.parent
    code = (
        "import sys, mmpr.cli\n"
        "heavy = {'torch', 'transformers', 'vllm', 'sympy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "mmpr.cli.main(['--help'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True
    )
    assert "mmpr sample questions.jsonl --model" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "mmpr", "stats", "nowhere.jsonl"],
        capture_output=True, text=True, cwd=root,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "error: nowhere.jsonl: no such file\n")
