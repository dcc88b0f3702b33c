import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModel, PreTrainedModel

from pile_fast.data.collator import BiEncoderCollator
from pile_fast.students import KINDS, BiEncoder, FeatureRanker, FeatureRankerConfig, load_ranker

pytestmark = pytest.mark.usefixtures("one_thread")


def ranker(**config):
    torch.manual_seed(0)
    return FeatureRanker(FeatureRankerConfig(**{"num_features": 5, "hidden_sizes": (8, 4)} | config))


def test_logit_per_document():
    assert ranker()(torch.randn(7, 5)).shape == (7,)
    assert ranker(hidden_sizes=())(torch.randn(7, 5)).shape == (7,)
    assert ranker()(torch.randn(0, 5)).shape == (0,)


def test_save_and_load_round_trip_with_the_statistics(tmp_path):
    features = torch.randn(50, 5) * 3 + 7
    model = ranker(dropout=0.3).fit_standardization(features).eval()
    model.save_pretrained(tmp_path)
    again = FeatureRanker.from_pretrained(tmp_path)
    assert torch.equal(again.mean, model.mean) and torch.equal(again.scale, model.scale)
    assert torch.equal(again(features), model(features))  # dropout is off after loading
    assert (again.config.hidden_sizes, again.config.dropout) == ([8, 4], 0.3)


def test_standardisation_makes_scale_and_offset_of_the_features_irrelevant():
    features = torch.randn(200, 5)
    moved = features * torch.tensor([1, 10, 1e-3, 1e4, 2]) + torch.tensor([0, -5, 1, 1e5, 100.0])
    plain = ranker().eval().fit_standardization(features)
    other = ranker().eval().fit_standardization(moved)
    torch.testing.assert_close(other(moved), plain(features), rtol=1e-3, atol=1e-3)


def test_constant_feature_carries_nothing_but_does_no_harm():
    features = torch.randn(20, 5)
    features[:, 2] = 0.1  # its mean is not exact in floating point
    model = ranker().eval().fit_standardization(features)
    changed = features.clone()
    changed[:, 2] = 1e6
    assert torch.equal(model(changed), model(features)) and model(features).isfinite().all()


@pytest.mark.parametrize("shape", [(10, 4), (10,), (0, 5)])
def test_standardisation_names_what_does_not_fit(shape):
    with pytest.raises(ValueError, match=r"features: expected \(D, F\) = \(D, 5\), D > 0, got"):
        ranker().fit_standardization(torch.zeros(shape))


def test_statistics_are_not_trained():
    assert not {"mean", "scale"} & {name for name, _ in ranker().named_parameters()}


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def cosine(model, tokenizer, query, document):
    """By hand, one text at a time: no padding anywhere."""

    def embed(text):
        tokens = tokenizer(text, return_tensors="pt", truncation=True)
        embedding = model.eval()(**tokens).last_hidden_state[0].mean(0).detach()
        return embedding / embedding.norm()

    return float(embed(query) @ embed(document))


@pytest.mark.parametrize("kind", KINDS)
def test_kind_is_recognised_and_scores_do_not_depend_on_the_batch(tmp_path, kind, tiny_text_model, tiny_tokenizer, text_rows):
    if kind == "features":
        ranker().save_pretrained(tmp_path)
        rows = [{"query_id": str(n), "features": torch.randn(n, 5).tolist()} for n in (3, 1, 12)]
    else:
        save(tiny_text_model(kind), tiny_tokenizer, tmp_path)
        rows = text_rows(7)
    loaded = load_ranker(tmp_path)
    assert loaded.kind == kind and not loaded.model.training
    scores = loaded.score(rows)
    assert [len(s) for s in scores] == [len(row.get("documents") or row["features"]) for row in rows]
    assert all(s.dtype is torch.float32 and not s.requires_grad for s in scores)
    for batch_size in (1, 3):
        for one, other in zip(scores, loaded.score(rows, batch_size=batch_size), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for row, expected in zip(rows, scores, strict=True):
        torch.testing.assert_close(loaded.score([row])[0], expected, rtol=1e-4, atol=1e-5)
    assert torch.cat(scores).std() > 0


def test_cross_encoder_scores_are_the_model_s_logits(tmp_path, tiny_text_model, tiny_tokenizer, text_rows):
    model = tiny_text_model("cross-encoder").eval()
    loaded = load_ranker(save(model, tiny_tokenizer, tmp_path))
    (row,) = text_rows(1, documents=(4, 4))
    for document, score in zip(row["documents"], loaded.score([row])[0], strict=True):
        tokens = tiny_tokenizer(row["query"], document, return_tensors="pt", truncation=True)
        assert score.item() == pytest.approx(model(**tokens).logits.item(), abs=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_bi_encoder_round_trip(tmp_path, pooling, similarity, tiny_text_model, tiny_tokenizer, text_rows):
    model = tiny_text_model("bi-encoder", pooling=pooling, similarity=similarity, scale=7.0)
    loaded = load_ranker(save(model, tiny_tokenizer, tmp_path)).model
    assert (loaded.config.pooling, loaded.config.similarity, loaded.config.scale) == (pooling, similarity, 7.0)
    inputs = BiEncoderCollator(tiny_tokenizer)(text_rows(3))
    del inputs["labels"]
    assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)


# C7: a saved bi-encoder holds the encoder under its own names, so that other libraries read it.
def test_bi_encoder_folder_is_the_encoders(tmp_path, tiny_text_model, tiny_tokenizer, text_rows):
    model = tiny_text_model("bi-encoder", pooling="cls", scale=7.0)
    save(model, tiny_tokenizer, tmp_path)
    encoder = AutoModel.from_pretrained(tmp_path)
    assert type(encoder) is type(model.encoder)
    for name, weight in model.encoder.state_dict().items():
        assert torch.equal(weight, encoder.state_dict()[name])
    # What a Trainer does to resume, and to load the best checkpoint: it ignores names that the model does not have.
    other = tiny_text_model("bi-encoder", seed=1)
    unexpected = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not unexpected.missing_keys and not unexpected.unexpected_keys
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in model.state_dict().items())
    model.load_state_dict(other.state_dict())  # its own names
    again = BiEncoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.dtype is torch.bfloat16 and again.config.scale == 7.0 and not again.training
    # Trained on by a tool that knows only the encoder: the scale is kept.
    encoder.save_pretrained(tmp_path)
    assert load_ranker(tmp_path).model.config.scale == 7.0
    with pytest.raises(ValueError, match=r"call the model's push_to_hub\(repo_id\)"):
        model.save_pretrained(tmp_path, push_to_hub=True)


