import dataclasses
import itertools
import json
import lzma
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pile_fast
from pile_fast.data import find_data, make_synthetic, pack_queries
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
    per_document = dict(pair_weight="label_gap", granularity="document")
    target = pile_fast.pile_ensemble(lists.teacher_logits, lists.labels, cu_seqlens=lists.cu_seqlens, **per_document)
    ((stack, _),) = students.train(
        [students.Student(None, lists.labels, 0.0), students.Student(target.logits, lists.labels, **pile)],
        [5, 7], lists, [lists], epochs=3, hidden_sizes=(8, 4), dropout=0.0,
    )  # fmt: skip

    torch.manual_seed(7)
    model = FeatureRanker(FeatureRankerConfig(6, (8, 4), 0.0)).fit_standardization(lists.features)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=42)
    generator = torch.Generator().manual_seed(7)
    best, kept = -1.0, None
    for _ in range(3):
        for queries in torch.randperm(70, generator=generator).split(5):  # 14 steps an epoch
            batch = pack_queries([lists[q] for q in queries.tolist()])
            losses = pile_fast.pile_loss(
                model(batch["features"]), batch["teacher_logits"], batch["labels"], cu_seqlens=batch["cu_seqlens"],
                alpha=0.6, distillation="logistic:temperature=2", reduction="none", **per_document,
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
    ((stack, quality),) = students.train([student, student], [1, 2], lists, [lists], epochs=1, hidden_sizes=(8,))
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
    ((stack, _),) = students.train([fixed, moving], [1, 2], lists, [lists], epochs=4, hidden_sizes=(8,))
    scores = stack.scores(lists.features)
    assert torch.equal(scores[0], scores[1])
    assert len(given) == 4 and given[0].shape == lists.labels.shape  # two seeds, two epochs
    assert not torch.allclose(given[0], given[2])


def test_each_set_of_validation_queries_keeps_epochs_of_its_own(lists, one_thread):
    """What is kept for one is what a training with it alone keeps."""
    import _quality_data as data
    import _quality_students as students

    student = students.Student(pile_target(lists), lists.labels)
    validations = [lists, data.with_share(lists, 0.05, 3)]
    both = students.train([student], [1, 2], lists, validations, epochs=6, hidden_sizes=(8,))
    for validation, (stack, quality) in zip(validations, both, strict=True):
        ((alone, of_alone),) = students.train([student], [1, 2], lists, [validation], epochs=6, hidden_sizes=(8,))
        assert torch.equal(quality, of_alone) and torch.equal(stack.scores(lists.features), alone.scores(lists.features))
    assert not torch.equal(both[0][1], both[1][1])


def test_every_method_has_a_grid_of_the_same_size_and_makes_students(lists):
    import _quality_methods as methods

    assert {len(method.points()) for method in methods.METHODS.values()} == {3} and set(methods.MAIN) <= set(methods.METHODS)
    for name, method in methods.METHODS.items():
        for point in method.points():
            student = method.student(lists, **point)
            assert 0 <= student.alpha <= 1
            assert (student.target is None) == name.startswith("labels") == (student.alpha == 0)
    mean, pile = (methods.METHODS[name].student(lists, temperature=1.0).target for name in ("mean", "PILE, shared"))
    assert not torch.allclose(mean, pile, equal_nan=True)


def test_a_method_that_says_so_does_not_read_the_labels(lists):
    import _quality_methods as methods

    hidden = dataclasses.replace(lists, labels=torch.full_like(lists.labels, torch.nan))
    for method in methods.METHODS.values():
        seen, unseen = (method.student(of, **method.points()[0]) for of in (lists, hidden))
        if not method.labelled:
            assert seen.alpha == 1
            if isinstance(seen.target, torch.Tensor):
                torch.testing.assert_close(seen.target, unseen.target, rtol=0, atol=0, equal_nan=True)


def test_variants_are_targets(lists):
    """A fitted factor makes the target of teachers that agree with the labels more sure; one that is wrong gets no weight."""
    import _quality_methods as methods

    lists = lists.with_teachers(torch.stack([lists.labels, -lists.labels], 1) + torch.randn(len(lists.labels), 2), "ab")
    targets = {name: make(lists) for name, make in methods.VARIANTS.items()}
    assert all(target.shape == lists.labels.shape and target.isfinite().all() for target in targets.values())
    assert targets["one fitted scale"].std() > targets["default"].std()
    # The teacher that is wrong gets no weight, so what is left is a scale.
    right = methods.calibrated(lists)[:, 0]
    assert torch.corrcoef(torch.stack([targets["free weights"], right]))[0, 1] > 0.999


def test_labels_on_a_share_of_the_queries():
    import _quality_data as data

    lists = make_synthetic(200, seed=1)
    lengths = lists.cu_seqlens.diff().tolist()

    def labelled(some):
        each = [bool(y.isfinite().any()) for y in some.labels.split(lengths)]
        kept = [y for y in some.labels.split(lengths) if y.isfinite().any()]
        assert torch.equal(torch.cat(kept), torch.cat([y for y, k in zip(lists.labels.split(lengths), each, strict=True) if k]))
        return each

    fifth, few = labelled(data.with_share(lists, 0.2, 3)), labelled(data.with_share(lists, 0.05, 3))
    assert sum(fifth) == 40 and sum(few) == 10 and all(f <= m for f, m in zip(few, fifth, strict=True))
    assert labelled(data.with_share(lists, 0.2, 4)) != fifth
    assert data.with_share(lists, 1.0, 3) is lists
    rare = dataclasses.replace(lists, labels=torch.where(torch.arange(len(lists.labels)) % 500 == 0, 1.0, 0.0))
    kept = data.with_share(rare, 0.005, 3, keep_few=True).labels
    assert (kept == 1).sum() == data.FEW


@pytest.mark.parametrize("kind", ["noise", "negated", "scaled", "missing"])
def test_damage(kind):
    import _quality_data as data

    lists = make_synthetic(200, seed=1)
    whole = lists.with_teachers(lists.teacher_logits.nan_to_num(0.0), lists.teacher_names)
    level = next(level for name, level in data.DAMAGES if name == kind)
    hurt, again = (data.damaged(whole, kind, level, 2) for _ in range(2))
    assert torch.equal(hurt.teacher_logits.nan_to_num(9.0), again.teacher_logits.nan_to_num(9.0))
    before, after = whole.teacher_logits, hurt.teacher_logits
    assert torch.equal(hurt.labels, whole.labels)
    if kind == "missing":
        assert abs(after.isnan().float().mean() - level) < 0.02
        assert torch.equal(after.nan_to_num(0.0), torch.where(after.isnan(), 0.0, before))
        return
    changed = (before != after).any(0)
    assert changed.nonzero().flatten().tolist() == sorted((2 + i) % 6 for i in range(level))  # the fold's number says which
    if kind == "negated":
        assert torch.equal(after[:, 2], -before[:, 2])
    if kind == "scaled":
        first = slice(0, int(whole.cu_seqlens[1]))
        assert torch.equal(before[first, 2].argsort(stable=True), after[first, 2].argsort(stable=True))


def test_cast_is_read_from_runs(tmp_path):
    """Every document of any run, features of the cheap ones, unreturned documents below a run's end."""
    import _quality_data as data

    for m, name in enumerate(data.CAST_TEACHERS):
        lines = [f"7_1 Q0 MARCO_a 1 {m + 2} x", f"7_1 Q0 KILT_{m} 2 {m + 1} x", "8_1 Q0 MARCO_a 1 5 x", "9_1 Q0 MARCO_a 1 5 x"]
        with lzma.open(tmp_path / f"{name}.run.xz", "wt") as file:
            file.write("\n".join(lines) + "\n")
    with lzma.open(tmp_path / "qrels.txt.xz", "wt") as file:
        file.write("7_1 0 MARCO_a 3\n9_1 0 MARCO_a 1\n9_1 0 WAPO_z 1\n")
    lists = data._cast(tmp_path, "bottom")
    assert lists.query_ids == ("7_1", "9_1") and lists.parts == ("S1", "S2")  # 8_1 is not judged
    first = slice(0, 6)
    assert lists.doc_ids[first] == ("MARCO_a", *(f"KILT_{m}" for m in range(5)))
    torch.testing.assert_close(lists.labels[first], torch.tensor([3.0] + 5 * [torch.nan]), equal_nan=True)
    assert lists.teacher_logits[0].tolist() == [2, 3, 4, 5, 6]
    assert lists.teacher_logits[1].tolist() == [
        1,
        1.5,
        2.5,
        3.5,
        4.5,
    ]  # only run 0 returned it; half a step below the others' end
    wanted = [1, 0, 0.5, np.log(2), 0, 0, 0, np.log(3), 0, 1, 0]  # BM25 at rank 2, not by ANCE, of KILT
    torch.testing.assert_close(lists.features[1], torch.tensor(wanted, dtype=torch.float32))
    assert data._cast(tmp_path, "nan").teacher_logits[1].isnan().tolist() == [False] + 4 * [True]


@pytest.mark.parametrize("name", ["CAsT 2021", "LightGBM's example"])
def test_collections(name):
    import _quality_data as data

    folder = find_data("cast2021")
    if folder is None or not all((folder / of).is_dir() for of in ("cast2021", "lightgbm_rank")):
        pytest.skip("needs PILE_FAST_DATA")
    lists = data._collection(name, folder)
    queries, documents, grades = {"CAsT 2021": (158, 26451, 5), "LightGBM's example": (251, 3773, 5)}[name]
    assert (len(lists), len(lists.labels), len(lists.labels[lists.labels.isfinite()].unique())) == (queries, documents, grades)
    assert sorted(set(lists.parts)) == ["S1", "S2", "S3", "S4", "S5"]
    if name == "CAsT 2021":
        assert len({(query.split("_")[0], part) for query, part in zip(lists.query_ids, lists.parts, strict=True)}) == 26 - (
            26 - len({query.split("_")[0] for query in lists.query_ids})
        )
        assert lists.teacher_logits.isfinite().all() and lists.features.isfinite().all()


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

    unit = quality.Unit("compare", "CAsT 2021", 1)
    results = quality.Results(tmp_path, "compare")
    results.add(unit, {"found": []})
    results.add(unit._replace(fold=2), {"found": []})
    whole = results.path.read_bytes()
    results.path.write_bytes(whole[:-7])  # the second line was cut short
    again = quality.Results(tmp_path, "compare")
    assert list(again.records) == [unit]
    again.add(unit._replace(fold=2), {"found": []})
    assert results.path.read_bytes() == whole


def test_a_small_run_goes_on_where_it_was_stopped_and_reports(tmp_path, monkeypatch, one_thread):
    import _quality_report
    import quality

    monkeypatch.setattr(quality, "VARIANTS", {name: quality.VARIANTS[name] for name in ("mean", "default")})
    plan = dataclasses.replace(
        quality.SMOKE, data_sets=(quality.CAST,), methods=("labels", "mean", "PILE, shared", "PILE, query"), epochs=1, points=3
    )
    quality.run(list(quality.PHASES), plan, None, tmp_path, 1)
    compare = tmp_path / "compare.jsonl"
    lines = compare.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["data"] for record in records] == ["CAsT 2021", "CAsT 2021, NaN"]
    shares = {(found["method"], found["share"]) for found in records[0]["found"]}
    main = itertools.product(("labels", "mean", "PILE, shared"), (1.0, 0.2, 0.05))
    assert shares == {*main, ("PILE, query", 1.0)}
    compare.write_text(lines[1] + "\n")
    quality.run(["compare"], plan, None, tmp_path, 1)

    def without_time(line):
        return {name: value for name, value in json.loads(line).items() if name not in ("seconds", "run")}

    resumed = compare.read_text().splitlines()
    assert resumed[0] == lines[1] and without_time(resumed[1]) == without_time(lines[0])
    blocks = _quality_report.tables(tmp_path)
    assert all(f"| {name} |" in blocks["students"] for name in ("labels", "mean", "**PILE, shared**", "**PILE, query**"))
    assert "| all, 20% of the labels | PILE, shared − mean |" in blocks["tests"]
    assert "| default |" in blocks["variants"] and "shared, 5% of labels" in blocks["teachers"]
    assert "| CAsT 2021 | mean |" in blocks["missing"]


