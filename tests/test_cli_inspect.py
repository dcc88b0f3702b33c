"""pile-fast inspect: numbers against scipy, numpy and by hand; what is found; the page of plots and the HTML report."""

import base64
import html.parser
import json
import math
import re
import time

import numpy as np
import pytest
import scipy.stats
import torch

import pile_fast
import pile_fast.cli.inspect
import pile_fast.evaluation.inspection
from pile_fast.cli import main
from pile_fast.data import make_synthetic, write_rows
from pile_fast.evaluation.inspection import Contents, inspect
from pile_fast.evaluation.metrics import ndcg, pnr

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rows_of(lists, texts=False):
    bounds = lists.cu_seqlens.tolist()
    for q, row in enumerate(lists):
        names = list(lists.doc_ids[bounds[q] : bounds[q + 1]])
        yield {
            "query_id": lists.query_ids[q],
            "query": f"query {q}" if texts else None,
            "documents": [f"text of {name}" for name in names] if texts else None,
            "features": None if texts else row["features"].tolist(),
            "doc_ids": names,
            "labels": [None if math.isnan(y) else y for y in row["labels"].tolist()],
            "teacher_logits": [[None if math.isnan(t) else t for t in logits] for logits in row["teacher_logits"].tolist()],
            "teachers": list(lists.teacher_names),
        }


def row(labels, *teachers, query_id="q", **columns):
    """A row of features from lists of labels and of each teacher's logits."""
    return {
        "query_id": query_id, "query": None, "documents": None, "features": [[0.0]] * len(labels), "labels": labels,
        "doc_ids": [f"{query_id}.{i}" for i in range(len(labels))], "teachers": [f"t{m}" for m in range(len(teachers))],
        "teacher_logits": [list(logits) for logits in zip(*teachers, strict=True)] or [[]] * len(labels), **columns,
    }  # fmt: skip


def run(path, *arguments):
    assert main(["inspect", path, "--output", "out", *arguments]) == 0
    with open("out/report.json") as file:
        return json.load(file)


# -- the numbers


def test_quality_is_the_metrics_on_what_the_teacher_scored():
    lists = make_synthetic(40)
    report = inspect(Contents.from_rows(rows_of(lists)))
    for m, teacher in enumerate(report["teachers"]):
        logits = lists.teacher_logits[:, m]
        scored = ~logits.isnan()
        labels = torch.where(scored, lists.labels, torch.nan)
        layout = {"cu_seqlens": lists.cu_seqlens}
        assert teacher["coverage"] == pytest.approx(scored.double().mean().item())
        assert teacher["pnr"] == pytest.approx(pnr(logits, labels, ties="half", **layout).item())
        assert teacher["ndcg@10"] == pytest.approx(ndcg(logits, labels, k=10, ties="average", empty="skip", **layout).item())
        known = logits[scored].double()
        for key, value in (
            ("min", known.min()),
            ("max", known.max()),
            ("mean", known.mean()),
            ("std", known.std(correction=0)),
        ):
            assert teacher[key] == pytest.approx(value.item(), rel=1e-6)
        spreads = []
        for query in lists:
            values = query["teacher_logits"][:, m].double()
            values = values[~values.isnan()]
            spreads += [values.std(correction=0)] if len(values) > 1 else []
        assert teacher["median_query_std"] == pytest.approx(torch.stack(spreads).median().item(), rel=1e-6)


def test_agreement_is_scipys_kendall_tau_and_brute_force():
    lists = make_synthetic(25, documents=(1, 12))
    rounded = (lists.teacher_logits[:, :3] * torch.tensor([1.0, 0.1, 40.0])).round()  # ties
    contents = Contents.from_rows(rows_of(lists.with_teachers(rounded, ["a", "b", "c"])))
    agreement = inspect(contents)["agreement"]
    assert agreement["names"] == ["a", "b", "c", "labels"]
    columns = torch.cat([rounded, lists.labels[:, None]], 1).numpy()
    bounds = lists.cu_seqlens.tolist()
    for a in range(4):
        for b in range(4):
            taus, alike, against = [], 0, 0
            for start, end in zip(bounds[:-1], bounds[1:], strict=True):
                x, y = columns[start:end, a], columns[start:end, b]
                both = ~np.isnan(x) & ~np.isnan(y)
                x, y = x[both], y[both]
                taus.append(scipy.stats.kendalltau(x, y).statistic if len(x) > 1 else math.nan)
                signs = np.sign(x[:, None] - x) * np.sign(y[:, None] - y)
                alike, against = alike + (signs > 0).sum() // 2, against + (signs < 0).sum() // 2
            assert agreement["kendall_tau"][a][b] == pytest.approx(np.nanmean(taus), abs=1e-12)
            assert agreement["pair_agreement"][a][b] == pytest.approx(alike / (alike + against))
            assert agreement["pairs"][a][b] == alike + against


