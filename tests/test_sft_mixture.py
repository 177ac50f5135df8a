"""Mixtures: what is drawn, in what share and order; a pure function of options, seed and place."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_cases import record, write_pictures
from trainer_cases import Recorded, make_trainer, train

from internvl.chat import load_processor
from internvl.data import DataError, Quarantine, Row, Selection, read_rows
from internvl.encoding import Encoder
from internvl.errors import UserError
from sft.config import SFTConfig
from sft.mixture import Mixture, Part, check_names, make_mixture, spans_of
from training.batches import StepSampler
from training.cli import ModelArguments, parse_config
from training.orders import InOrder, Permutation, Shuffled

SIZES = {"charts": 12, "text": 8, "films": 5}  # rows
KIND_OF = {"charts": 1, "text": 0, "films": 7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three data sets: charts, text alone, and films; `mixed.jsonl` has text and charts in turn."""
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder)
    first = 0
    for name, size in SIZES.items():
        rows = [record(first + place, KIND_OF[name]) for place in range(size)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        first += size
    mixed = [record(place, place % 2) for place in range(12)]
    (folder / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed))
    return folder


def write_meta(folder: Path, **said: dict[str, Any]) -> Path:
    """A meta.json of the data sets named, with what is said of each."""
    entries = {
        name: {"root": "", "annotation": f"{name}.jsonl", **more} for name, more in said.items()
    }
    file = folder / f"meta-{len(list(folder.glob('meta-*.json')))}.json"
    file.write_text(json.dumps(entries))
    return file


def options(file: Path, **changes: Any) -> SFTConfig:
    common = {"use_cpu": True, "report_to": "none", "seed": 3}
    return SFTConfig(output_dir=str(file.parent / "out"), train_file=str(file), **common, **changes)


def mixture_of(file: Path, encoder: Any = None, **changes: Any) -> tuple[Sequence[Row], Any]:
    """The rows of a file and the mixture that the options make of them."""
    args = options(file, **changes)
    checked = args.check_rows == "before"
    rows = read_rows(file, kind="conversation", quarantine=Quarantine(None), checked=checked)
    return rows, make_mixture(rows, args, encoder)


def drawn(rows: Sequence[Row], order: Any, epoch: int = 0) -> Counter[str]:
    """Samples by data set, or else by kind."""
    found: Counter[str] = Counter()
    for place in range(epoch * len(order), (epoch + 1) * len(order)):
        row = rows[order[place]]
        found[row.data_set or ("text" if row.is_text else "images")] += 1
    return found


# ---------------------------------------------------------------- orders


@settings(max_examples=40)
@given(st.integers(1, 900), st.integers(), st.integers(0, 2**40))
def test_a_permutation_is_one(size: int, seed: int, epoch: int) -> None:
    order = Permutation(size, seed, epoch)
    assert sorted(order[place] for place in range(size)) == list(range(size))


def test_a_permutation_favours_nothing() -> None:
    """All orders of four are as likely (chi-squared, 23 degrees: 5e-6 beyond 60), and places of a
    large one are not told by their neighbours.
    """
    orders = Counter(tuple(Permutation(4, key)[i] for i in range(4)) for key in range(2400))
    assert len(orders) == 24
    assert sum((found - 100) ** 2 / 100 for found in orders.values()) < 60
    large = Permutation(10**8, 5)
    halves = [large[place] < 5 * 10**7 for place in range(4000)]
    assert abs(sum(halves) - 2000) < 150  # 4.7 sigma
    assert abs(sum(a == b for a, b in pairwise(halves)) - 2000) < 150


