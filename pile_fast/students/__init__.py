"""Rankers as Hugging Face models, students and teachers alike: saving, loading, scoring.

- `FeatureRanker`: a multi-layer perceptron on documents' features;
- a cross-encoder: any `AutoModelForSequenceClassification` with one output;
- `BiEncoder`: any `AutoModel`, pooled, with the similarity of query and document as the logit.

`load_ranker` opens whichever a folder holds.
"""

from pile_fast.extras import needs_extra

with needs_extra("train"):  # each of the modules here imports it
    import transformers  # noqa: F401

from pile_fast.students.bi_encoder import BiEncoder, BiEncoderConfig
from pile_fast.students.features import FeatureRanker, FeatureRankerConfig
from pile_fast.students.ranker import KINDS, Ranker, load_ranker

__all__ = [
    "KINDS", "BiEncoder", "BiEncoderConfig", "FeatureRanker", "FeatureRankerConfig", "Ranker", "load_ranker",
]  # fmt: skip
