"""`load_ranker`: open the ranker of a folder or hub name, of any kind, and score rows with it."""

from __future__ import annotations

import dataclasses
import json
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from pile_fast.data.collator import BiEncoderCollator, CrossEncoderCollator, FeatureCollator
from pile_fast.data.rows import groups
from pile_fast.students.bi_encoder import BiEncoder, BiEncoderConfig, first_layers, is_bi_encoder
from pile_fast.students.features import FeatureRanker, FeatureRankerConfig

KINDS = ("features", "cross-encoder", "bi-encoder")
# Texts are sorted by length within this many passes: enough to waste little padding, few enough to keep in memory.
_PASSES_AT_ONCE = 32
# What transformers' models call a table of positions.
_POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe", "char_position_embeddings")
# A tokenizer that knows no limit says 10^30.
_NO_LIMIT = 10**9
_SECONDS_TO_REACH_HUB = 10


@dataclasses.dataclass(frozen=True)
class Ranker:
    """A model that scores the documents of a query, with its tokenizer. `load_ranker` makes one.

    Attributes:
        kind: "features", "cross-encoder" or "bi-encoder".
        name: where it was loaded from.
        model: in evaluation mode, on its device.
        collator: from rows to the model's inputs.
    """

    kind: str
    name: str
    model: PreTrainedModel
    collator: Callable[[Sequence[dict]], dict]

    @torch.no_grad()
    def score(self, rows: Sequence[dict[str, Any]], *, batch_size: int = 64) -> list[Tensor]:
        """Logits of rows' documents, one (n,) float32 tensor on the CPU per row.

        Args:
            rows: dicts with `query` and `documents`, or `features` for a `FeatureRanker`; see docs/data.md.
            batch_size: texts per pass of the encoder. Texts of like length share one, so a text's logit does not depend
                on the others but for rounding.

        Raises:
            ValueError: a row lacks what the ranker needs; the message names the query.
        """
        from pile_fast.students.gradient_cache import forward_in_passes

        scores: list[Tensor] = []
        for group in groups(rows, batch_size * _PASSES_AT_ONCE):
            inputs = self.collator(group)
            lengths = inputs.pop("labels")["cu_seqlens"].diff().tolist()
            inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
            logits = forward_in_passes(self.model, inputs, batch_size)
            scores += logits.float().cpu().split(lengths)
        return scores


def load_ranker(
    name_or_path: str | Path,
    *,
    kind: str | None = None,
    max_length: int | None = None,
    device: torch.device | str | None = None,
) -> Ranker:
    """Load a ranker from a folder or from the Hugging Face hub.

    A bi-encoder is a saved `BiEncoder`, a sentence-transformers folder (its pooling is read) or any plain `AutoModel` (mean
    pooling); the latter two score with the cosine itself.

    Args:
        name_or_path: folder or hub name.
        kind: "features", "cross-encoder" or "bi-encoder"; None = what the model's configuration says: a model for
            sequence classification is a cross-encoder, any other text model a bi-encoder.
        max_length: tokens per text (pair of texts for a cross-encoder), more are cut off; None = what the model, its tokenizer
            and a sentence-transformers folder allow.
        device: None = the GPU if there is one.

    Raises:
        OSError: there is no such model, or the hub cannot be reached.
        ValueError: it is no ranker of that kind: the message says why.

    >>> import tempfile
    >>> from pile_fast.students import FeatureRanker, FeatureRankerConfig, load_ranker
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     FeatureRanker(FeatureRankerConfig(num_features=2, hidden_sizes=())).save_pretrained(folder)
    ...     ranker = load_ranker(folder)
    >>> [scores.shape for scores in ranker.score([{"query_id": "q1", "features": [[0.0, 1.0], [1.0, 0.0]]}])]
    [torch.Size([2])]
    """
    name = str(name_or_path)
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(map(repr, KINDS))} or None, got {kind!r}")
    config = model_config(name)
    found = _kind(config)
    if kind is None:
        kind = found
    elif (kind == "features") != (found == "features"):
        raise ValueError(f"{name}: this is a {found} model, not a {kind} one")
    model: PreTrainedModel
    collator: Callable[[Sequence[dict]], dict]
    if kind == "features":
        model, collator = FeatureRanker.from_pretrained(name), FeatureCollator()
    elif kind == "cross-encoder":
        model = load_cross_encoder(name, trained=True)
        collator = CrossEncoderCollator(*load_tokenizer(name, model, max_length))
    else:
        model = load_bi_encoder(name, scale=None if is_bi_encoder(config) else 1.0)
        collator = BiEncoderCollator(*load_tokenizer(name, model, max_length))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Ranker(kind, name, model.eval().to(device), collator)


def model_config(name: str) -> dict[str, Any]:
    """The configuration of a folder or hub name as it is stored.

    Raises:
        OSError: there is none, with the reason in one line.
    """
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(f"{name}: no model in this folder, it has no config.json")
    try:
        _reach_hub(name)
        config = json.loads(Path(str(cached_file(name, "config.json"))).read_text())
    except OSError as error:
        reason = str(error).split("\n")[0]
        raise OSError(f"{name}: no such folder, and could not be loaded from the Hugging Face hub: {reason}") from error
    if "model_type" not in config:
        raise ValueError(f"{name}: its config.json names no model_type")
    return config


