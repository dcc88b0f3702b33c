"""Fixtures that more than one test file uses.

What only some of them need is imported there: tests/contract runs with PyTorch and pytest alone.
"""

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def mq2008_folder():
    from pile_fast.data import find_data

    folder = find_data("mq2008")
    if folder is None or not (folder / "mq2008").is_dir():
        pytest.skip("needs the MQ2008 files: set PILE_FAST_DATA to the folder that holds mq2008/ and mq2008_agg/")
    return folder


@pytest.fixture(scope="session")
def text_data_folder():
    """A function of a data set's name, "wikiqa" or "cranfield": the data folder that holds it."""
    from pile_fast.data import find_data

    def find(name):
        folder = find_data(name)
        if folder is None or not (folder / name).is_dir():
            pytest.skip(f"needs the {name} files: set PILE_FAST_DATA to the folder that holds {name}/")
        return folder

    return find


@pytest.fixture
def poisoned(monkeypatch):
    """What torch.empty and its kin return is NaN first: an output element that a kernel does not write shows."""

    def poison(tensor):
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


@pytest.fixture
def one_thread():
    """For tiny networks: on a busy machine their threads would mostly wait for each other. Undoes what the demo sets, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


WORDS = "the a of red green blue apple tree house river bank tall small old new runs sleeps under over fast slow".split()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Whole words of `WORDS`; [CLS] a [SEP] b [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=24, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


@pytest.fixture
def tiny_text_model():
    """A function of kind, "encoder", "cross-encoder" or "bi-encoder", that makes one with random weights."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    from pile_fast.students import BiEncoder, BiEncoderConfig

    def make(kind, *, seed=0, dropout=0.0, outputs=1, **options):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=len(WORDS) + 4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
            max_position_embeddings=40, initializer_range=0.2, num_labels=outputs, hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )  # fmt: skip
        if kind == "bi-encoder":
            return BiEncoder(BiEncoderConfig(config, **options))
        return {"encoder": BertModel, "cross-encoder": BertForSequenceClassification}[kind](config)

    return make


@pytest.fixture
def text_rows():
    """A function that makes rows: queries of 1 to 9 documents of 1 to 30 words, labels and teachers with gaps."""
    import numpy as np

    def make(queries, *, seed=0, teachers=2, documents=(1, 9)):
        random = np.random.default_rng(seed)

        def text(longest):
            return " ".join(random.choice(WORDS, random.integers(1, longest, endpoint=True)))

        rows = []
        for q in range(queries):
            n = int(random.integers(*documents, endpoint=True))
            labels = [None if random.random() < 0.1 else int(random.integers(0, 3)) for _ in range(n)]
            logits = [[None if random.random() < 0.1 else random.normal() for _ in range(teachers)] for _ in range(n)]
            rows.append({
                "query_id": f"q{q}", "query": text(5), "documents": [text(30) for _ in range(n)], "labels": labels,
                "teacher_logits": logits, "teachers": [f"t{m}" for m in range(teachers)],
            })  # fmt: skip
        return rows

    return make


@pytest.fixture
def disk_full(monkeypatch):
    """Makes the whole files that are written to a path from now on, which go to a temporary one first, meet a full disk."""
    from pile_fast.data import files

    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    create = files.create_aside

    def fill(path):
        def create_on_full_disk(folder, name, mode):
            temporary = create(folder, name, mode)
            if name == path.name:
                temporary.unlink()
                temporary.symlink_to("/dev/full")
            return temporary

        monkeypatch.setattr(files, "create_aside", create_on_full_disk)

    return fill
