"""The closed list of metrics by which models are compared."""

from __future__ import annotations

from trainables.config import extension
from trainables.config.reply_metrics import ReplyScore
from trainables.metrics.language import AGREEMENT, KL, LM_ACCURACY, LM_LOSS, MLM_ACCURACY, MLM_LOSS, TASK_LOSS
from trainables.metrics.metric import Metric
from trainables.metrics.replies import NAMED_BY_DATA, metric_of_replies
from trainables.metrics.rouge import GREEDY_ROUGE_L, ROUGE_L, UNFINISHED
from trainables.metrics.task_metrics import ACCURACY, F1, MATTHEWS, PEARSON, SPEARMAN
from trainables.metrics.task_scores import SCORE

OF_REPLIES = (LM_LOSS, LM_ACCURACY, ROUGE_L, GREEDY_ROUGE_L, UNFINISHED)  # of each data set; a data set may name more
OF_OTHER_MODELS = (AGREEMENT, KL)
OF_SCORES = (ACCURACY, F1, MATTHEWS, PEARSON, SPEARMAN)  # a task records only those of its own rule
OF_TOKENS = (MLM_LOSS, MLM_ACCURACY, LM_LOSS, LM_ACCURACY)
LOSSES = (MLM_LOSS, LM_LOSS, TASK_LOSS)
METRICS = (MLM_LOSS, LM_LOSS, TASK_LOSS, MLM_ACCURACY, LM_ACCURACY, ROUGE_L, GREEDY_ROUGE_L, UNFINISHED, *NAMED_BY_DATA,
           AGREEMENT, KL, SCORE, *OF_SCORES)  # fmt: skip


def metric_named(name: str) -> Metric:
    """Finds the metric that tables call `name`. Raises ValueError where there is none."""
    for metric in METRICS:
        if metric.is_recorded_as(name):
            return metric
    if (own := extension.examples(ReplyScore).get(name)) is not None:
        return metric_of_replies(name, own.words)
    known = ", ".join(f"MODEL_{metric.name}" if metric.beside_model else metric.name for metric in METRICS)
    raise ValueError(f"unknown metric {name!r}; known metrics: {known}")