@settings(max_examples=50)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_ranks_share_an_order_out(length: int, batch: int, world: int, epoch: int) -> None:
    """Whatever their number, the ranks' shares of a step are the same samples together."""
    order = Shuffled(length, seed=7)
    rows = InOrder(list(range(length)), order)

    def steps(batch_size: int, rank: int, world_size: int) -> list[list[int]]:
        sampler = StepSampler(
            *(len(rows), batch_size),
            rank=rank,
            world_size=world_size,
            seed=0,
            shuffle=True,
            by_place=True,
        )
        sampler.set_epoch(epoch)
        return [[rows[place] for place in step] for step in sampler]

    together = [
        list(chain(*shares))
        for shares in zip(*(steps(batch, rank, world) for rank in range(world)), strict=True)
    ]
    assert together == steps(batch * world, 0, 1)
    assert sorted(chain(*together)) == list(range(length))


PARTS = st.lists(st.tuples(st.integers(1, 9), st.floats(0.5, 20)), min_size=1, max_size=4)


@settings(max_examples=25)
@given(PARTS, st.integers(60, 99), st.integers(0, 99))
def test_shares_are_met_and_no_row_comes_early(
    sizes: list[tuple[int, float]], length: int, seed: int
) -> None:
    """Each epoch has each part's quota; a part's n-th row comes only when n - 1 others have."""
    starts = [sum(size for size, _ in sizes[:index]) for index in range(len(sizes))]
    parts = [
        Part(f"{index}", range(start, start + size), share)
        for index, (start, (size, share)) in enumerate(zip(starts, sizes, strict=True))
    ]
    mixture = Mixture(parts, length, seed=seed)
    total = sum(share for _, share in sizes)
    stream = [mixture[place] for place in range(3 * length)]
    assert stream[:20] == [mixture[place] for place in reversed(range(20))][::-1]
    for part, quota in zip(parts, mixture.quotas, strict=True):
        assert abs(quota - part.share / total * length) < 1
        for epoch in range(3):
            in_epoch = stream[epoch * length : (epoch + 1) * length]
            assert sum(row in part.numbers for row in in_epoch) == quota
        # the draws of a part, counted on over the epochs, are whole rounds of its rows
        for epoch in range(1, 4):
            count = Counter(row for row in stream[: epoch * length] if row in part.numbers)
            whole, rest = divmod(epoch * quota, len(part.numbers))
            assert set(count.values()) <= {whole, whole + 1} or whole == 0
            assert sum(found > whole for found in count.values()) == rest


def test_with_replacement_each_place_is_drawn_anew() -> None:
    parts = [Part("a", range(10), 3), Part("b", range(10, 12), 1)]
    mixture = Mixture(parts, 8000, seed=1, replacement=True)
    found = Counter(mixture[place] for place in range(8000))
    assert abs(sum(found[row] for row in range(10)) - 6000) < 180  # 4.6 sigma
    assert all(abs(found[row] - 600) < 110 for row in range(10))
    assert all(abs(found[row] - 1000) < 140 for row in (10, 11))
    assert [mixture[place] for place in range(8000, 8020)] != [mixture[p] for p in range(20)]


def test_another_seed_is_another_order() -> None:
    parts = [Part("a", range(10), 3), Part("b", range(10, 20), 1)]
    first, second = (Mixture(parts, 40, seed=seed) for seed in (1, 2))
    assert [first[p] for p in range(40)] != [second[p] for p in range(40)]
    assert [first[p] for p in range(40)] != [first[p] for p in range(40, 80)]
    # also which part stands at a place, not its row alone
    assert [first[p] < 10 for p in range(40)] != [first[p] < 10 for p in range(40, 80)]


# ---------------------------------------------------------------- data sets and their weights


def test_by_size_and_repeats(folder: Path) -> None:
    meta = write_meta(folder, charts={"repeat_time": 2}, text={}, films={"repeat_time": 0})
    rows, mixture = mixture_of(meta)
    assert mixture is None and len(rows) == 32
    assert [(span.name, span.numbers) for span in spans_of(rows)] == [
        ("charts", range(24)),
        ("text", range(24, 32)),
        ("films", range(32, 32)),
    ]
    _, replaced = mixture_of(meta, mixture_replacement=True)
    assert list(replaced.describe()) == [
        "mixture: 32 samples an epoch, with replacement",
        "  charts: 24 samples (75.0%) of 24 rows, 1.00 times",
        "  text: 8 samples (25.0%) of 8 rows, 1.00 times",
    ]


