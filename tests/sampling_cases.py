"""A sampler that knows no model, and mmpr run with it."""

from itertools import islice

from PIL import Image

from internvl.data import Quarantine, read_rows, write_jsonl
from internvl.errors import DataError, UserError
from internvl.hashing import stable_hash
from internvl.sampler import Completion, SamplingConfig
from mmpr import cli
from mmpr.sample import (
    SampleReport,
    describe_run,
    plan_sampling,
    sample_batches,
)


class FakeSampler:
    """Answers from the request alone, as a real sampler with seeds does.

    backwards: so many requests are taken, then answered from the last to the first.
    """

    name = "transformers"

    def __init__(self, backwards=1):
        self.backwards = backwards
        self.taken = 0

    def stream(self, requests, config, *, ahead=None):
        numbered = enumerate(requests)
        while block := list(islice(numbered, min(self.backwards, ahead))):
            self.taken += len(block)
            for number, request in reversed(block):
                try:
                    yield number, self.answers(request, config)
                except DataError as error:
                    yield number, error

    def answers(self, request, config):
        if "too long" in request.question:
            raise DataError("the prompt has 9 tokens")
        pictures = len(list(request.images))
        return [self.answer(request, pictures, index) for index in range(config.n)]

    def answer(self, request, pictures, index):
        value = stable_hash(request.seed, index) % 5
        text = f"I see {pictures} picture(s), é. Final Answer: {value}"
        return Completion(text, (value, 7), (-0.5, -0.1), "stop")

    def close(self):
        pass


class Dying(FakeSampler):
    """Fails for good after some answers, as when no server is left."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def stream(self, requests, config, *, ahead=None):
        yield from islice(super().stream(requests, config, ahead=ahead), self.after)
        raise UserError("no server answers")


def write_questions(folder):
    """Seven questions, two of them without an image."""
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    rows = [
        {"id": f"q{i}", "image": "a.png", "question": "<image>\nHow many?", "answer": str(i % 5)}
        for i in range(5)
    ]
    rows += [{"id": f"t{i}", "question": "How many?", "answer": "1"} for i in range(2)]
    write_jsonl(folder / "questions.jsonl", rows)
    return folder / "questions.jsonl"


CONFIG = SamplingConfig(n=3, max_tokens=16)


def open_batches(
    questions, output, *, batch=2, sampler=None, report=None, config=CONFIG, seed=0, **changes
):
    quarantine = Quarantine(output.with_name("bad.jsonl"), max_bad=0.5)
    rows = read_rows(questions, kind="question", quarantine=quarantine)
    run = describe_run(model="m", fingerprint="f", seed=seed, config=config, dtype="auto")
    plan = plan_sampling(rows, output=output, config=config, run=run | changes)
    return sample_batches(
        *(plan, sampler or FakeSampler(), quarantine),
        report=report,
        batch_questions=batch,
        progress=False,
    )


def run_sampling(questions, output, **more):
    report = SampleReport()
    for _ in open_batches(questions, output, report=report, **more):
        pass
    return report


def command(*words):
    """Run `mmpr` in this process; returns the exit code."""
    try:
        cli.main([str(word) for word in words])
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code
    return 0


def fake_checkpoint(folder, monkeypatch):
    """A folder that looks like a checkpoint, sampled by the fake."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    opened = []
    monkeypatch.setattr(
        "internvl.sampler.open_sampler", lambda *args, **kw: opened.append(kw) or FakeSampler()
    )
    return folder / "model", opened