def test_weights_are_piles_own_over_queries_with_pairs():
    lists = make_synthetic(20)
    logits, labels = lists.teacher_logits, lists.labels.clone()
    labels[: lists.cu_seqlens[5]] = 1.0  # no pairs there
    report = inspect(Contents.from_rows(rows_of(lists.select(range(20)))))
    scored = ~logits.isnan().all(1)

    def mean_weights(labels, documents):
        """Of the weights that all queries share, rescaled at each document to the teachers that scored it."""
        shared = pile_fast.pile_ensemble(logits, labels, cu_seqlens=lists.cu_seqlens, return_weights=True).weights
        each = torch.where(logits.isnan(), 0.0, shared.double())[documents]
        return (each / each.sum(1, keepdim=True)).mean(0).tolist()

    assert logits[scored].isnan().any()
    assert [t["pile_weight"] for t in report["teachers"]] == pytest.approx(mean_weights(lists.labels, scored), rel=1e-5)
    assert sum(t["mean_weight"] for t in report["teachers"]) == pytest.approx(1)
    # The first queries leave the average when their labels say nothing.
    fewer = inspect(Contents.from_rows(r | {"labels": labels[a:b].tolist()} for r, a, b in zip(
        rows_of(lists), lists.cu_seqlens[:-1].tolist(), lists.cu_seqlens[1:].tolist(), strict=True
    )))  # fmt: skip
    rest = scored & (torch.arange(len(labels)) >= lists.cu_seqlens[5])
    assert [t["pile_weight"] for t in fewer["teachers"]] == pytest.approx(mean_weights(labels, rest), rel=1e-5)


def test_saturation_and_constant_lists():
    rows = [
        row([1, 0, 0, 0], [0.001, 0.999, 1.0, 1.0], [5.0, 5.0, 5.0, 5.0], [1.0, None, None, None], query_id="a"),
        row([0, 1, 1], [0.0, 1.0, 0.5], [7.0, 7.0, 7.0], [None, 2.0, 3.0], query_id="b"),
    ]
    report = inspect(Contents.from_rows(rows))
    probabilities, constant, sparse = report["teachers"]
    assert probabilities["near_max"] == pytest.approx(4 / 7) and probabilities["near_min"] == pytest.approx(2 / 7)
    assert probabilities["probability"] and not constant["probability"]
    assert constant["constant_lists"] == 1 and probabilities["constant_lists"] == 0
    assert constant["median_query_std"] == 0 and constant["pnr"] == constant["tied_pairs"] == 1
    assert sparse["coverage"] == pytest.approx(3 / 7) and sparse["constant_lists"] == 0  # one scored document is no list
    text = " ".join(report["findings"])
    assert "Constant lists, one logit for every document of a query: t1 (100%)." in text
    assert "highest value the teacher gives: t0 (57%)" in text and "so perhaps probabilities" in text
    assert "scored less than 50% of the documents: t2 (43%)" in text


def test_teachers_that_are_the_same_or_upside_down_are_found():
    labels = [[2, 1, 0, 1], [0, 1, 2, 0]]
    same = [
        row(y, [float(v) for v in y], [3.0 * v - 1 for v in y], [-float(v) for v in y], query_id=str(i))
        for i, y in enumerate(labels)
    ]
    findings = " ".join(inspect(Contents.from_rows(same))["findings"])
    assert "t1 and t0 order 100.0% of 10 pairs alike" in findings and "t2 and t" not in findings
    assert "Worse than chance on the labelled pairs (is higher better?): t2 (0%)." in findings


