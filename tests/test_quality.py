import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pile_fast
from pile_fast.data import make_synthetic, pack_queries
from pile_fast.evaluation.metrics import ndcg
from pile_fast.students import FeatureRanker, FeatureRankerConfig

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def benchmarks_on_the_path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def lists():
    return make_synthetic(70, documents=(1, 12), num_features=6, seed=3)


def pile_target(lists):
    return pile_fast.pile_ensemble(lists.teacher_logits, lists.labels, cu_seqlens=lists.cu_seqlens).logits


def test_a_student_of_the_stack_is_a_feature_ranker_trained_by_pile_loss(lists, one_thread):
    """Same initial weights, same batches: plain PyTorch with the fused loss on the teachers arrives at the same weights."""
    import _quality_students as students

    pile = dict(alpha=0.6, temperature=2.0, pair_weight="label_gap", learning_rate=3e-3)
    target = pile_fast.pile_ensemble(lists.teacher_logits, lists.labels, cu_seqlens=lists.cu_seqlens, pair_weight="label_gap")
    stack, _ = students.train(
        [students.Student(None, lists.labels, 0.0), students.Student(target.logits, lists.labels, **pile)],
        [5, 7], lists, lists, epochs=3, hidden_sizes=(8, 4), dropout=0.0,
    )  # fmt: skip

    torch.manual_seed(7)
    model = FeatureRanker(FeatureRankerConfig(6, (8, 4), 0.0)).fit_standardization(lists.features)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=9)
    generator = torch.Generator().manual_seed(7)
    best, kept = -1.0, None
    for _ in range(3):
        for queries in torch.randperm(70, generator=generator).split(students.QUERIES_PER_STEP):
            batch = pack_queries([lists[q] for q in queries.tolist()])
            losses = pile_fast.pile_loss(
                model(batch["features"]), batch["teacher_logits"], batch["labels"], cu_seqlens=batch["cu_seqlens"],
                alpha=0.6, distillation="logistic:temperature=2", pair_weight="label_gap", reduction="none",
            )  # fmt: skip
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            scores = model(lists.features)
        quality = ndcg(scores, lists.labels, cu_seqlens=lists.cu_seqlens, k=10, ties="average", empty="skip")
        if quality > best:
            best, kept = quality, scores
    # Up to a constant: the loss does not see the last bias, so what moves it is rounding, blown up by Adam.
    scores = stack.scores(lists.features)[1, 1]
    torch.testing.assert_close(scores - scores.mean(), kept - kept.mean(), rtol=0, atol=1e-4)
    torch.testing.assert_close(stack.model(1, 1)(lists.features), scores)


def test_students_of_one_seed_share_all_random_draws_and_others_do_not(lists, one_thread):
    import _quality_students as students

    student = students.Student(pile_target(lists), lists.labels)
    stack, quality = students.train([student, student], [1, 2], lists, lists, epochs=1, hidden_sizes=(8,))
    scores = stack.scores(lists.features)
    assert torch.equal(scores[0], scores[1]) and not torch.allclose(scores[0, 0], scores[0, 1])
    assert torch.equal(quality, students.quality_on(lists, scores))
    each = [ndcg(s, lists.labels, cu_seqlens=lists.cu_seqlens, k=10, ties="average", empty="skip") for s in scores[0]]
    torch.testing.assert_close(quality[0], torch.stack(each))


def test_a_target_that_moves_with_the_student(lists, one_thread):
    """One that is always the same trains like a fixed one; it is given the logits of the student as it then is."""
    import _quality_students as students

    target, given = pile_target(lists), []

    def compute(z):
        given.append(z)
        return target

    moving = students.Student(students.MovingTarget(compute, (0, 2)), lists.labels)
    fixed = students.Student(target, lists.labels)
    stack, _ = students.train([fixed, moving], [1, 2], lists, lists, epochs=4, hidden_sizes=(8,))
    scores = stack.scores(lists.features)
    assert torch.equal(scores[0], scores[1])
    assert len(given) == 4 and given[0].shape == lists.labels.shape  # two seeds, two epochs
    assert not torch.allclose(given[0], given[2])