def test_bi_encoder_folder_of_the_older_layout(tmp_path, tiny_text_model, tiny_tokenizer, text_rows):
    model = tiny_text_model("bi-encoder", pooling="cls", similarity="dot", scale=7.0).eval()
    PreTrainedModel.save_pretrained(model, tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "pile_fast_bi_encoder"
    loaded = load_ranker(tmp_path).model
    assert (loaded.config.pooling, loaded.config.similarity, loaded.config.scale) == ("cls", "dot", 7.0)
    inputs = BiEncoderCollator(tiny_tokenizer)(text_rows(3))
    del inputs["labels"]
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_plain_encoder_folder_scores_the_cosine_of_mean_pooling(tmp_path, tiny_text_model, tiny_tokenizer, text_rows):
    model = tiny_text_model("encoder")
    loaded = load_ranker(save(model, tiny_tokenizer, tmp_path))
    (row,) = text_rows(1, documents=(3, 3))
    expected = [cosine(model, tiny_tokenizer, row["query"], document) for document in row["documents"]]
    assert loaded.kind == "bi-encoder" and loaded.score([row])[0].tolist() == pytest.approx(expected, abs=1e-5)


POOLING = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


def sentence_transformers_folder(model, tokenizer, folder, pooling, last="Normalize"):
    save(model, tokenizer, folder)
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path}
               for kind, path in (("Transformer", ""), ("Pooling", "1_Pooling"), (last, "2_Last"))]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 6}')
    return folder


@pytest.mark.parametrize("pooling", [POOLING, {"pooling_mode": "cls"}])
def test_sentence_transformers_folder_brings_its_pooling_and_length(tmp_path, pooling, tiny_text_model, tiny_tokenizer):
    folder = sentence_transformers_folder(tiny_text_model("encoder"), tiny_tokenizer, tmp_path, pooling)
    loaded = load_ranker(folder)
    assert loaded.model.config.pooling == "cls" and loaded.collator.max_length == 6
    assert load_ranker(folder, max_length=5).collator.max_length == 5
    long = "the old house under the tall tree"
    scores = loaded.score([{"query": "a", "documents": [long, long + " sleeps", long[:5]]}])[0]
    assert scores[0] == scores[1] != scores[2]


SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
# Per family: the options of a tiny model, and how many tokens its 40 positions take.
FAMILIES = {
    "Bert": ({}, 40),
    "Roberta": ({"pad_token_id": 1}, 38),
    "XLMRoberta": ({"pad_token_id": 1}, 38),
    "Camembert": ({"pad_token_id": 1}, 38),
    "MPNet": ({"pad_token_id": 1}, 38),
    "Longformer": ({"pad_token_id": 1, "attention_window": 4}, 38),
    "IBert": ({"pad_token_id": 1}, 38),
    "Data2VecText": ({"pad_token_id": 3}, 36),
    "Nystromformer": ({}, 40),  # has two rows to spare
    "RoFormer": ({}, 40),
}