def test_the_contradicted_label_is_found_first():
    """Three teachers agree with the labels but for one document whose label is wrong."""
    rows = []
    for q in range(6):
        labels = [2, 1, 1, 0, 0]
        logits = [float(y) + 0.1 * i for i, y in enumerate(labels)]
        if q == 4:
            labels = [2, 1, 1, 0, 2]  # the last one
        rows.append(row(labels, logits, [x * 3 for x in logits], [x - 1 for x in logits], query_id=f"q{q}"))
    report = inspect(Contents.from_rows(rows))
    first = report["suspicious_pairs"][0]
    assert (first["query_id"], first["teachers_against"], first["teachers_alike"]) == ("q4", 3, 0)
    assert first["higher"] == {"position": 4, "label": 2} and first["lower"]["position"] in (1, 2)
    assert report["suspicious_queries"] == []  # most pairs of q4 are still in order
    for bad in rows[4:5]:
        bad["labels"] = [0, 0, 0, 1, 2]
    report = inspect(Contents.from_rows(rows), most=1)
    assert report["suspicious_queries"] == [{"query_id": "q4", "pairs_against": 6, "pairs_alike": 1}]
    assert len(report["suspicious_pairs"]) == 1


def test_candidate_pairs_are_brute_forces():
    lists = make_synthetic(30, documents=(1, 15))
    lists.labels[::7] = torch.nan
    mean = pile_fast.pile_ensemble(lists.teacher_logits, lists.labels, cu_seqlens=lists.cu_seqlens, iterations=0).logits
    labels = torch.where(mean.isnan(), torch.nan, lists.labels)
    bounds = lists.cu_seqlens.tolist()
    above, below, query = pile_fast.evaluation.inspection._candidates(mean, labels, lists.cu_seqlens)
    found = {a: b for a, b in zip(above.tolist(), below.tolist(), strict=True)}
    for q in range(len(bounds) - 1):
        for i in range(bounds[q], bounds[q + 1]):
            lower = [j for j in range(bounds[q], bounds[q + 1]) if labels[j] < labels[i]]
            assert (i in found) == bool(lower)
            if lower:
                assert mean[found.pop(i)] == max(mean[j] for j in lower)
    assert not found and len(query) == len(above)


@pytest.mark.parametrize("labels", [[None, None], [1, 1]])
def test_without_pairs_what_needs_them_is_left_out(labels):
    report = inspect(Contents.from_rows([row(labels, [1.0, 2.0], [2.0, 1.0])]))
    assert report["suspicious_pairs"] == report["suspicious_queries"] == []
    assert all("pile_weight" not in teacher for teacher in report["teachers"])
    assert report["agreement"]["pair_agreement"][0][1] == 0
    assert ("labels" in report["agreement"]["names"]) == (labels[0] is not None)


def test_a_teacher_that_scored_nothing_is_said_to():
    report = inspect(Contents.from_rows([row([1, 0], [1.0, 2.0], [None, None])]))
    assert report["teachers"][1] == {
        "name": "t1",
        **dict.fromkeys(("scored", "coverage", "queries_scored", "queries_complete", "pile_weight", "mean_weight"), 0),
    }


# -- the command


