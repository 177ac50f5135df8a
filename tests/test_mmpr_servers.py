"""mmpr sample on servers that are slow, die, come back and answer garbage; and on a real one."""

import base64
import io
import json
import re
import sys
import threading
import time

import pytest
from fake_servers import FakeServer, requests, started_servers
from PIL import Image

from internvl.data import Quarantine, read_rows, write_jsonl
from internvl.errors import DataError, UserError
from internvl.sampler import SampleRequest, SamplingConfig, first_seed, request_of
from internvl.server_sampler import open_servers
from internvl.server_wire import data_uris, parse_answer, signed_seed
from internvl.servers import Unusable

CONFIG = SamplingConfig(n=2, max_tokens=16)


@pytest.fixture
def fakes():
    yield from started_servers()


def opened(model, *servers, **options):
    sampler = open_servers(model, [server.url for server in servers], **options)
    sampler._pool.pause = 0.05
    return sampler


def texts(answers):
    return [[one.text for one in completions] for completions in answers]


def expected(number, n=2):
    seeds = [signed_seed(first_seed(0, i)) % 1000 for i in range(number)]
    return [[str(seed + index) for index in range(n)] for seed in seeds]


def test_a_request_says_all_that_matters(tiny_model, fakes):
    fake = fakes()
    picture = Image.new("RGB", (120, 60), (200, 30, 90))
    asked = SampleRequest("<image>\nHow many?", (picture,), 5, "Be kind.", max_tiles=4)
    config = SamplingConfig(n=3, temperature=0.7, top_p=0.9, top_k=50, max_tokens=500)
    ((one, *_),) = opened(tiny_model, fake, logprobs=False).sample([asked], config)
    assert (one.finish_reason, one.token_ids, one.logprobs) == ("stop", (), ())
    (body,) = fake.bodies
    system, user = body.pop("messages")
    assert system == {"role": "system", "content": "Be kind."}
    image, text = user["content"]
    assert text == {"type": "text", "text": "How many?"}
    kind, _, encoded = image["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    sent = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert (sent.mode, sent.tobytes()) == ("RGB", picture.tobytes())
    tokens = 512 - body.pop("max_tokens")  # what the prompt leaves of the server's room
    assert 30 < tokens < 60
    assert set(body.pop("logit_bias").values()) == {-100}
    assert isinstance(body.pop("stop_token_ids")[0], int)
    assert body == {
        "model": "tiny", "n": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "min_p": 0.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0,
        "seed": signed_seed(first_seed(0, 5)), "logprobs": False, "return_token_ids": True,
        "skip_special_tokens": False,
        "mm_processor_kwargs": {"crop_to_patches": True, "min_patches": 1, "max_patches": 4},
    }  # fmt: skip


def test_pictures_travel_without_loss(tmp_path):
    """A JPEG as it is stored, where every decoder shows it alike; all others as we decode them."""
    noise = Image.effect_noise((90, 60), 80)
    colour, turned = noise.convert("RGB"), Image.Exif()
    turned[0x0112] = 6
    colour.save(tmp_path / "plain.jpg")
    colour.save(tmp_path / "turned.jpg", exif=turned)
    noise.save(tmp_path / "gray.jpg")
    colour.convert("CMYK").save(tmp_path / "cmyk.jpg")
    colour.convert("RGBA").save(tmp_path / "alpha.png")
    names = ["plain.jpg", "turned.jpg", "gray.jpg", "cmyk.jpg", "alpha.png"]
    row = {"id": "q", "image": names, "question": "<image>" * 5, "answer": "1"}
    write_jsonl(tmp_path / "q.jsonl", [row])
    (one,) = read_rows(tmp_path / "q.jsonl", kind="question", quarantine=Quarantine(None))
    lazy, decoded = request_of(one, 0).images, one.load_images()
    uris = data_uris(lazy, decoded)
    kinds = [uri[len("data:image/") : uri.index(";")] for uri in uris]
    assert kinds == ["jpeg", "png", "png", "png", "png"]
    files = [base64.b64decode(uri.partition(",")[2]) for uri in uris]
    assert files[0] == (tmp_path / "plain.jpg").read_bytes()
    for file, picture in zip(files, decoded, strict=True):
        assert Image.open(io.BytesIO(file)).convert("RGB").tobytes() == picture.tobytes()
    assert data_uris(decoded[:1], decoded[:1])[0].startswith("data:image/png;")


def test_seeds_fit_into_the_api():
    assert signed_seed(5) == 5 and signed_seed(2**63 - 1) == 2**63 - 1
    assert signed_seed(2**63) == -(2**63) and signed_seed(2**64 - 65536) == -65536


def test_work_is_shared_by_load_and_kept_in_bounds(tiny_model, fakes):
    quick, slow = fakes(), fakes(delay=0.4)
    sampler = opened(tiny_model, quick, slow, concurrency=3)
    assert texts(sampler.sample(requests(60), CONFIG)) == expected(60)
    assert len(quick.bodies) > 2 * len(slow.bodies) > 0
    assert quick.most_at_once <= 3 and slow.most_at_once <= 3


def test_requests_are_taken_as_there_is_room(tiny_model, fakes):
    """Not beyond twice the workers, nor far ahead of one that is stuck."""
    taken, release = [], threading.Event()

    def behave(number, body):
        if body["seed"] == signed_seed(first_seed(0, 0)):
            release.wait(10)

    def questions():
        for one in requests(100):
            taken.append(one)
            yield one

    sampler = opened(tiny_model, fakes(behave=behave), concurrency=2)
    answers = sampler.stream(questions(), CONFIG, ahead=10)
    done = [next(answers)[0] for _ in range(9)]
    assert sorted(done) == list(range(1, 10)) and len(taken) == 11
    release.set()
    assert sorted([*done, *(number for number, _ in answers)]) == list(range(100))


def test_a_server_that_dies_is_taken_out_and_comes_back(tiny_model, fakes, capsys):
    stable, dying = fakes(delay=0.02), fakes(delay=0.02)
    sampler = opened(tiny_model, stable, dying, concurrency=2)
    got, stream = {}, sampler.stream(requests(80), CONFIG)
    for count, (number, completions) in enumerate(stream, start=1):
        got[number] = completions
        if count == 10:
            dying.stop()
        if count == 30:
            before = len(dying.bodies)
            dying.start()
    assert texts([got[i] for i in range(80)]) == expected(80)
    assert len(dying.bodies) > before, "it came back, and was asked again"
    told = capsys.readouterr().err
    assert told.count(f"{dying.url} is taken out and tried again later") == 1
    assert told.count(f"{dying.url} answers again") == 1


def test_a_dropped_line_and_a_busy_server_are_tried_again(tiny_model, fakes):
    def behave(number, body):
        if number in (2, 5):
            raise ConnectionError
        if number == 7:
            return 429, '{"error": {"message": "slow down"}}'
        if number == 9:
            return 503, "<html>starting</html>"
        return None

    sampler = opened(tiny_model, fakes(behave=behave), concurrency=2)
    assert texts(sampler.sample(requests(20), CONFIG)) == expected(20)


def test_no_server_left_is_one_clear_error(tiny_model, fakes):
    fake = fakes()
    sampler = opened(tiny_model, fake, patience=0.3, concurrency=2)
    stream = sampler.stream(requests(30), CONFIG)
    next(stream)
    fake.stop()
    with pytest.raises(UserError, match=r"no server has answered for 0.3 s: http://127.*: "):
        list(stream)
    with pytest.raises(UserError, match=r"no server answers: http://127.0.0.1:\d+/v1: "):
        opened(tiny_model, fake)
    fake.start()
    assert len(sampler.sample(requests(3), CONFIG)) == 3, "the same sampler goes on"
    # it says what it serves, and never answers: it comes in again and again
    fake.behave = lambda number, body: (503, "overloaded")
    with pytest.raises(UserError, match=r"no server has answered for 0.3 s: .*HTTP 503: overload"):
        sampler.sample(requests(3), CONFIG)


def test_who_stops_early_does_not_wait_for_answers(tiny_model, fakes):
    fake = fakes(behave=lambda number, body: time.sleep(20) if number > 1 else None)
    sampler = opened(tiny_model, fake, concurrency=4)
    stream = sampler.stream(requests(30), CONFIG)
    next(stream)
    start = time.monotonic()
    stream.close()
    assert time.monotonic() - start < 10
    fake.behave = lambda number, body: None
    assert texts(sampler.sample(requests(3), CONFIG)) == expected(3), "the server is not blamed"


GARBAGE = [
    ("<html>hello</html>", "answered what is not JSON: '<html>hello</html>'"),
    ('{"object": "list"}', "answered without choices"),
    ('[{"index": 0}]', "answered without choices"),
    ('{"choices": []}', "answered with 0 choices, 2 were asked for"),
    ('{"choices": [{"index": 0}, {"index": 0}]}', "answered with 2 choices, 2 were asked for"),
    ('{"choices": [{"index": 0}, {"index": 1}]}', "finish_reason is neither stop nor length"),
    (
        json.dumps({"choices": [{"index": i, "finish_reason": "stop"} for i in range(2)]}),
        "message holds no text",
    ),
]


@pytest.mark.parametrize(("text", "message"), GARBAGE)
def test_what_is_no_answer(text, message):
    with pytest.raises(Unusable, match=re.escape(message)):
        parse_answer(text, 2, logprobs=False)


def choice(index=0, **more):
    message = {"content": "9"}
    return {"index": index, "message": message, "finish_reason": "stop", "token_ids": [9], **more}


def test_an_answer_is_whole_and_in_order():
    told = json.dumps({"choices": [choice(1), choice(0)], "prompt_token_ids": [1]})
    answer = parse_answer(told, 2, logprobs=False)
    assert [one["index"] for one in answer["choices"]] == [0, 1]
    for wrong, message in [
        ({"token_ids": []}, "token_ids are no list of ids"),
        ({"token_ids": ["9"]}, "token_ids are no list of ids"),
        ({"logprobs": None}, "logprobs are not as many as its tokens"),
        ({"logprobs": {"content": []}}, "logprobs are not as many as its tokens"),
        ({"logprobs": {"content": [{"logprob": None}]}}, "logprobs are no numbers"),
        ({"message": {"content": 3}}, "message holds no text"),
        ({"finish_reason": "abort"}, "finish_reason is neither stop nor length"),
    ]:
        with pytest.raises(Unusable, match=message):
            parse_answer(json.dumps({"choices": [choice(**wrong)]}), 1, logprobs=True)


def test_garbage_is_tried_again_then_told(tiny_model, fakes):
    mended = fakes(behave=lambda number, body: (200, "<html>") if number <= 3 else None)
    sampler = opened(tiny_model, mended, concurrency=1)
    assert texts(sampler.sample(requests(2), CONFIG)) == expected(2)
    broken = fakes(behave=lambda number, body: (500, '{"error": {"message": "no memory"}}'))
    sampler = opened(tiny_model, broken, concurrency=1)
    sampler._pool.pause = 0.001
    with pytest.raises(UserError, match=f"{broken.url}: HTTP 500: no memory. .* at attempt 5"):
        sampler.sample(requests(3), CONFIG)
    assert len(broken.bodies) == 5


def test_what_a_server_refuses(tiny_model, fakes):
    def refuse(number, body):
        text = str(body["messages"])
        if "How many of 3?" in text:
            told = "This model's maximum context length is 512 tokens. However, you requested"
            return 400, json.dumps({"error": {"message": told}})
        return None

    stream = opened(tiny_model, fakes(behave=refuse)).stream(requests(6), CONFIG)
    answers = dict(stream)
    assert isinstance(answers.pop(3), DataError) and len(answers) == 5

    for status, message, wanted in [
        (400, "mm_processor_kwargs are disabled", "start it with --trust-request-mm-kwargs"),
        (400, "logit_bias has no such token", "refuses the request: logit_bias has no such token"),
        (401, "no such key", "HTTP 401: no such key"),
    ]:
        told = json.dumps({"error": {"message": message}})
        fake = fakes(behave=lambda number, body, answer=(status, told): answer)
        with pytest.raises(UserError, match=wanted) as caught:
            opened(tiny_model, fake).sample(requests(3), CONFIG)
        assert fake.url in str(caught.value)
        assert not isinstance(caught.value, DataError), "no question is to blame"


def test_a_server_of_something_else_is_found_out(tiny_model, fakes, monkeypatch):
    two = fakes(models=[{"id": "a"}, {"id": "b"}])
    with pytest.raises(UserError, match="offers 'a', 'b'; name one of them"):
        opened(tiny_model, two)
    with pytest.raises(UserError, match="offers 'a', 'b', not 'c'"):
        opened(tiny_model, two, served_name="c")
    assert opened(tiny_model, two, served_name="b").sample(requests(1), CONFIG)

    class Other(FakeServer):
        def answer(self, body):
            return {**super().answer(body), "prompt_token_ids": [1, 2, 3]}

    other = Other()
    with pytest.raises(UserError, match=r"reads a prompt as 3 tokens that .* reads as \d+"):
        opened(tiny_model, other).sample(requests(1), CONFIG)
    other.stop()
    with pytest.raises(UserError, match="cannot be handed to servers"):
        opened(tiny_model, two, served_name="b").update_weights([])
    with pytest.raises(UserError, match="--server localhost:8000: expected a URL"):
        open_servers(tiny_model, ["localhost:8000"])
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"pip install 'internvl-posttraining\[api\]'"):
        opened(tiny_model, two)


def test_a_long_prompt_and_an_image_within_a_line_are_that_questions(tiny_model, fakes):
    picture = Image.new("RGB", (56, 56))
    asked = [
        SampleRequest("why? " * 600, (), seed=0),
        SampleRequest("<image> and <image>\nWhich?", (picture, picture), seed=1),
        SampleRequest("How many of 2?", (), seed=2),
    ]
    answers = dict(opened(tiny_model, fakes()).stream(asked, CONFIG))
    assert "no room for a completion" in str(answers[0])
    assert "puts an image on a line of its own" in str(answers[1])
    assert len(answers[2]) == 2