def test_by_weights(folder: Path) -> None:
    """25 samples an epoch; mixture_weights stands over meta.json's."""
    meta = write_meta(folder, charts={"weight": 1}, text={"weight": 3}, films={"weight": 9.0})
    rows, mixture = mixture_of(meta, mixture="weights", mixture_weights={"films": 1})
    assert drawn(rows, mixture) == drawn(rows, mixture, 5) == {"charts": 5, "text": 15, "films": 5}
    text = [rows[mixture[p]].data["id"] for p in range(50) if rows[mixture[p]].data_set == "text"]
    assert set(Counter(text).values()) == {3, 4}  # 30 draws of 8 rows
    weights = {"mixture": "weights", "mixture_weights": {"films": 1}}
    _, other = mixture_of(meta, data_seed=4, **weights)
    assert [mixture[p] for p in range(25)] != [other[p] for p in range(25)]


def test_bad_rows_are_in_no_share(folder: Path) -> None:
    """What the checks have left out is left out of its data set's stretch."""
    rows, _ = mixture_of(write_meta(folder, charts={"repeat_time": 2}, text={}, films={}))
    left = Selection(rows, [number for number in range(len(rows)) if number not in (0, 23, 24)])
    assert [(span.name, span.numbers) for span in spans_of(left)] == [
        ("charts", range(22)),
        ("text", range(22, 29)),
        ("films", range(29, 34)),
    ]
    assert [left[n].data_set for n in (21, 22, 28, 29)] == ["charts", "text", "text", "films"]
    assert [span.numbers for span in left[10:25].spans()] == [
        range(12),
        range(12, 15),
        range(15, 15),
    ]
    assert [span.name for span in rows[::-1].spans()] == [None]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"mixture": "round_robin"}, "mixture is 'round_robin'; it is one of size, weights"),
    ({"mixture_weights": {"text": 1}}, 'but mixture is "size": give mixture: weights'),
    ({"mixture_weights": {"text": 0}}, "mixture_weights: text has 0; a weight is a number over 0"),
    ({"mixture_weights": {"text": -1.5}}, "text has -1.5; a weight is a number over 0"),
    ({"mixture_weights": {"text": True}}, "text has True; a weight is a number over 0"),
    ({"mixture_weights": {"text": float("nan")}}, "text has nan; a weight is a number over 0"),
    ({"mixture_weights": "text=1"}, "mixture_weights is 'text=1'; give {\"name\": weight} as JSON"),
    ({"mixture_weights": {}}, "mixture_weights is {}; give a weight for each name"),
    ({"text_ratio": 1.0}, "text_ratio is 1; it is a share, between 0 and 1"),
    ({"text_ratio": 0.25, "text_ratio_by": "rows"}, "text_ratio_by is 'rows'; it is tokens or"),
    ({"text_ratio_by": "samples"}, "text_ratio_by is given, but text_ratio is not"),
    ({"packing_buffer_size": 9}, "packing_buffer_size is given, but packing is not"),
    ({"packing": True, "packing_buffer_size": 0}, "packing_buffer_size is 0; it must be at least"),
    ({"packing": True, "check_rows": "when_used"}, "when_used needs max_steps"),
    ({"packing": True, "save_strategy": "epoch"}, 'save_strategy is "epoch", but with packing'),
]


@pytest.mark.parametrize(("changes", "told"), REFUSED)
def test_what_cannot_be_is_one_line(changes: dict[str, Any], told: str, folder: Path) -> None:
    with pytest.raises(UserError, match=re.escape(told)) as error:
        options(folder / "text.jsonl", **changes)
    assert "\n" not in str(error.value)