def test_the_point_is_chosen_on_the_validation_queries(lists, monkeypatch, one_thread):
    """And a method's students are those that a training of it alone gives."""
    import _quality_methods as methods
    import _quality_students as students
    import quality

    fold = quality.Fold(lists, lists, lists)
    plan = dataclasses.replace(quality.SMOKE, methods=("mean", "PILE, shared"), points=3)
    found = quality._compare(fold, quality.Unit("compare", quality.CAST, 1), plan)
    method = methods.METHODS["PILE, shared"]
    train, validations = quality._labelled(fold, quality.SHARES, 1)
    (of,) = (of for of in found if (of["method"], of["share"]) == ("PILE, shared", 0.05))
    each = [method.student(train[2], **point) for point in method.points()]
    stacks = students.train(each, plan.seeds, lists, validations, epochs=plan.epochs)
    stack, quality_there = stacks[2]
    best = int(quality_there.mean(1).argmax())
    assert of["point"] == method.points()[best]
    wanted = quality.quality_of(lists.labels, lists.cu_seqlens, stack.scores(lists.features)[best])
    assert of["queries"] == wanted["queries"]


def test_statistics():
    from _quality_report import Found, holm, joined, paired, pooled

    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    ours, theirs = np.array([0.5, 0.7, np.nan, 0.9]), np.array([0.4, 0.5, np.nan, 0.6])
    difference, low, high, p = paired(ours, theirs)
    assert difference == pytest.approx(0.2) and low < 0.2 < high and p == pytest.approx(0.0742, abs=1e-4)  # t = 2√3, 2 d.f.
    found = joined({"fold": fold, "queries": [fold / 2, None], "test": {"map": [fold / 4]}} for fold in (2, 1))
    assert found.queries.tolist() == pytest.approx([0.5, np.nan, 1.0, np.nan], nan_ok=True)
    assert found.test == {"map": pytest.approx(0.375)}
    values = {"MQ2008, fitted": [0.2, 0.4], "MQ2008, systems": [0.4, 0.8], "CAsT 2021": [0.1]}
    sets = {(name, 1.0): {"mean": Found(np.array(v), {})} for name, v in values.items()}
    assert pooled(sets, 1.0)["mean"].tolist() == pytest.approx([0.3, 0.6, 0.1])  # MQ2008's queries count once
    assert pooled(sets, 0.2) == {}