class Page(html.parser.HTMLParser):
    """What an HTML page refers to, and its text."""

    def __init__(self, path):
        super().__init__()
        self.sources, self.tags, self.words, self.open = [], set(), [], []
        with open(path, encoding="utf-8") as file:
            self.content = file.read()
        self.feed(self.content)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.open += [] if tag in ("meta", "img", "br") else [tag]
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def test_report_is_one_self_contained_page(capsys, tmp_path):
    rows = list(rows_of(make_synthetic(30), texts=True))
    write_rows("data.parquet", rows)
    report = run("data.parquet", "--most", "5")
    png = (tmp_path / "out/report.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    page = Page("out/report.html")
    assert page.open == [] and "script" not in page.tags and "link" not in page.tags
    (source,) = page.sources
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == png
    assert "url(" not in page.content and "@import" not in page.content
    for teacher in report["teachers"]:
        assert teacher["name"] in page.text and f"{teacher['pnr']:.3f}" in page.text
    assert len(report["suspicious_pairs"]) == 5
    texts = {row["query_id"]: dict(zip(row["doc_ids"], row["documents"], strict=True)) for row in rows}
    for pair in report["suspicious_pairs"]:
        for side in ("lower", "higher"):
            assert (
                texts[pair["query_id"]][pair[side]["doc_id"]] == pair[side]["document"] and pair[side]["document"] in page.text
            )
        assert pair["lower"]["label"] < pair["higher"]["label"] and pair["teachers_against"] > pair["teachers_alike"]
    out = capsys.readouterr().out
    assert "30 queries" in out and "PNR" in out and "Worse than chance" in out


def test_text_is_escaped_and_cut(capsys):
    nasty = "<script>alert('x')</script> & \"quotes\" " + "long " * 200
    rows = [row([1, 0], [0.0, 1.0], query_id="<b>q</b>", query=nasty, documents=[nasty, "{{ 7 * 7 }}"], teachers=["<i>t</i>"])]
    write_rows("data.jsonl", rows)
    report = run("data.jsonl")
    page = Page("out/report.html")
    assert not {"script", "b", "i"} & page.tags and "alert('x')" in page.text and "{{ 7 * 7 }}" in page.text
    assert "<b>q</b>" in page.text and "<i>t</i>" in page.text
    assert len(report["suspicious_pairs"][0]["query"]) < 310 and "<i>t</i>" in capsys.readouterr().out


@pytest.mark.parametrize(
    "teachers, labels",
    [(0, "none"), (0, "graded"), (1, "none"), (1, "continuous"), (1, "graded"), (2, "none"), (30, "graded")],
)
def test_whatever_is_missing_the_report_is_whole(teachers, labels, capsys, tmp_path):
    lists = make_synthetic(8, documents=(1, 9))
    if labels != "graded":
        lists.labels.copy_(torch.nan if labels == "none" else torch.randn(len(lists.labels)))
    logits = torch.randn(len(lists.labels), teachers)
    lists = lists.with_teachers(logits, [f"a teacher of a long name {m}" for m in range(teachers)])
    write_rows("data.jsonl", rows_of(lists))
    report = run("data.jsonl")
    page = Page("out/report.html")
    assert page.open == [] and (tmp_path / "out/report.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    for condition, sentence in ((teachers == 0, "No teachers"), (labels == "none", "No labels")):
        assert (sentence in out) == (sentence in page.text) == condition
    assert (report["labels"]["counts"] is None) == (labels == "continuous")
    assert len(report["teachers"]) == teachers and (report["agreement"] is None) == (teachers == 0)


def test_long_and_short_lists(tmp_path):
    write_rows("data.jsonl", (row([1] + [0] * (n - 1), list(map(float, range(n))), query_id=str(n)) for n in (1, 2, 900)))
    lengths = run("data.jsonl")["list_lengths"]
    assert lengths == {"min": 1, "median": 2, "mean": pytest.approx(301), "max": 900}


def test_broken_rows_and_files(capsys):
    with open("data.jsonl", "w") as file:
        file.write('{"query_id": "a", "features": [[1], [2]], "labels": [1, 0]}\n{"query_id": "b"}\n')
    for arguments, message in (
        (["data.jsonl"], "data.jsonl:2: missing columns"),
        (["gone.jsonl"], "gone.jsonl: no such file"),
        (["data.what"], "data.what: the name does not tell the format"),
        (["data.jsonl", "--from", "parquet"], "data.jsonl: damaged file"),
    ):
        assert main(["inspect", *arguments, "--output", "out"]) == 1
        text = capsys.readouterr().err
        assert text.startswith(f"pile-fast: error: {message}") and text.count("\n") == 1
    report = run("data.jsonl", "--skip-bad-rows")
    assert report["bad_rows"] == 1 and report["queries"] == 1
    assert "Left out 1 broken rows or lines:\n  data.jsonl:2:" in capsys.readouterr().err
    assert main(["inspect", "data.jsonl", "--output", "data.jsonl/out"]) == 1
    assert "cannot write there" in capsys.readouterr().err


@pytest.mark.parametrize("labels", [[-2, -1, 0, 3], [300, 1024, 0, -5], [1e6, 10, 20000000, 20000001]])
def test_any_label_will_do(labels):  # B2
    order = [float(sorted(labels).index(y)) for y in labels]
    right, wrong = inspect(Contents.from_rows([row(labels, order, [-place for place in order])]))["teachers"]
    assert right["ndcg@10"] == 1 and 0 < wrong["ndcg@10"] < 1 and right["pair_accuracy"] == 1
    assert right["pairs"] == 6  # labels that float32 does not tell apart are different


def test_names_of_any_kind_are_shown_and_plotted(capsys):  # B13
    nasty = "$x_{$ <script>alert(1)</script> [b]x[/b] :smile: a\\b {{ 7 }} \x1b[2J\u202e \n %s"
    names = [nasty, "$x$", "n" * 5000]
    rows = [row([1, 0], [0.0, 1.0], [1.0, 1.0], [0.0, None], query_id=nasty, doc_ids=[nasty, "d"], teachers=names)]
    write_rows("data$.jsonl", rows)
    report = run("data$.jsonl")
    assert [teacher["name"] for teacher in report["teachers"]] == names
    assert report["suspicious_pairs"][0]["higher"] == {"label": 1, "doc_id": nasty, "document": None}
    page, out = Page("out/report.html"), capsys.readouterr().out
    assert "script" not in page.tags and "{{ 7 }}" in page.text
    for text in (page.content, out):
        assert "\x1b" not in text and "\u202e" not in text and "\\x1b[2J\\u202e \\n" in " ".join(text.split())
    assert "[b]x[/b]" in out and ":smile:" in out


def test_many_teachers_fit_in_the_report(capsys, monkeypatch):  # B14
    monkeypatch.setattr("pile_fast.evaluation.inspection_report._MOST_PLOTTED", 3)
    monkeypatch.setattr("pile_fast.cli.inspect.MOST_PRINTED", 5)
    lists = make_synthetic(4, documents=(5, 9))
    logits = torch.randn(len(lists.labels), 1).repeat(1, 12)
    lists = lists.with_teachers(logits, [f"t{m}" for m in range(12)])
    write_rows("data.jsonl", rows_of(lists))
    report = run("data.jsonl")
    out = capsys.readouterr().out
    assert len(report["teachers"]) == 12 and "And 7 more teachers, in the report." in out
    assert "46 more pairs of teachers order their documents alike" in out and len(report["findings"]) < 30
    assert "t11" in Page("out/report.html").text


def test_agreement_of_long_lists_and_of_many_queries_is_sampled(monkeypatch):  # B14
    lists = make_synthetic(60, documents=(2, 300))
    contents = Contents.from_rows(rows_of(lists))
    exact = inspect(contents)["agreement"]
    assert exact["documents"] is None
    monkeypatch.setattr(pile_fast.evaluation.inspection, "_SHORT_LIST", 40)
    for most, tolerance in ((60_000, 0.06), (5_000, 0.2)):  # thinner lists; fewer lists, too
        monkeypatch.setattr(pile_fast.evaluation.inspection, "MOST_PAIRS", most)
        report = inspect(contents)
        sampled = report["agreement"]
        assert 100 < sampled["documents"] < 0.9 * len(contents.labels)
        assert max(map(max, sampled["pairs"])) <= most
        assert f"measured on {sampled['documents']:,} documents drawn at random" in report["findings"][-1]
        np.testing.assert_allclose(sampled["pair_agreement"], exact["pair_agreement"], atol=tolerance)
        np.testing.assert_allclose(sampled["kendall_tau"], exact["kendall_tau"], atol=2 * tolerance)


def test_chunks_make_no_difference_to_agreement(monkeypatch):
    lists = make_synthetic(30, documents=(1, 40))
    lists.labels[::5] = torch.nan
    contents = Contents.from_rows(rows_of(lists))
    whole = inspect(contents)["agreement"]
    monkeypatch.setattr(pile_fast.evaluation.inspection, "_CHUNK", 500)
    chunked = inspect(contents)["agreement"]
    assert chunked["pairs"] == whole["pairs"]
    np.testing.assert_allclose(chunked["kendall_tau"], whole["kendall_tau"], rtol=1e-12)


def test_a_list_of_many_documents_takes_linear_time():  # B14
    """100,000 documents, 4 teachers: seconds; listing its pairs would take minutes, and 40 GB."""
    size = 100_000
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(size, 4, generator=rng)
    names = pile_fast.evaluation.inspection.Names()
    names.extend(map(str, range(size)))
    labels = torch.randint(0, 3, (size,), generator=rng).double()
    contents = Contents(["q"], names, labels, logits, torch.tensor([0, size]), list("abcd"), 0, False, 1)
    start = time.process_time()
    report = inspect(contents)
    assert time.process_time() - start < 20
    assert report["agreement"]["documents"] < size and abs(report["agreement"]["kendall_tau"][0][1]) < 0.05


def test_texts_are_read_again_only_where_there_are_any(monkeypatch):
    monkeypatch.setattr("pile_fast.cli.inspect.plot", lambda contents, report, title, path: path.write_bytes(b""))
    calls = []
    read = pile_fast.cli.inspect.read_rows
    monkeypatch.setattr("pile_fast.cli.inspect.read_rows", lambda *a, **k: calls.append(a) or read(*a, **k))
    write_rows("data.jsonl", [row([1, 0], [0.0, 1.0])])
    assert run("data.jsonl")["suspicious_pairs"][0]["higher"]["doc_id"] == "q.0" and len(calls) == 1
    write_rows("data.jsonl", [row([1, 0], [0.0, 1.0], query="why", documents=["a", "b"], features=None)])
    assert run("data.jsonl")["suspicious_pairs"][0]["higher"]["document"] == "a" and len(calls) == 3
