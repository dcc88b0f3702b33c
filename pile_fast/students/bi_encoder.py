"""`BiEncoder`: one encoder for queries and documents, their similarity as the logit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from pile_fast.checks import choice, number
from pile_fast.students.features import no_loss_of_its_own

POOLINGS = ("mean", "cls")
SIMILARITIES = ("cosine", "dot")
# The entry of a saved student's config.json, which otherwise is the encoder's own, that makes it a BiEncoder.
_SETTINGS = "pile_fast"
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class BiEncoderConfig(PretrainedConfig):
    """Configuration of `BiEncoder`.

    Args:
        encoder: the encoder's own configuration, or its dict.
        pooling: a text's embedding: the "mean" of its tokens' last hidden states, or the first token's ("cls").
        similarity: "cosine" (embeddings are normalised), or "dot".
        scale: factor on the similarity. Cosines lie in [-1, 1], too close together for a pairwise loss; 20 is what
            sentence-transformers trains with.
    """

    model_type = "pile_fast_bi_encoder"
    sub_configs = {"encoder": AutoConfig}
    has_no_defaults_at_init = True

    def __init__(
        self,
        encoder: PretrainedConfig | dict | None = None,
        pooling: str = "mean",
        similarity: str = "cosine",
        scale: float = 20.0,
        **kwargs: Any,
    ):
        if isinstance(encoder, dict):
            encoder = AutoConfig.for_model(**encoder)
        self.encoder = encoder
        self.pooling = choice("pooling", pooling, POOLINGS)
        self.similarity = choice("similarity", similarity, SIMILARITIES)
        self.scale = number("scale", scale, low=0.0, open_low=True)
        super().__init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict, dict]:
        """The stored configuration, with the encoder's own and these settings apart."""
        stored, kwargs = super().get_config_dict(*args, **kwargs)
        if settings := stored.pop(_SETTINGS, None):
            stored = {"model_type": cls.model_type, "encoder": stored, **settings}
        return stored, kwargs


