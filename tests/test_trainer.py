import pytest
import torch
from transformers import TrainingArguments

import pile_fast
from pile_fast.data import make_synthetic
from pile_fast.students import FeatureRanker, FeatureRankerConfig
from pile_fast.trainer import PileTrainer, ranking_quality

LISTS = make_synthetic(72, documents=(1, 12), num_features=6)


pytestmark = pytest.mark.usefixtures("one_thread")


def student(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    config = FeatureRankerConfig(num_features=6, hidden_sizes=(8,), dropout=dropout)
    return FeatureRanker(config).fit_standardization(LISTS.features)


def trainer(folder, loss=None, train=LISTS, evaluation=None, model=None, **arguments):
    arguments = {
        "per_device_train_batch_size": 32,
        "max_steps": 2,
        "learning_rate": 1.0,
        "max_grad_norm": 0.0,
    } | arguments
    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        optim="sgd",
        **arguments,
    )
    return PileTrainer(model or student(), arguments, loss=loss, train_dataset=train, eval_dataset=evaluation)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(*args, **kwargs):
    run = trainer(*args, **kwargs)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return weights(run.model), losses


# alpha=0: queries without a label pair are spread unevenly over the small batches.
# 72 queries: the third step of 32 is short.
@pytest.mark.parametrize("alpha", [1.0, 0.0])
@pytest.mark.parametrize("steps", [2, 3])
def test_accumulated_small_batches_take_the_same_steps_as_large_ones(tmp_path, alpha, steps):
    loss = pile_fast.PILELoss(alpha=alpha, reduction="none", backend="torch")
    large, large_losses = train(tmp_path, loss, max_steps=steps)
    small, small_losses = train(tmp_path, loss, max_steps=steps, per_device_train_batch_size=8, gradient_accumulation_steps=4)
    start = weights(student())
    assert (large - start).abs().max() > 1e-2
    torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-6)
    assert small_losses == pytest.approx(large_losses, abs=2e-4)  # the Trainer rounds what it logs


def test_a_step_is_gradient_descent_on_the_mean_over_its_queries(tmp_path):
    loss = pile_fast.PILELoss(reduction="none", backend="torch").fit([vars(LISTS)])
    model = student()
    logits = model(LISTS.features)
    losses = loss(logits, LISTS.teacher_logits, LISTS.labels, cu_seqlens=LISTS.cu_seqlens)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(losses.mean(), list(model.parameters()))])
    trained, logged = train(tmp_path, loss, per_device_train_batch_size=72, max_steps=1, lr_scheduler_type="constant")
    torch.testing.assert_close(trained, weights(model) - gradient, rtol=1e-5, atol=1e-6)
    assert logged == [pytest.approx(losses.mean().item(), abs=1e-4)]


def test_fused_backend_trains_like_the_reference(tmp_path):
    status = pile_fast.available_backends()["cpp"]
    if not status.available:
        pytest.skip(f"backend cpp: {status.reason}")
    fused, fused_losses = train(tmp_path, pile_fast.PILELoss(alpha=0.5, reduction="none", backend="cpp"))
    reference, reference_losses = train(tmp_path, pile_fast.PILELoss(alpha=0.5, reduction="none", backend="torch"))
    torch.testing.assert_close(fused, reference, rtol=1e-4, atol=1e-6)
    assert fused_losses == pytest.approx(reference_losses, abs=2e-4)


def test_default_loss_is_pile(tmp_path):
    loss = trainer(tmp_path).loss
    assert isinstance(loss, pile_fast.PILELoss)
    assert loss.options == pile_fast.PILELoss(reduction="none").options


def test_a_loss_that_is_reduced_already_is_refused_with_the_fix(tmp_path):
    with pytest.raises(ValueError, match=r"loss: expected the queries' losses \(Q,\) = \(32,\), got \(\).*reduction='none'"):
        train(tmp_path, pile_fast.PILELoss())


# 72 queries in batches of 10: the last one is short, which is where a packed prediction would lose documents.
def test_evaluation_sees_every_document_once(tmp_path):
    model = student()
    run = trainer(tmp_path, model=model, evaluation=LISTS, per_device_eval_batch_size=10)
    metrics = run.evaluate()
    with torch.no_grad():
        logits = model(LISTS.features)
        losses = run.loss.eval()(logits, LISTS.teacher_logits, LISTS.labels, cu_seqlens=LISTS.cu_seqlens)
    for name, value in ranking_quality(logits, LISTS.labels, cu_seqlens=LISTS.cu_seqlens).items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-6)
    assert metrics["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    prediction = run.predict(LISTS)
    labels, lengths = prediction.label_ids
    assert lengths.tolist() == LISTS.cu_seqlens.diff().tolist()
    packed = torch.cat([torch.from_numpy(row[:n]) for row, n in zip(prediction.predictions, lengths, strict=True)])
    torch.testing.assert_close(packed, logits)


def test_training_lowers_the_loss_and_ranks_better(tmp_path):
    run = trainer(tmp_path, evaluation=LISTS, max_steps=60, learning_rate=0.5)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_ndcg@10"] > before["eval_ndcg@10"]


def test_saved_student_ranks_alike(tmp_path):
    run = trainer(tmp_path)
    run.train()
    run.save_model(tmp_path / "student")
    again = FeatureRanker.from_pretrained(tmp_path / "student")
    assert torch.equal(again(LISTS.features), run.model.eval()(LISTS.features))