WRONG_WEIGHTS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"mixture": "weights", "mixture_weights": {"chart": 1}},
        {"charts": {}, "text": {}},
        "mixture_weights names 'chart', no data set of .*; did you mean 'charts'?",
    ),
    ({"mixture": "weights"}, {"charts": {"weight": 1}, "text": {}}, "but no weight of text in "),
    ({}, {"charts": {"weight": 1}}, 'gives a weight to charts, but mixture is "size"'),
    ({"mixture": "weights"}, {}, "mixture: weights mixes the data sets of a meta.json"),
    ({}, {"text": {"weight": 0}}, "data set 'text': weight is 0; give a number over 0"),
    ({}, {"text": {"weight": "2"}}, "data set 'text': weight is '2'; give a number over 0"),
]


@pytest.mark.parametrize(("changes", "said", "told"), WRONG_WEIGHTS)
def test_wrong_weights_are_told_before_anything_is_loaded(
    changes: dict[str, Any], said: dict[str, Any], told: str, folder: Path
) -> None:
    file = write_meta(folder, **said) if said else folder / "text.jsonl"
    with pytest.raises((UserError, DataError), match=told):
        check_names(options(file, **changes))
    with pytest.raises((UserError, DataError), match=told):
        mixture_of(file, **changes)


def test_weights_are_sfts_alone(folder: Path) -> None:
    meta = write_meta(folder, text={"weight": 2})
    with pytest.raises(DataError, match="data set 'text': weight is read by SFT alone"):
        read_rows(meta, kind="pair", quarantine=Quarantine(None))


def test_a_share_below_one_sample(folder: Path) -> None:
    meta = write_meta(folder, charts={"weight": 1}, text={"weight": 100})
    with pytest.raises(UserError, match="the share of charts is less than one of an epoch's 20"):
        mixture_of(meta, mixture="weights")


def test_weights_come_from_yaml_and_the_command_line(folder: Path) -> None:
    config = folder / "sft.yaml"
    given = {"train_file": "m", "model_name_or_path": "m", "use_cpu": True, "mixture": "weights"}
    config.write_text(yaml.safe_dump({**given, "mixture_weights": {"a": 2, "b": 0.5}}))
    args, _ = parse_config([SFTConfig, ModelArguments], "sft", ["--config", str(config)])
    assert args.mixture_weights == {"a": 2, "b": 0.5}
    words = ["--config", str(config), "--mixture_weights", '{"a": 3}']
    args, _ = parse_config([SFTConfig, ModelArguments], "sft", words)
    assert args.mixture_weights == {"a": 3}


# ---------------------------------------------------------------- text among images


@pytest.fixture(scope="module")
def encoder(tiny_model: Path) -> Encoder:
    return Encoder(load_processor(str(tiny_model)), max_tiles=4)


def test_text_by_samples(folder: Path) -> None:
    """12 charts, 8 texts, 5 films: 25 samples, a quarter of them text; films keep 5 of 17."""
    rows, mixture = mixture_of(
        write_meta(folder, charts={}, text={}, films={}), text_ratio=0.24, text_ratio_by="samples"
    )
    assert drawn(rows, mixture) == {"charts": 13, "text": 6, "films": 6}


def test_text_by_tokens(folder: Path, encoder: Encoder) -> None:
    """1 : 3 by tokens, as far as 25 samples allow: text is shorter, so there is more of it."""
    meta = write_meta(folder, charts={"repeat_time": 20}, text={}, films={})
    rows, mixture = mixture_of(meta, encoder, text_ratio=0.25)
    tokens: Counter[bool] = Counter()
    for place in range(len(mixture)):
        row = rows[mixture[place]]
        tokens[row.is_text] += encoder.length(row, "conversation")
    assert tokens[True] / tokens.total() == pytest.approx(0.25, abs=0.003)
    assert drawn(rows, mixture)["text"] > 0.25 * len(mixture)


