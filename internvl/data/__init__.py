"""Records in and out, with a quarantine for what cannot be used: import all of it from here.

    file -> read_rows -> Rows -> check_images or usable_rows -> the good ones -> a stage
                 \\                     \\
                  `--- quarantine.jsonl: {"file", "line", "reason", "row"} ---'

Read are JSONL (one object a line), MMPR's `meta.json`, parquet files (one, `folder/name*.parquet`,
or a folder of them), folders made by `datasets.save_to_disk`, CSV (see csv_tables), and
VLMEvalKit's TSV benchmarks (see benchmarks); the columns are named like the fields. Fields that are
not named here are kept and passed through.

    question      {"id": "q7", "image": "a.png", "question": "<image>\\nHow many?", "answer": "3"}
    rollout       question + {"sample": 0, "completion": "...", "token_ids": [...], ...}
    verdict       rollout + {"outcome": "correct", "extracted": "3", "score": 1.0, ...}
    pair          {"id": "q7-0", "image": "a.png", "question": "<image>\\n...",
                   "chosen": "...", "rejected": "...", "answer_gt": "3"}
                  also as TRL writes it: prompt, chosen, rejected as messages (see preferences)
    conversation  {"id": "s1", "image": "a.png", "conversations":
                   [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}]}

    image         a path, an image's encoded bytes, {"bytes", "path"}, a list of those, or absent;
                  `images` is the same. A single image needs no placeholder: it is put in front
                  (of pairs, where the file's first 100 rows write none)
    video         a file or a folder of frames: `<video>` in the question, and "num_frames" (8)
    system        the system prompt          max_tiles    the tile budget of this row's prompt
    history       of a pair: the turns before its question, as in a conversation

The modules behind it: records (what a record must hold), preferences (TRL's rows), rows (a record
with its pictures), sources (files), lines, tables, csv_tables and benchmarks (records by number),
rowsets, checks, quarantine, exports and jsonl (writing).
"""

from internvl.data.checks import check_images as check_images
from internvl.data.checks import usable_rows as usable_rows
from internvl.data.exports import portable_record as portable_record
from internvl.data.exports import store_images as store_images
from internvl.data.jsonl import append_jsonl as append_jsonl
from internvl.data.jsonl import dump_line as dump_line
from internvl.data.jsonl import write_json as write_json
from internvl.data.jsonl import write_jsonl as write_jsonl
from internvl.data.quarantine import Quarantine as Quarantine
from internvl.data.records import IMAGE_PLACEHOLDER as IMAGE_PLACEHOLDER
from internvl.data.records import Kind as Kind
from internvl.data.records import RecordFault as RecordFault
from internvl.data.records import find_fault as find_fault
from internvl.data.rows import Row as Row
from internvl.data.rows import RowImages as RowImages
from internvl.data.rows import image_fault as image_fault
from internvl.data.rowsets import Rows as Rows
from internvl.data.rowsets import RowSequence as RowSequence
from internvl.data.rowsets import Selection as Selection
from internvl.data.rowsets import read_rows as read_rows
from internvl.data.sources import check_input as check_input
from internvl.data.sources import input_folder as input_folder
from internvl.data.sources import open_source as open_source
from internvl.errors import DataError as DataError
from internvl.images import MAX_IMAGE_PIXELS as MAX_IMAGE_PIXELS
from internvl.images import image_size as image_size
from internvl.images import load_image as load_image