def test_every_method_has_a_grid_of_the_same_size_and_makes_students(lists):
    import _quality_methods as methods

    assert len({len(method.points()) for method in methods.METHODS.values()}) == 1
    for name, method in methods.METHODS.items():
        for student in method.students(lists, method.points()):
            assert 0 <= student.alpha <= 1 and (student.target is None) == (name == "labels") == (student.alpha == 0)
    mean, pile = (methods.METHODS[name].students(lists, methods.METHODS[name].points())[0].target for name in ("mean", "PILE"))
    assert not torch.allclose(mean, pile, equal_nan=True)


@pytest.mark.parametrize("kind", ["useless", "adversarial", "half", "missing", "label noise"])
def test_damage(kind):
    import _quality_data as data

    lists = make_synthetic(200, seed=1)
    whole = lists.with_teachers(lists.teacher_logits[:, :5].nan_to_num(0.0), [f"t{i}" for i in range(5)])
    level = data.DAMAGES[kind][0]
    hurt = data.damaged(whole, kind, level, 2)
    again = data.damaged(whole, kind, level, 2)
    assert torch.equal(hurt.teacher_logits.nan_to_num(9.0), again.teacher_logits.nan_to_num(9.0))
    before, after = whole.teacher_logits, hurt.teacher_logits
    if kind == "label noise":
        assert torch.equal(before, after)
        assert torch.equal(hurt.labels.sort().values, whole.labels.sort().values)
        assert 0 < (hurt.labels != whole.labels).float().mean() <= level
        return
    assert torch.equal(hurt.labels, whole.labels)
    if kind == "missing":
        assert abs(after.isnan().float().mean() - level) < 0.02
        assert torch.equal(after.nan_to_num(0.0), torch.where(after.isnan(), 0.0, before))
        return
    changed = (before != after).any(0)
    assert changed.tolist() == [False, False, True, False, False]  # the fold's number says which
    if kind == "adversarial":
        assert torch.equal(after[:, 2], -before[:, 2])
    if kind == "half":
        share = (before[:, 2] != after[:, 2]).float().mean()
        assert 0.4 < share < 0.6


def test_cross_fitted_teachers_saw_neither_the_query_nor_its_labels(tmp_path, monkeypatch):
    import _quality_data as data

    lists = make_synthetic(60, documents=(3, 6), num_features=6, seed=0)
    seen = []

    def fit(x, y, lengths):
        assert lengths.sum() == len(y)
        rows = {row.tobytes() for row in x}
        seen.append(len(lengths))

        def predict(features):
            assert not rows & {row.tobytes() for row in features}
            return np.arange(len(features))

        return predict

    monkeypatch.setattr(data, "TEACHERS", {"only": fit})
    fold = data.cross_fitted(data.Fold(*lists.fold(2)), tmp_path / "new" / "teachers.pt")
    assert seen == [28, 29, 29, 29, 29, 36] or sorted(seen)[-1] == 36
    assert fold.train.teacher_names == ("only",) and not fold.train.teacher_logits.isnan().any()
    monkeypatch.setattr(data, "TEACHERS", {"only": None})  # nothing is fitted a second time
    again = data.cross_fitted(data.Fold(*lists.fold(2)), tmp_path / "new" / "teachers.pt")
    assert all(torch.equal(a.teacher_logits, b.teacher_logits) for a, b in zip(fold, again, strict=True))


def test_results_survive_a_kill(tmp_path):
    import quality

    unit = quality.Unit("tune", "cross-fitted", 1, "PILE")
    results = quality.Results(tmp_path, "tune")
    results.add(unit, {"points": []})
    results.add(unit._replace(fold=2), {"points": []})
    whole = results.path.read_bytes()
    results.path.write_bytes(whole[:-7])  # the second line was cut short
    again = quality.Results(tmp_path, "tune")
    assert list(again.records) == [unit]
    again.add(unit._replace(fold=2), {"points": []})
    assert results.path.read_bytes() == whole


