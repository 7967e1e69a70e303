"""Metrics of supervised tokens: losses in nats, accuracies, and the agreement with another model."""

from __future__ import annotations

from trainables.metrics.metric import Examples, Metric, of_sums, ratio


def _loss(examples: Examples) -> float:
    return float(examples.loss_E.sum() / examples.count_E.sum())


_left_out = of_sums(lambda examples: (examples.loss_E, examples.count_E), ratio)
MLM_LOSS = Metric("mlm_loss", "cross-entropy of masked tokens, nats", "lower", None, ("loss", "count"), _loss,
                  _left_out)  # fmt: skip
LM_LOSS = Metric("lm_loss", "cross-entropy of the next token, nats", "lower", None, ("loss", "count"), _loss,
                 _left_out)  # fmt: skip
TASK_LOSS = Metric(
    "task_loss", "cross-entropy of labels in nats, or squared error of numbers", "lower", None, ("loss", "count"), _loss,
    _left_out,
)  # fmt: skip
MLM_ACCURACY = Metric("mlm_accuracy", "masked tokens predicted right, %", "higher", (0.0, 100.0))
LM_ACCURACY = Metric("lm_accuracy", "next tokens predicted right, %", "higher", (0.0, 100.0))
AGREEMENT = Metric(
    "agreement", "tokens of which both models find the same one likeliest, %", "higher", (0.0, 100.0), beside_model=True
)
KL = Metric("kl", "KL(other model || model), nats per token", "lower", beside_model=True)
