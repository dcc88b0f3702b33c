"""A training step of a cross-encoder of MiniLM-L6's size, to hold the losses against: random weights, AdamW, a mere mean.

A pair is 128 tokens long. Besides, `pile_loss` with four teachers, as such a step would use it.
"""

import torch
from transformers import BertConfig, BertForSequenceClassification

import pile_fast

SCALES = {"pairwise_logistic": None}  # computes something else: there is nothing to hold it against
RAGGED = False
PACKAGE = "transformers"
TOKENS = 128


def prepare(op, lists, variant):
    if variant == "pile_loss":
        scores = torch.from_numpy(lists.scores).requires_grad_()
        labels = torch.from_numpy(lists.labels)
        teachers = torch.from_numpy(lists.targets).unsqueeze(-1) + torch.randn(*lists.scores.shape, 4)

        def loss():
            scores.grad = None
            value = pile_fast.pile_loss(scores, teachers, labels, alpha=0.7)
            value.backward()
            return value.detach(), scores.grad

        return loss

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