def test_one_file_of_both_kinds(folder: Path) -> None:
    file = folder / "mixed.jsonl"
    rows, mixture = mixture_of(file, text_ratio=0.25, text_ratio_by="samples")
    assert drawn(rows, mixture) == {"text": 3, "images": 9}
    assert list(mixture.describe())[1:] == [
        "  all rows (text): 3 samples (25.0%) of 6 rows, 0.50 times",
        "  all rows (images): 9 samples (75.0%) of 6 rows, 1.50 times",
    ]
    with pytest.raises(UserError, match="all rows holds rows with and without images, which check"):
        mixture_of(file, text_ratio=0.25, check_rows="when_used")


def test_a_file_of_both_kinds_beside_others(folder: Path) -> None:
    """Each half has the share of its rows: 6 of text beside 8, 6 of images beside 12."""
    meta = write_meta(folder, mixed={}, text={}, charts={})
    _, mixture = mixture_of(meta, text_ratio=0.5, text_ratio_by="samples")
    assert [part.name for part in mixture.parts] == [
        *("mixed (text)", "mixed (images)", "text", "charts")
    ]
    assert mixture.quotas == [7, 5, 9, 11]


@pytest.mark.parametrize(("name", "what"), [("text", "with an image"), ("films", "without an")])
def test_a_ratio_of_what_is_not_there(name: str, what: str, folder: Path) -> None:
    with pytest.raises(UserError, match=f"text_ratio: there is no data set with rows {what}"):
        mixture_of(folder / f"{name}.jsonl", text_ratio=0.25)


# ---------------------------------------------------------------- a run


def test_a_run_draws_the_mixture_and_says_so(
    tiny_model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The steps' rows are the mixture's; what was drawn is logged, and told at the end."""
    meta = write_meta(folder, charts={"weight": 1}, text={"weight": 3}, films={"weight": 1})
    rows, mixture = mixture_of(meta, mixture="weights")
    changes = {"mixture": "weights", "per_device_train_batch_size": 13, "num_train_epochs": 1}
    changes |= {"train_file": str(meta), "max_tiles": 1}
    recorded = train("sft", tiny_model, tmp_path, rows, **changes)
    assert recorded.rows == [rows[mixture[place]].data["id"] for place in range(25)]
    assert len(recorded.losses) == 2
    logged = recorded.logs[0]
    first = Counter(rows[mixture[place]].data_set for place in range(13))
    assert {k: v for k, v in logged.items() if k.startswith("mixture/")} == {
        **{f"mixture/{name}": first[name] / 13 for name in SIZES},
        "mixture/text_samples": first["text"] / 13,
        "mixture/text_tokens": pytest.approx(logged["mixture/text_tokens"]),
    }
    assert 0 < logged["mixture/text_tokens"] < first["text"] / 13  # text is shorter
    told = list(recorded.trainer._accounts.describe())
    assert told[0].startswith("drawn: 25 samples, ") and "60.0% of the samples" in told[0]
    assert [line.split(" tokens")[0].rsplit(",", 1)[0] for line in told[1:]] == [
        "  charts: 5 samples (20.0%)",
        "  text: 15 samples (60.0%)",
        "  films: 5 samples (20.0%)",
    ]
    assert "mixture: 25 samples an epoch, without replacement" in capsys.readouterr().out


def test_one_data_set_alone_is_drawn_as_ever(tiny_model: Path, folder: Path) -> None:
    """torch's shuffle, no account: runs of before are repeated to the bit."""
    rows, _ = mixture_of(folder / "text.jsonl")
    trainer = make_trainer("sft", tiny_model, folder / "plain", rows, Recorded())
    loader = trainer.get_train_dataloader()
    assert loader.dataset is rows and not loader.batch_sampler.by_place
    assert trainer._accounts is None and loader.collate_fn.tally is None
