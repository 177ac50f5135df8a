"""Examples into packed rows: a prompt once, its completions as branches, no padding.

    prompt P | chosen C | rejected R | prompt P' | chosen C' | ...        one row, T tokens
    positions 0..P-1, P..P+C-1, P..P+R-1, 0..P'-1, ...                     restart after the prompt
    C sees [P | C], R sees [P | R], nothing sees another example

Shape legend: T packed tokens, N scored tokens, C completions, E examples, X tiles, I image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from internvl.attention import AttentionLayout, Segment, build_layout
from internvl.positions import token_positions


@dataclass
class Example:
    """A prompt with its images and the completions that share it.

    prompt_ids: ids with image placeholders expanded. tiles: uint8 [X, 3, H, W]. completions: ids,
    each ended by the end-of-turn token unless it was cut. completion_values: a number for each
    completion (say its reference log-probability). token_values: a number for each completion
    token. image_slots: where the image features go, counted from the start of prompt + first
    completion. loss_masks: True where a completion's token is scored (None: everywhere).
    slot_steps: how far each of image_slots moves the position on (None: 1, as any token).
    vision_features: [X, P, D], the vision tower's of the prompt's tiles where it need not run again
    (tiles is then empty). draw: a number that random draws for this sample go by (see `tile_keys`).
    """

    prompt_ids: list[int]
    tiles: Tensor
    completions: list[list[int]]
    image_slots: list[int]
    completion_values: dict[str, list[float]] = field(default_factory=dict)
    token_values: dict[str, list[list[float]]] = field(default_factory=dict)
    loss_masks: list[list[bool]] | None = None
    slot_steps: list[float] | None = None
    vision_features: Tensor | None = None
    draw: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that the example takes in a row."""
        return len(self.prompt_ids) + sum(len(ids) for ids in self.completions)

    @property
    def num_tiles(self) -> int:
        """Tiles that the vision tower sees."""
        return len(self.tiles)

    def positions(self) -> list[float]:
        """Positions of the prompt, then of each completion, which all go on where it ended."""
        prompt = len(self.prompt_ids)
        steps: dict[int, float] = {}
        if self.slot_steps is not None:
            steps = dict(zip(self.image_slots, self.slot_steps, strict=True))
        out = list(token_positions(prompt, steps))
        last = out[-1] if out else -1
        for branch, completion in enumerate(self.completions):
            later = {slot - prompt: step for slot, step in steps.items() if slot >= prompt}
            visual = later if branch == 0 else {}
            out += token_positions(len(completion), visual, last)
        return out


@dataclass
class PackedBatch:
    """One micro-batch: a packed row and everything a loss needs to know of it.

    input_ids, position_ids: [T], positions in float32 where one is fractional. tiles: uint8
    [X, 3, H, W]. image_positions: [I], where the image features go. sources: [N], the place whose
    hidden state predicts a scored token; targets: [N], that token; completion_of_token: [N];
    example_of_completion: [C]; lengths: [C], scored tokens. completion_values: {name: [C]};
    token_values: {name: [N]}. example_index: [E], the examples' places in the step's batch. real:
    False for the filler that a rank runs when it has no micro-batch left; its completions are
    none, so every sum over it is 0. vision_features: [X, P, D] where the examples brought them.
    tile_keys: int64 [X], what random draws for a tile go by: the same wherever it is packed.
    """

    input_ids: Tensor
    position_ids: Tensor
    tiles: Tensor
    image_positions: Tensor
    layout: AttentionLayout
    sources: Tensor
    targets: Tensor
    completion_of_token: Tensor
    example_of_completion: Tensor
    lengths: Tensor
    completion_values: dict[str, Tensor]
    token_values: dict[str, Tensor]
    example_index: Tensor
    real: bool = True
    vision_features: Tensor | None = None
    tile_keys: Tensor | None = None

    @property
    def num_completions(self) -> int:
        """C."""
        return len(self.lengths)

    def on(self, device: torch.device) -> PackedBatch:
        """The same batch with every tensor on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(
            self,
            **moved,
            layout=self.layout.on(device),
            completion_values={k: v.to(device) for k, v in self.completion_values.items()},
            token_values={k: v.to(device) for k, v in self.token_values.items()},
        )

    def sum_by_completion(self, token_values: Tensor) -> Tensor:
        """Sum a value over the scored tokens of each completion: [N] -> [C]."""
        out = token_values.new_zeros(self.num_completions)
        return out.index_add(0, self.completion_of_token, token_values)


def plan_microbatches(
    examples: Sequence[Example], max_tokens: int, max_tiles: int | None = None
) -> list[list[int]]:
    """Share examples out over as few micro-batches as first-fit-decreasing finds.

    Returns lists of indices; an example larger than a budget stands alone. Deterministic.
    """
    order = sorted(range(len(examples)), key=lambda i: (-examples[i].num_tokens, i))
    bins: list[tuple[list[int], int, int]] = []
    for index in order:
        tokens, tiles = examples[index].num_tokens, examples[index].num_tiles
        for place, (members, used_tokens, used_tiles) in enumerate(bins):
            fits_tiles = max_tiles is None or used_tiles + tiles <= max_tiles
            if used_tokens + tokens <= max_tokens and fits_tiles:
                members.append(index)
                bins[place] = (members, used_tokens + tokens, used_tiles + tiles)
                break
        else:
            bins.append(([index], tokens, tiles))
    return [sorted(members) for members, _, _ in bins]


class _Row:
    """The lists that grow while examples are laid into a row."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[float] = []
        self.image_positions: list[int] = []
        self.segments: list[Segment] = []
        self.sources: list[int] = []
        self.targets: list[int] = []
        self.completion_of_token: list[int] = []
        self.example_of_completion: list[int] = []
        self.lengths: list[int] = []

    def add(self, number: int, example: Example) -> None:
        """Lay one example down: the prompt, then each completion as a branch."""
        start, prompt = len(self.ids), len(example.prompt_ids)
        self.ids += example.prompt_ids
        self.positions += example.positions()
        self.image_positions += [start + slot for slot in example.image_slots]
        for branch, completion in enumerate(example.completions):
            here = len(self.ids)
            self.ids += completion
            if branch == 0:  # it follows its prompt: both are one causal stretch
                self.segments.append(Segment(0, 0, start, len(self.ids)))
            else:
                self.segments.append(Segment(start, start + prompt, here, len(self.ids)))
            mask = example.loss_masks[branch] if example.loss_masks else [True] * len(completion)
            self._score(completion, mask, last_of_prompt=start + prompt - 1, start=here)
            self.example_of_completion.append(number)

    def _score(
        self, completion: list[int], mask: list[bool], *, last_of_prompt: int, start: int
    ) -> None:
        scored = [offset for offset, keep in enumerate(mask) if keep]
        self.sources += [start + o - 1 if o else last_of_prompt for o in scored]
        self.targets += [completion[o] for o in scored]
        self.completion_of_token += [len(self.lengths)] * len(scored)
        self.lengths.append(len(scored))