class BiEncoder(PreTrainedModel):
    """A ranker that embeds queries and documents separately, so that a document's embedding can be stored.

    `from_encoder` starts one from any `AutoModel`; `save_pretrained` and `from_pretrained` keep all of it. What is saved is a
    sentence-transformers folder: ``SentenceTransformer(folder)`` gives the same embeddings, `AutoModel` the encoder.

    >>> from transformers import BertConfig
    >>> encoder = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    >>> model = BiEncoder(BiEncoderConfig(encoder))
    >>> texts = torch.tensor([[2, 7, 9, 3], [2, 11, 3, 0]])
    >>> model.embed(texts, attention_mask=(texts > 0).long()).shape
    torch.Size([2, 8])
    """

    config: BiEncoderConfig
    config_class = BiEncoderConfig
    base_model_prefix = "encoder"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True

    def __init__(self, config: BiEncoderConfig):
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """The encoder initialises its own modules; there are no others."""

    @classmethod
    def from_encoder(
        cls,
        name_or_path: str | Path,
        *,
        pooling: str | None = None,
        similarity: str = "cosine",
        scale: float = 20.0,
        num_layers: int | None = None,
    ) -> BiEncoder:
        """Start from a pretrained encoder: a folder or hub name of an `AutoModel`, or a sentence-transformers folder.

        Args:
            name_or_path: the encoder.
            pooling: None = what a sentence-transformers folder says, else "mean".
            similarity, scale: see `BiEncoderConfig`.
            num_layers: keep the encoder's first layers only.

        Raises:
            ValueError: an option does not fit, or the folder has a module that a `BiEncoder` does not.
            OSError: there is no such model.
        """
        pooling = pooling or _sentence_transformers_pooling(Path(name_or_path)) or "mean"
        encoder = AutoModel.from_pretrained(name_or_path, **first_layers(name_or_path, num_layers))
        model = cls(BiEncoderConfig(encoder.config, pooling, similarity, scale))
        model.encoder = encoder
        return model

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name_or_path: str | Path, *args: Any, config: BiEncoderConfig | None = None, **kwargs: Any
    ) -> BiEncoder:
        """Load a saved `BiEncoder`; further arguments are those of `AutoModel.from_pretrained`."""
        hub = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        stored, _ = PretrainedConfig.get_config_dict(name_or_path, **hub)
        if _SETTINGS not in stored:  # the layout of before, under names of its own
            return super().from_pretrained(name_or_path, *args, config=config, **kwargs)
        config = config or BiEncoderConfig.from_pretrained(name_or_path, **hub)
        model = cls(config)
        model.encoder = AutoModel.from_pretrained(name_or_path, *args, config=config.encoder, **kwargs)
        return model.eval()

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as a sentence-transformers folder, the scale in its config.json.

        Raises:
            ValueError: `push_to_hub` is set; the method of that name uploads all of the folder.
        """
        if push_to_hub:
            raise ValueError("push_to_hub: expected False, got True; call the model's push_to_hub(repo_id)")
        weights = self.state_dict() if state_dict is None else state_dict
        weights = {name.removeprefix("encoder."): tensor for name, tensor in weights.items()}
        config = self.encoder.config
        settings = {name: getattr(self.config, name) for name in ("pooling", "similarity", "scale")}
        setattr(config, _SETTINGS, settings)
        try:
            self.encoder.save_pretrained(save_directory, is_main_process=is_main_process, state_dict=weights, **kwargs)
        finally:
            delattr(config, _SETTINGS)
        if is_main_process:
            for name, content in _sentence_transformers_files(self.config, config.hidden_size).items():
                path = Path(save_directory) / name
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps(content, indent=2) + "\n")

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Takes the names of `save_pretrained` too, which are the encoder's: a Trainer resumes from such a file."""
        if state_dict.keys() <= self.encoder.state_dict().keys():
            state_dict = {f"encoder.{name}": tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(state_dict, strict, assign)

    def embed(self, input_ids: Tensor, attention_mask: Tensor, **tokens: Tensor) -> Tensor:
        """Embeddings (texts, hidden), float32, of tokenised texts (texts, length)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **tokens).last_hidden_state.float()
        if self.config.pooling == "cls":
            embeddings = hidden[:, 0]
        else:
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            embeddings = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(embeddings, dim=-1) if self.config.similarity == "cosine" else embeddings

    def compare(self, queries: Tensor, documents: Tensor, query_index: Tensor) -> Tensor:
        """Logits (D,) of embeddings (Q, hidden) and (D, hidden), `query_index` (D,) saying whose each document is."""
        return self.config.scale * (queries[query_index] * documents).sum(-1)

    def forward(
        self, query_index: Tensor | None = None, labels: object | None = None, **tokens: Tensor
    ) -> SequenceClassifierOutput | Tensor:
        """Logits (D,) of D documents for Q queries.

        Args:
            query_index: (D,) int64, the query of each document. None: embed the texts, nothing else.
            labels: only named, see `FeatureRanker.forward`.
            **tokens: the tokenizer's tensors (D, length) for the documents and, with names that begin with "query_",
                (Q, query length) for the queries.
        """
        no_loss_of_its_own(labels)
        if query_index is None:
            return self.embed(**tokens)
        queries, documents = self.split_tokens(tokens)
        return SequenceClassifierOutput(logits=self.compare(self.embed(**queries), self.embed(**documents), query_index))

    @staticmethod
    def split_tokens(tokens: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(the queries' tensors, the documents') under the tokenizer's own names."""
        queries = {name.removeprefix("query_"): t for name, t in tokens.items() if name.startswith("query_")}
        return queries, {name: t for name, t in tokens.items() if not name.startswith("query_")}


def first_layers(name_or_path: str | Path, num_layers: int | None) -> dict[str, int]:
    """The keywords of `from_pretrained` that keep a model's first layers; None keeps all.

    Raises:
        ValueError: it has fewer.
    """
    if num_layers is None:
        return {}
    config = AutoConfig.from_pretrained(name_or_path)
    layers = getattr(config, "encoder", config).num_hidden_layers
    if not 1 <= num_layers <= layers:
        raise ValueError(f"{name_or_path}: has {layers} layers, of which the first {num_layers} cannot be kept")
    return {"num_hidden_layers": num_layers}


AutoConfig.register(BiEncoderConfig.model_type, BiEncoderConfig, exist_ok=True)
AutoModel.register(BiEncoderConfig, BiEncoder, exist_ok=True)


def is_bi_encoder(config: dict) -> bool:
    """Whether a stored configuration is a saved `BiEncoder`'s."""
    return _SETTINGS in config or config["model_type"] == BiEncoderConfig.model_type


def _sentence_transformers_files(config: BiEncoderConfig, hidden_size: int) -> dict[str, object]:
    """What makes an encoder's folder one of sentence-transformers: names and content, as all its versions read them."""
    modules = ["Transformer", "Pooling"] + ["Normalize"] * (config.similarity == "cosine")
    return {
        "modules.json": [
            {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
            for i, kind in enumerate(modules)
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": hidden_size,
            "pooling_mode_cls_token": config.pooling == "cls",
            "pooling_mode_mean_tokens": config.pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
        # The tokenizer's files say how long a text may be.
        "sentence_bert_config.json": {"max_seq_length": None, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": config.similarity,
        },
    }


def _sentence_transformers_pooling(folder: Path) -> str | None:
    """The pooling of a sentence-transformers folder, None for any other."""
    modules = folder / "modules.json"
    if not modules.is_file():
        return None
    pooling = None
    for module in json.loads(modules.read_text()):
        kind = module["type"].rsplit(".", 1)[-1]
        if kind == "Pooling":
            settings = json.loads((folder / module["path"] / "config.json").read_text())
            named: Any = settings.get("pooling_mode") or [
                name for name, key in (("mean", "pooling_mode_mean_tokens"), ("cls", "pooling_mode_cls_token"))
                if settings.get(key)
            ]  # fmt: skip
            pooling = named[0] if isinstance(named, list) and len(named) == 1 else named
            if pooling not in POOLINGS:
                raise ValueError(f"{folder / module['path']}: expected 'mean' or 'cls' pooling, got {settings}")
        elif kind not in ("Transformer", "Normalize"):
            raise ValueError(f"{modules}: a BiEncoder has no module {module['type']!r}")
    return pooling
