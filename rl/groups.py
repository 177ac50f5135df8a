"""Groups to Examples: who takes part in the loss, and what of a question is made only once.

A frozen vision tower sees each image once a rollout batch: what it makes of a question's tiles is
kept on the CPU until the next one, and read by every pass and every mini-step. That takes, per tile
of the rollout batch on this rank, visual tokens x 4 x the tower's width numbers (2 MiB for
InternVL3 in bfloat16: 16 questions of 13 tiles are 0.4 GiB); the tiles themselves are not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from internvl.checkpoint import checksum
from internvl.data import Row
from internvl.encoding import Encoder
from internvl.errors import UserError
from internvl.packing import Example, PackedBatch
from rl.losses import Objective
from rl.rollouts import Group


class GroupEncoder:
    """Makes Examples of groups.

    vision: uint8 tiles [X, 3, H, W] to the frozen tower's features on the CPU, or None where the
    tower learns. mask_truncated: whether a completion that was cut takes no part.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        encoder: Encoder,
        objective: Objective,
        *,
        mask_truncated: bool,
        vision: Callable[[Tensor], Tensor] | None,
    ):
        self.rows = rows
        self.encoder = encoder
        self.every_group_counts = objective.every_group_counts
        self.with_reference = objective.beta != 0.0
        self.mask_truncated = mask_truncated
        self.vision = vision
        self._prompts: dict[int, Example] = {}

    def forget(self) -> None:
        """Drop what was kept of the rollout batch before."""
        self._prompts.clear()

    def taking_part(self, group: Group) -> list[int]:
        """The completions whose tokens are not masked; their places in the group."""
        every = range(len(group.completions))
        return [i for i in every if not (self.mask_truncated and group.clipped[i])]

    def carries_gradient(self, group: Group) -> bool:
        """Whether the group's completions have any; one that has none need not be run."""
        places = self.taking_part(group)
        return any(self.every_group_counts or group.advantages[place] for place in places)

    def tokens(self, groups: Sequence[Group]) -> int:
        """Unmasked tokens of groups."""
        return sum(len(g.completions[place]) for g in groups for place in self.taking_part(g))

    def example(self, group: Group) -> Example:
        """A group as one prompt with the completions that take part.

        Log-probabilities that are not there are NaN: this step's own forward brings them.
        """
        places = self.taking_part(group)

        def of(values: list[list[float]] | None) -> list[list[float]]:
            missing = [[float("nan")] * len(ids) for ids in group.completions]
            return [(values or missing)[place] for place in places]

        stored = {
            "sampler_logprobs": of(group.sampler_logprobs),
            "old_logprobs": of(group.old_logprobs),
        }
        if self.with_reference:
            stored["ref_logprobs"] = of(group.ref_logprobs)
        return replace(
            self._prompt(group.question),
            completions=[group.completions[place] for place in places],
            completion_values={"advantages": [group.advantages[place] for place in places]},
            token_values=stored,
        )

    def keep(
        self, groups: Sequence[Group], batch: PackedBatch, logprobs: Tensor, name: str
    ) -> None:
        """Write a micro-batch's log-probabilities into the groups that it was packed from."""
        by_completion = iter(logprobs.split(batch.lengths.tolist()))
        for index in batch.example_index.tolist():
            group = groups[index]
            values: list[list[float]] = [[] for _ in group.completions]
            for place in self.taking_part(group):
                values[place] = next(by_completion).tolist()
            setattr(group, name, values)

    def _prompt(self, question: int) -> Example:
        if question in self._prompts:
            return self._prompts[question]
        prompt = self.encoder.completions(self.rows[question], [])
        if self.vision is not None:
            # one question at a time: its features must not depend on which others came with it
            features = self.vision(prompt.tiles)
            prompt = replace(prompt, tiles=prompt.tiles[:0].clone(), vision_features=features)
            self._prompts[question] = prompt
        return prompt


class StartWeights:
    """The weights that the stage starts from: what the KL term refers to.

    Only what is trained is kept, on the CPU, and put in the model's place for one pass a rollout
    batch: an adapter that is new is then an adapter switched off, one that was trained before is
    the previous stage's, and full training needs no second model on the device (but host memory
    for two copies of the weights).
    """

    def __init__(self, model: nn.Module):
        self._saved = {name: _on_cpu(p) for name, p in _trained(model)}
        self.checksum = checksum(self._saved.items())

    def refuse_other(self, told: str | None) -> None:
        """Raise `UserError` where a checkpoint tells of other weights that its run began with."""
        if told not in (None, self.checksum):
            raise UserError(
                "its checkpoint was made by a run that began with other weights, to which beta "
                "refers: go back to that model_name_or_path, or choose another output_dir"
            )

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """While open, the model has the weights of the start."""
        now = {name: _on_cpu(parameter) for name, parameter in _trained(model)}
        _put(model, self._saved)
        try:
            yield
        finally:
            _put(model, now)


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _on_cpu(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().to("cpu", copy=True)


@torch.no_grad()
def _put(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, parameter in _trained(model):
        parameter.copy_(weights[name])