def test_the_family_is_tested_together(tmp_path):
    """Each comparison is there once, and Holm's correction is over all of them."""
    from _quality_report import holm, tested

    rng = np.random.default_rng(0)
    names = ("labels", "mean", "mean + labels", "stacking", "PILE, shared", "PILE, shared + labels")
    lines = []
    for fold in (1, 2):
        found = [
            {"method": name, "share": share, "test": {}, "queries": (rng.random(20) + 0.1 * name.startswith("PILE")).tolist()}
            for name, share in itertools.product(names, (1.0, 0.2))
        ]
        lines.append(json.dumps({"phase": "compare", "data": "CAsT 2021", "fold": fold, "found": found}))
    (tmp_path / "compare.jsonl").write_text("\n".join(lines) + "\n")
    rows = [(pair.where, pair.ours, pair.theirs) for pair, _, _ in tested(tmp_path)]
    assert len(set(rows)) == len(rows) == 5 + 3 + 1 + 6
    p, adjusted = zip(*((of[3], after) for _, of, after in tested(tmp_path)), strict=True)
    assert list(adjusted) == holm(p).tolist() and max(adjusted) <= 1


def test_a_phase_that_does_not_exist(capsys, monkeypatch):
    import quality

    monkeypatch.setattr(sys, "argv", ["quality.py", "--only", "compare,x"])
    with pytest.raises(SystemExit, match="2"):
        quality.main()
    assert "--only: no phase x" in capsys.readouterr().err


def test_text_rows_are_packed():
    import quality_text

    labels, cu_seqlens = quality_text.packed([{"labels": [1]}, {"labels": [0, None]}])
    torch.testing.assert_close(labels, torch.tensor([1.0, 0, torch.nan]), equal_nan=True)
    assert cu_seqlens.tolist() == [0, 1, 3]


def test_the_text_part_says_what_it_needs(tmp_path, monkeypatch, capsys):
    import quality_text

    monkeypatch.setattr(sys, "argv", ["quality_text.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        quality_text.main()
    assert "run `make text` first" in capsys.readouterr().err