# B3: the table of positions, with a tokenizer that knows no limit.
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["cross-encoder", "bi-encoder"])
def test_texts_are_cut_to_the_positions_that_a_model_has(tmp_path, family, kind, tiny_tokenizer):
    options, positions = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(**SIZES | options, max_position_embeddings=40, num_labels=1)
    model = getattr(transformers, f"{family}{'ForSequenceClassification' if kind == 'cross-encoder' else 'Model'}")(config)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, pad_token="[PAD]", model_input_names=["input_ids", "attention_mask"]
    )
    folder = save(model, tokenizer, tmp_path)
    row = {"query": "red", "documents": ["tree " * 60, "house"]}
    loaded = load_ranker(folder)
    assert loaded.kind == kind and loaded.collator.max_length == positions
    assert loaded.score([row])[0].isfinite().all()
    at_most = load_ranker(folder, max_length=positions)
    assert at_most.score([row])[0].tolist() == loaded.score([row])[0].tolist()
    with pytest.raises(
        ValueError, match=rf"max_length: expected at most {positions}, the positions that .* has, got {positions + 1}"
    ):
        load_ranker(folder, max_length=positions + 1)


def test_models_without_a_table_of_positions_take_what_is_asked_for(tmp_path, tiny_tokenizer):
    config = transformers.Qwen2Config(**SIZES, num_key_value_heads=2, max_position_embeddings=40, num_labels=1, pad_token_id=0)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, pad_token="[PAD]")
    folder = save(transformers.Qwen2ForSequenceClassification(config), tokenizer, tmp_path)
    assert load_ranker(folder).collator.max_length == 40  # what it was trained for
    longer = load_ranker(folder, max_length=70)
    assert longer.collator.max_length == 70 and longer.score([{"query": "red", "documents": ["tree " * 90]}])[0].isfinite()


@pytest.mark.parametrize(
    "pooling, last, message",
    [
        ({"pooling_mode_max_tokens": True}, "Normalize", "expected 'mean' or 'cls' pooling"),
        (POOLING | {"pooling_mode_mean_tokens": True}, "Normalize", "expected 'mean' or 'cls' pooling"),
        (POOLING, "Dense", "a BiEncoder has no module 'sentence_transformers.models.Dense'"),
    ],
)
def test_sentence_transformers_folder_that_does_not_fit(tmp_path, pooling, last, message, tiny_text_model, tiny_tokenizer):
    folder = sentence_transformers_folder(tiny_text_model("encoder"), tiny_tokenizer, tmp_path, pooling, last)
    with pytest.raises(ValueError, match=message):
        load_ranker(folder)


def test_models_that_are_no_rankers_of_the_kind(tmp_path, tiny_text_model, tiny_tokenizer):
    two = save(tiny_text_model("cross-encoder", outputs=2), tiny_tokenizer, tmp_path / "two")
    with pytest.raises(ValueError, match="a ranker needs a cross-encoder with one output, this one has 2"):
        load_ranker(two)
    bare = save(tiny_text_model("encoder"), tiny_tokenizer, tmp_path / "bare")
    with pytest.raises(ValueError, match="not a trained cross-encoder, the weights lack classifier.bias"):
        load_ranker(bare, kind="cross-encoder")
    pair = save(tiny_text_model("bi-encoder"), tiny_tokenizer, tmp_path / "pair")
    with pytest.raises(ValueError, match="this is a bi-encoder, which cannot be loaded as a cross-encoder"):
        load_ranker(pair, kind="cross-encoder")
    with pytest.raises(ValueError, match="this is a bi-encoder model, not a features one"):
        load_ranker(bare, kind="features")
    with pytest.raises(ValueError, match="kind: expected one of 'features', 'cross-encoder', 'bi-encoder' or None"):
        load_ranker(bare, kind="lambdamart")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: no model in this folder, it has no config.json"):
        load_ranker(tmp_path / "empty")
    (tmp_path / "empty/config.json").write_text("{}")
    with pytest.raises(ValueError, match="its config.json names no model_type"):
        load_ranker(tmp_path / "empty")


def test_hub_model_without_a_network_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match="nobody/none: no such folder, and could not be loaded from the Hugging Face hub"
    ) as error:
        load_ranker("nobody/none")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"documents": ["a"]}, "query 'q': no 'query', which this student needs"),
        ({"query": "a", "features": [[1.0]]}, "query 'q': no 'documents'"),
        ({"query": "a", "documents": []}, "query 'q': no documents"),
        ({"query": "a", "documents": ["a", "b"], "labels": [1]}, "query 'q': labels: expected one per document, 2, got 1"),
    ],
)
@pytest.mark.parametrize("kind", ["cross-encoder", "bi-encoder"])
def test_row_that_a_text_ranker_cannot_score(tmp_path, kind, row, message, tiny_text_model, tiny_tokenizer):
    loaded = load_ranker(save(tiny_text_model(kind), tiny_tokenizer, tmp_path))
    with pytest.raises(ValueError, match=message):
        loaded.score([{"query_id": "q"} | row])
