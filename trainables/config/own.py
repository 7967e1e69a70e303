"""What a user's own file derives its values from: each class says what a function is given and returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from trainables.config import reply_metrics, schedules, terms
from trainables.config.extension import Extension, install
from trainables.config.layer_maps import LayerMap, Pairs, layer_pairs

if TYPE_CHECKING:
    from torch import Tensor

OwnSchedule = schedules.OwnSchedule
ReplyScore = reply_metrics.ReplyScore


class LogitLoss(terms.OwnTerm):
    """A flow at the logits of supervised positions."""

    def loss(self, from_NV: Tensor, to_NV: Tensor) -> Tensor:
        """Returns the loss, summed over the N positions; `from` is detached already."""
        raise NotImplementedError

    def total(self, source: Any, to: Any, labels_or_mask: Any) -> Any:
        return self.loss(source.detach(), to)


class HiddenLoss(terms.OwnTerm):
    """A flow between hidden states of layers, paired by `layers`; the mean over the pairs."""

    inputs = "hidden_states"

    layers: LayerMap = "even"  # even, last, uniform, top, or pairs [from, to]; 0: the embeddings
    projector: bool = False  # a learnt matrix takes the states of `to` to the width of `from`

    @property
    def has_projector(self) -> bool:
        return self.projector

    def layer_pairs(self, num_from: int, num_to: int) -> Pairs:
        return layer_pairs(self.layers, num_from, num_to)

    def loss(self, from_BTD: Tensor, to_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Returns the loss of a pair of layers, summed over the tokens (mask 1); `from` is detached already."""
        raise NotImplementedError

    def total(self, source: Any, to: Any, labels_or_mask: Any) -> Any:
        mask_BT = to[0].new_ones(to[0].shape[:2]) if labels_or_mask is None else labels_or_mask
        pairs = zip(source, to, strict=True)
        return sum(self.loss(theirs.detach(), ours, mask_BT) for theirs, ours in pairs) / len(to)


def _kinds(members: Sequence[Any]) -> set[str]:
    return {get_args(member.model_fields["kind"].annotation)[0] for member in members}


def install_file(extension: Extension) -> None:
    """Installs a user's file in this process. Raises ExtensionError."""
    lists = (terms.Term, schedules.Schedule, reply_metrics.ReplyMetric)
    known = {"number", "rises_with_loss", "rougeL", "greedy_rougeL", "unfinished"}
    for union in lists:
        known |= _kinds(get_args(get_args(union)[0]))
    install(extension, taken=frozenset(known))
