"""What stands beside a detector in every report, and which of it a report may not lack."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["MODEL_CONTROLS", "REQUIRED", "TEXT_PEERS", "TRIVIAL", "Control"]


class Control(StrEnum):
    """Scorers that do not look inside the model, and probes that cannot know anything."""

    TF_IDF = "tf_idf"
    """Words (1-2) and characters (3-5), logistic regression, trained on the detector's rows."""
    SENTENCE_EMBEDDING = "sentence_embedding"
    """A sentence embedding by a small model of its own, logistic regression, trained on the detector's rows."""
    BAG_OF_EMBEDDINGS = "bag_of_embeddings"
    """The mean of the served model's own input embeddings (no context), logistic regression, trained likewise."""
    LENGTH_ONLY = "length_only"
    """Characters, in the direction that suits them better on these very rows."""
    QUESTION_MARK_ONLY = "question_mark_only"
    """Whether the text ends with one, likewise."""
    SHUFFLED_LABELS = "shuffled_labels"
    """The detector's own fit on permuted labels (Hewitt and Liang, 2019)."""
    RANDOM_DIRECTION = "random_direction"
    """Random directions at the detector's tap."""
    RANDOM_INIT = "random_init"
    """The detector's own fit on a model of the same architecture with random weights (Zhang and Bowman, 2018)."""


TEXT_PEERS = (Control.TF_IDF, Control.SENTENCE_EMBEDDING, Control.BAG_OF_EMBEDDINGS)
TRIVIAL = (Control.LENGTH_ONLY, Control.QUESTION_MARK_ONLY)
MODEL_CONTROLS = (Control.SHUFFLED_LABELS, Control.RANDOM_DIRECTION, Control.RANDOM_INIT)
REQUIRED: tuple[tuple[Control, ...], ...] = (
    (Control.TF_IDF,),
    (Control.SENTENCE_EMBEDDING, Control.BAG_OF_EMBEDDINGS),
    *((control,) for control in (*TRIVIAL, *MODEL_CONTROLS)),
)
"""One of each group."""