def _reach_hub(name: str) -> None:
    """Ask once whether the hub can be reached for a model that is not here yet: its library would ask for half a minute.

    Raises:
        OSError: it cannot.
    """
    if Path(name).is_dir() or constants.HF_HUB_OFFLINE:
        return
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        request = urllib.request.Request(hf_hub_url(name, "config.json"), method="HEAD")
    except HFValidationError:  # `cached_file` says it better
        return
    try:
        urllib.request.urlopen(request, timeout=_SECONDS_TO_REACH_HUB).close()
    except urllib.error.HTTPError:  # it answered
        return
    except OSError as error:
        reason = getattr(error, "reason", error)
        if not isinstance(reason, ssl.SSLError):  # the library may know other certificates
            raise OSError(f"cannot reach {urllib.parse.urlsplit(request.full_url).netloc} ({reason})") from error


def _kind(config: dict[str, Any]) -> str:
    if config["model_type"] == FeatureRankerConfig.model_type:
        return "features"
    classifier = any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ())
    return "cross-encoder" if classifier else "bi-encoder"


def load_cross_encoder(name: str, *, trained: bool, num_layers: int | None = None) -> PreTrainedModel:
    """A sequence classifier with one output.

    Args:
        name: folder or hub name.
        trained: its head must be there too; else a missing head is a new one, to be trained.
        num_layers: keep the encoder's first layers only.

    Raises:
        ValueError: it has several outputs, or no trained head where one is needed.
    """
    config = model_config(name)
    if is_bi_encoder(config):
        raise ValueError(f"{name}: this is a bi-encoder, which cannot be loaded as a cross-encoder")
    if _kind(config) == "cross-encoder" and (outputs := _outputs(config)) != 1:
        raise ValueError(f"{name}: a ranker needs a cross-encoder with one output, this one has {outputs}")
    layers = first_layers(name, num_layers)
    model, report = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, output_loading_info=True, **layers)
    if trained and report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"]))
        raise ValueError(f"{name}: not a trained cross-encoder, the weights lack {missing}")
    serve_logits(model)
    return model


def serve_logits(model: torch.nn.Module) -> None:
    """Have sentence-transformers' `CrossEncoder` predict a saved cross-encoder's logits, on which it was trained, not their
    sigmoid. Other models are left alone."""
    config = getattr(model, "config", None)
    own = (BiEncoderConfig.model_type, FeatureRankerConfig.model_type)
    if isinstance(config, PretrainedConfig) and config.model_type not in own:
        config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}


def _outputs(config: dict[str, Any]) -> int:
    # As transformers reads it: without either entry there are two.
    return len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)


def load_bi_encoder(name: str, *, num_layers: int | None = None, **options: Any) -> BiEncoder:
    """A saved `BiEncoder`, or one started from an encoder.

    Args:
        name: folder or hub name.
        num_layers: keep the encoder's first layers only.
        **options: pooling, similarity and scale; None = as saved, or `BiEncoder.from_encoder`'s.
    """
    options = {name: value for name, value in options.items() if value is not None}
    if not is_bi_encoder(model_config(name)):
        return BiEncoder.from_encoder(name, num_layers=num_layers, **options)
    saved = BiEncoderConfig.from_pretrained(name).to_dict()
    saved["encoder"] |= first_layers(name, num_layers)
    return BiEncoder.from_pretrained(name, config=BiEncoderConfig(**saved | options))


def load_tokenizer(name: str, model: PreTrainedModel, max_length: int | None) -> tuple[PreTrainedTokenizerBase, int | None]:
    """(tokenizer, tokens per text: `max_length`, or else what the model takes at most; None if there is no known limit).

    Raises:
        ValueError: the model has fewer positions than `max_length`, or its special tokens leave no room.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    limits = [longest_text(tokenizer, model)]
    settings = Path(name) / "sentence_bert_config.json"
    if settings.is_file():
        limits.append(json.loads(settings.read_text()).get("max_seq_length"))
    length = min((limit for limit in limits if limit is not None), default=None)
    if max_length is not None:
        pair = not isinstance(model, BiEncoder)
        least = tokenizer.num_special_tokens_to_add(pair) + 1 + pair  # below it a tokenizer cuts nothing off
        if max_length < least:
            raise ValueError(f"max_length: expected at least {least}, to read one token of each text, got {max_length}")
        positions = positions_of(model)
        if positions is not None and max_length > positions:
            raise ValueError(f"max_length: expected at most {positions}, the positions that {name} has, got {max_length}")
        length = max_length
    if length is not None:
        tokenizer.model_max_length = length  # saved with it, so that the next to load the model cuts texts there too
    return tokenizer, length


def longest_text(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int | None:
    """Tokens that a tokenizer and its model take at most; None if neither knows a limit."""
    positions = positions_of(model)
    if positions is None:  # relative or rotary ones: it could take more than it was trained for
        positions = _positive(getattr(_config_of(model), "max_position_embeddings", None))
    length = min(tokenizer.model_max_length, positions or _NO_LIMIT)
    return length if length < _NO_LIMIT else None


def positions_of(model: PreTrainedModel) -> int | None:
    """Tokens that a model has positions for, where it looks each up in a table; None = it has no such table.

    RoBERTa and its family (XLM-R, CamemBERT, MPNet, Longformer, ...) number positions from the padding's index + 1 on, so the
    first rows of their table stand for no token: 512 of 514.
    """
    limits = []
    for name, module in model.named_modules():
        table = getattr(module, "weight", None)
        if name.rsplit(".", 1)[-1] in _POSITION_TABLES and isinstance(table, Tensor):
            padding = getattr(module, "padding_idx", None)
            limits.append(table.shape[0] - (0 if padding is None else padding + 1))
    if limits and (stated := _positive(getattr(_config_of(model), "max_position_embeddings", None))):
        limits.append(stated)  # BART and others have rows to spare
    return min(limits, default=None)


def _config_of(model: PreTrainedModel) -> PretrainedConfig:
    return getattr(model.config, "encoder", model.config)


def _positive(limit: int | None) -> int | None:
    return limit if isinstance(limit, int) and limit > 0 else None
