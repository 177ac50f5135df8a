"""Only pairs whose rejected continuation the model itself finds less likely than the chosen one.

    pair --forward, with the image--> mean log-probability of both continuations --chosen's larger?

Log-probabilities are the model's own, of the tokens that training would see, as MPO's reference
scores them (`internvl.scoring`), not the sampler's: that one was asked without the image. Means, so
that a continuation is not less likely for being longer. They are kept in
`<output>.likelihood.jsonl`, which a run that was killed goes on with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.data import Quarantine, Row, append_jsonl, dump_line, write_json
from internvl.data.resumable import check_same_run, meta_path, naming_the_file
from internvl.errors import DataError
from mmpr.resumable import recover

if TYPE_CHECKING:
    from internvl.scoring import PairScorer

LESS_LIKELY = "the continuation is not less likely than the original, given the image"
_AT_ONCE = 32  # pairs between two writes


def keep_less_likely(
    pairs: Sequence[dict[str, Any]],
    row_of: Callable[[str], Row],
    open_scorer: Callable[[], PairScorer],
    *,
    output: Path,
    run: dict[str, Any],
    quarantine: Quarantine,
    left_out: dict[str, int],
) -> list[dict[str, Any]]:
    """The pairs whose rejected continuation is the less likely one; the others are counted.

    row_of: the rollout's row of a pair's id, which knows where the image is. open_scorer: called
    when a pair is to be scored. Pairs that cannot be scored go to the quarantine.
    """
    from tqdm import tqdm

    check_same_run(output, run)
    done = recover(output, 1)
    with naming_the_file(meta_path(output)):
        write_json(meta_path(output), run)
    pending = [pair for pair in pairs if pair["id"] not in done]
    scorer = open_scorer() if pending else None
    bar = tqdm(total=len(pairs), initial=len(pairs) - len(pending), desc="scoring", unit="pair")
    for start in range(0, len(pending), _AT_ONCE):
        scored = []
        for pair in pending[start : start + _AT_ONCE]:
            row = row_of(pair["id"])
            texts = {name: pair[name] for name in ("question", "chosen", "rejected")}
            assert scorer is not None
            try:
                chosen, rejected = scorer.rest_logprobs(replace(row, data={**row.data, **texts}))
            except DataError as error:
                quarantine.add(row.file, row.line, str(error), row.data)
                continue
            values = {"chosen_logprob": chosen, "rejected_logprob": rejected}
            scored.append({"id": pair["id"], "sample": 0, **values})
        with naming_the_file(output), append_jsonl(output) as out:
            out.writelines(map(dump_line, scored))
        done |= {record["id"]: record for record in scored}
        bar.update(len(pending[start : start + _AT_ONCE]))
    bar.close()
    kept = []
    for pair in pairs:
        if (found := done.get(pair["id"])) is None:
            continue  # in the quarantine
        if found["rejected_logprob"] < found["chosen_logprob"]:
            kept.append(pair)
        else:
            left_out[LESS_LIKELY] = left_out.get(LESS_LIKELY, 0) + 1
    return kept
