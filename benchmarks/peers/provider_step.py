"""A training step of a cross-encoder of MiniLM-L6's size, to hold the losses against: random weights, AdamW, a mere mean.

A (query, document) pair is 128 tokens long.
"""

import torch
from transformers import BertConfig, BertForSequenceClassification

SCALES = {"training_step": None}
RAGGED = False
PACKAGE = "transformers"
TOKENS = 128


def prepare(op, lists, variant):
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=1)
    model = BertForSequenceClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    tokens = torch.randint(1000, config.vocab_size, (lists.scores.size, TOKENS))

    def step():
        optimizer.zero_grad()
        logits = model(input_ids=tokens).logits
        logits.mean().backward()
        optimizer.step()
        return logits.detach().mean(), logits.detach()

    return step
