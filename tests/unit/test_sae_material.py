"""From texts to a sparse autoencoder with its card: what is read, what is kept, what is measured."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from probes.artifact import ArtifactError
from probes.card import Format, ModelRef
from probes.fit.reading.rendered import Rendered
from probes.fit.rows.wheels import WheelStore
from probes.fit.sources import SourceContext, evals_code, evals_exams, evals_texts, parse_source
from probes.modelref import read_model_ref
from probes.sae.file import load_sae
from probes.sae.sae import Activation, Sae
from probes.sae.train.config import SaeConfigError, read_config
from probes.sae.train.corpus import CorpusError, CorpusSettings, build_corpus
from probes.sae.train.export import exported
from probes.sae.train.material import MaterialError, collected_material
from probes.sae.train.random_directions import random_directions
from probes.sae.train.reading import ReadingError, RowReader, leading_sinks
from probes.sae.train.reconstruction import measure_reconstruction
from probes.sae.train.rows import RowPool
from probes.sae.train.settings import TrainingSettings
from probes.sae.train.spliced import SplicedModel
from probes.sae.train.train import SaeTrainingError, evaluate_file, train_sae
from probes.sae.train.trainer import train_autoencoder
from probes.taps import Tap
from tests.support.made_wheels import context_with
from tests.support.words import D_MODEL, WORDS, activations_by_hooks

TAP = Tap(1)


class Silent:
    def say(self, text: str) -> None:
        pass

    def advance(self, label: str, done: int, total: int, note: str = "") -> None:
        pass