def test_a_small_run_goes_on_where_it_was_stopped_and_reports(tmp_path, monkeypatch, one_thread):
    import _quality_report
    import quality

    monkeypatch.setattr(quality, "METHODS", {name: quality.METHODS[name] for name in ("labels", "mean", "PILE")})
    monkeypatch.setattr(quality, "DEFAULTS", {name: quality.DEFAULTS[name] for name in ("document", "query")})
    plan = dataclasses.replace(quality.SMOKE, data_sets=("systems, bottom",), damages=(), epochs=1)
    quality.run(["ensembles", "tune", "compare", "defaults"], plan, None, tmp_path, 1)
    compare = tmp_path / "compare.jsonl"
    lines = compare.read_text().splitlines()
    assert [json.loads(line)["method"] for line in lines] == ["labels", "mean", "PILE"]
    compare.write_text("\n".join(lines[:1] + lines[2:]) + "\n")
    quality.run(["compare"], plan, None, tmp_path, 1)

    def without_time(line):
        return {name: value for name, value in json.loads(line).items() if name not in ("seconds", "run")}

    resumed = compare.read_text().splitlines()
    assert resumed[:2] == lines[:1] + lines[2:] and without_time(resumed[2]) == without_time(lines[1])
    blocks = _quality_report.tables(tmp_path)
    assert all(f"| {name} |" in blocks["students"] for name in ("labels", "mean", "**PILE**"))
    assert "| mean |" in blocks["tests"] and "| pile |" in blocks["leak"] and "| document |" in blocks["defaults"]


def test_statistics():
    from _quality_report import holm, paired, per_query

    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    ours, theirs = np.array([0.5, 0.7, np.nan, 0.9]), np.array([0.4, 0.5, np.nan, 0.6])
    difference, low, high, p = paired(ours, theirs)
    assert difference == pytest.approx(0.2) and low < 0.2 < high and p == pytest.approx(0.0742, abs=1e-4)  # t = 2√3, 2 d.f.
    values = per_query(
        {"fold": fold, "queries": {"ndcg@10": [fold / 2, None], "concordant": [3, 0], "discordant": [1, 0]}} for fold in (2, 1)
    )
    assert values["ndcg@10"].tolist() == pytest.approx([0.5, np.nan, 1.0, np.nan], nan_ok=True)
    assert values["pnr"].tolist() == pytest.approx([0.75, np.nan, 0.75, np.nan], nan_ok=True)


def test_a_phase_that_does_not_exist(capsys, monkeypatch):
    import quality

    monkeypatch.setattr(sys, "argv", ["quality.py", "--only", "tune,x"])
    with pytest.raises(SystemExit, match="2"):
        quality.main()
    assert "--only: no phase x" in capsys.readouterr().err


def test_text_rows_are_packed_in_the_order_of_the_teachers():
    import quality_text

    rows = [
        {"teachers": ["fine-tuned", "bm25", "cosine"], "teacher_logits": [[3.0, 1.0, 2.0]], "labels": [1]},
        {"teachers": ["fine-tuned", "bm25", "cosine"], "teacher_logits": [[6, 4, None], [9, 7, 8]], "labels": [0, None]},
    ]
    logits, labels, cu_seqlens = quality_text.packed(rows)
    nan = float("nan")
    torch.testing.assert_close(logits, torch.tensor([[1.0, 2, 3], [4, nan, 6], [7, 8, 9]]), equal_nan=True)
    torch.testing.assert_close(labels, torch.tensor([1.0, 0, nan]), equal_nan=True)
    assert cu_seqlens.tolist() == [0, 1, 3]
    prior = torch.tensor([0.25, 0.25, 0.5])
    assert quality_text.methods(prior)["PILE, shared prior"] == ["--prior", "0.250000", "0.250000", "0.500000"]


def test_the_text_part_says_what_it_needs(tmp_path, monkeypatch, capsys):
    import quality_text

    monkeypatch.setattr(sys, "argv", ["quality_text.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        quality_text.main()
    assert "run `make text` first" in capsys.readouterr().err