def position_tensor(positions: Sequence[Any]) -> Tensor:
    """Positions (or rows of them) as int64, or as float32 where one is fractional."""
    tensor = torch.tensor(positions, dtype=torch.float64)
    whole = bool((tensor == tensor.trunc()).all())
    return tensor.to(torch.long if whole else torch.float32)


def pack(examples: Sequence[Example], indices: Sequence[int] | None = None) -> PackedBatch:
    """Pack examples (those at `indices`, by default all) into one row."""
    indices = list(range(len(examples))) if indices is None else list(indices)
    chosen = [examples[index] for index in indices]
    row = _Row()
    for number, example in enumerate(chosen):
        row.add(number, example)
    values: dict[str, list[float]] = {name: [] for e in chosen for name in e.completion_values}
    token_values: dict[str, list[float]] = {name: [] for e in chosen for name in e.token_values}
    for example in chosen:
        for name, items in values.items():
            items += example.completion_values[name]
        for name, items in token_values.items():
            for per_token in example.token_values[name]:
                items += per_token
    return PackedBatch(
        input_ids=torch.tensor(row.ids),
        position_ids=position_tensor(row.positions),
        tiles=torch.cat([example.tiles for example in chosen]),
        image_positions=torch.tensor(row.image_positions, dtype=torch.long),
        layout=build_layout(row.segments, len(row.ids)),
        sources=torch.tensor(row.sources, dtype=torch.long),
        targets=torch.tensor(row.targets, dtype=torch.long),
        completion_of_token=torch.tensor(row.completion_of_token, dtype=torch.long),
        example_of_completion=torch.tensor(row.example_of_completion, dtype=torch.long),
        lengths=torch.tensor(row.lengths, dtype=torch.long),
        completion_values={name: torch.tensor(items) for name, items in values.items()},
        token_values={name: torch.tensor(items) for name, items in token_values.items()},
        example_index=torch.tensor(indices, dtype=torch.long),
        vision_features=_cat_features(chosen),
        tile_keys=torch.cat([tile_keys(e.draw, e.num_tiles) for e in chosen]),
    )


def tile_keys(draw: int, tiles: int) -> Tensor:
    """A key for each tile of a sample: int64 [tiles]; the product and the sum wrap around."""
    numbers = torch.arange(tiles, dtype=torch.long)
    return numbers * 0x632BE59BD9B4E019 + draw


def _cat_features(examples: Sequence[Example]) -> Tensor | None:
    given = [e.vision_features for e in examples if e.vision_features is not None]
    assert len(given) in (0, len(examples)), "features of all examples of a row, or of none"
    return torch.cat(given) if given else None


def filler(names: Sequence[str], token_names: Sequence[str], tile_shape: torch.Size) -> PackedBatch:
    """The micro-batch of a rank that has none left: one token, no completion, no image.

    names, token_names: the values that real batches of this step carry. tile_shape: [3, H, W].
    """
    none = torch.zeros(0, dtype=torch.long)
    return PackedBatch(
        input_ids=torch.zeros(1, dtype=torch.long),
        position_ids=torch.zeros(1, dtype=torch.long),
        tiles=torch.zeros((0, *tile_shape), dtype=torch.uint8),
        image_positions=none,
        layout=build_layout([Segment(0, 0, 0, 1)], 1),
        sources=none,
        targets=none,
        completion_of_token=none,
        example_of_completion=none,
        lengths=none,
        completion_values={name: torch.zeros(0) for name in names},
        token_values={name: torch.zeros(0) for name in token_names},
        example_index=none,
        real=False,
    )
