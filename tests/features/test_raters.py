"""Sheets for people, and the agreement of two judges against brute force."""

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.feature_tables import make_context, make_table
from support.judge import answer_strategy

from sae_lens_route.features.judge_prompt import Answer
from sae_lens_route.features.raters import agreement, read_sheet, write_sheet


def test_a_sheet_is_written_blank_and_read_back(tmp_path):
    contexts = [make_context(f, activation=1.0 + i) for f in (3, 8, 9) for i in range(4)]
    contexts.append(make_context(8, token='=1+"x"', left='a;b,"c"\n\0 ', activation=9.0))
    table, path = make_table(contexts), tmp_path / "sheet.csv"
    write_sheet(table, [8, 3, 9], path)
    assert read_sheet(path) == {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["feature"] for row in rows] == ["8", "3", "9"]
    assert rows[0]["contexts"].count("\n") == 4
    assert rows[0]["contexts"].startswith('1. \'=1+"x"\' 9.00: a;b,"c" <ACTIVATED>')
    rows[0].update(category="low-level", score="4", explanation="x, y")
    rows[1].update(category=" High-Level ", score="2 ")
    for delimiter in ",;\t":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        expected = {8: Answer("low-level", 4, "x, y"), 3: Answer("high-level", 2, "")}
        assert read_sheet(path) == expected


def test_a_cell_of_the_sheet_fits_into_a_spreadsheet(tmp_path):
    long = [make_context(0, left="word " * 300, activation=float(i + 1)) for i in range(64)]
    write_sheet(make_table(long), [0], tmp_path / "sheet.csv")
    with (tmp_path / "sheet.csv").open(encoding="utf-8-sig", newline="") as file:
        (row,) = csv.DictReader(file)
    assert 30_000 < len(row["contexts"]) <= 32_767
    assert row["contexts"].startswith("1. 'cat' 64.00")


@pytest.mark.parametrize(
    "row",
    [
        *("3,low-level,,x", "3,,4,x", "3,low,4,x", "3,low-level,4.5,x", "3,low-level,6,x"),
        *(",,,", "x,,,", "3,low-level,4,x\n3,low-level,4,x"),
    ],
)
def test_a_half_filled_or_unclear_row_is_refused(tmp_path, row):
    path = tmp_path / "sheet.csv"
    path.write_text(f"feature,category,score,explanation\n{row}\n")
    with pytest.raises(ValueError, match=r"sheet\.csv"):
        read_sheet(path)
    path.write_text("feature,score\n")
    with pytest.raises(ValueError, match="missing columns: category, explanation"):
        read_sheet(path)


def brute_ranks(values):
    return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]


def brute_pearson(a, b):
    n = len(a)
    mean_a, mean_b = sum(a) / n, sum(b) / n
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    spread = sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b)
    return covariance / spread**0.5


@given(st.lists(st.tuples(answer_strategy, answer_strategy), min_size=1, max_size=25))
def test_agreement_against_brute_force(pairs):
    first = {f: a for f, (a, _) in enumerate(pairs)} | {900: Answer("low-level", 1, "x")}
    second = {f: b for f, (_, b) in enumerate(pairs)} | {901: Answer("low-level", 1, "x")}
    a, b = ([pair[i].score for pair in pairs] for i in (0, 1))
    n = len(pairs)
    result = agreement(first, second)
    assert result.n == n == sum(map(sum, result.counts))
    assert result.exact == pytest.approx(sum(x == y for x, y in zip(a, b, strict=True)) / n)
    close = sum(x - y in (-1, 0, 1) for x, y in zip(a, b, strict=True))
    assert result.within_one == pytest.approx(close / n)
    assert result.same_category == pytest.approx(sum(x[0] == y[0] for x, y in pairs) / n)
    assert result.mean_difference == pytest.approx((sum(b) - sum(a)) / n)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert result.pearson is None and result.spearman is None
    else:
        assert result.pearson == pytest.approx(brute_pearson(a, b))
        assert result.spearman == pytest.approx(brute_pearson(brute_ranks(a), brute_ranks(b)))
    expected = sum(abs(x - y) for x in a for y in b) / n**2
    observed = sum(abs(x - y) for x, y in zip(a, b, strict=True)) / n
    if expected == 0:
        assert result.kappa is None
    else:
        assert result.kappa == pytest.approx(1 - observed / expected)
    assert result.counts[a[0] - 1][b[0] - 1] >= 1


def test_agreement_without_common_features_is_undefined():
    result = agreement({1: Answer("low-level", 1, "x")}, {2: Answer("low-level", 1, "x")})
    assert result.n == 0
    assert set(result[1:-1]) == {None}
