"""Forms for people and what they filled in: blindness, files, statistics against sums by hand."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import cohen_kappa_score

from skipping import skip_or_fail
from slmops.artifacts import Message, Row
from slmops.errors import DataError
from slmops.evaluate.rating_form import RatingForm, as_csv, make_form, render_page, write_form
from slmops.evaluate.ratings import Rating, agreement, find_key, judge_ratings, read_ratings
from slmops.evaluate.significance import bootstrap_interval

NASTY = "</script><script>document.title='taken'</script> & <b>bold</b>"
ROWS = [Row(f"row{number}", (Message("user", f"question {number}"),), "gold") for number in range(40)]
ANSWERS = {
    "small": [f"small {number}" for number in range(40)],
    "large": [NASTY if number == 7 else f"large {number}" for number in range(40)],
}


@pytest.fixture
def form() -> RatingForm:
    return make_form("pairs", ROWS, ANSWERS, seed=4)


def test_sides_and_order_are_drawn_and_nothing_shown_names_a_model(form: RatingForm) -> None:
    first_left = sum(item.models == (0, 1) for item in form.items)
    assert 10 < first_left < 30
    assert [item.row for item in form.items] != [row.id for row in ROWS]
    assert {item.row for item in form.items} == {row.id for row in ROWS}
    for item in form.items:
        assert item.answers == tuple(ANSWERS[form.models[model]][int(item.row[3:])] for model in item.models)
        assert set(item.shown()) == {"item", "prompt", "answers"}
    assert make_form("pairs", ROWS, ANSWERS, seed=4) == form
    assert make_form("pairs", ROWS, ANSWERS, seed=5).id != form.id


def test_the_page_stands_alone_and_reads_no_answer_as_markup(form: RatingForm) -> None:
    page = render_page(form)
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", page)
    assert page.count("</script>") == 2
    data = page.split('id="data">')[1].split("</script>")[0]
    assert [item["answers"] for item in json.loads(data)["items"]] == [list(item.answers) for item in form.items]
    assert "row1" not in data


def test_the_page_in_a_browser(form: RatingForm, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        skip_or_fail("no chromium is installed")
    write_form(form, tmp_path / "form.html")
    # Two ratings by key, then the file is saved: what it holds stands in the title.
    script = """
<script>
addEventListener("load", () => {
  const press = key => dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  const show = text => { document.title = text.replace(/\\s+/g, " "); };
  URL.createObjectURL = blob => { blob.text().then(show); return "#"; };
  document.getElementById("rater").value = "Ann"; document.getElementById("rater").oninput({target: {value: "Ann"}});
  press("1"); press("3"); press("s");
});
</script></body>"""
    page = (tmp_path / "form.html").read_text().replace("</body>", script)
    (tmp_path / "pressed.html").write_text(page)
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
    done = subprocess.run(
        [*command, f"--user-data-dir={tmp_path}/profile", (tmp_path / "pressed.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "2 of 40 rated" in done.stdout, done.stderr
    assert "Question 3 of 40" in done.stdout
    title = html.unescape(re.findall(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[0])
    saved = json.loads(title)
    assert (saved["rater"], saved["form"]) == ("Ann", form.id)
    assert [(one["item"], one["rating"]) for one in saved["ratings"]] == [("q001", "left"), ("q002", "right")]
    (tmp_path / "saved.json").write_text(title)
    assert len(read_ratings(tmp_path / "saved.json", form.key())) == 2


def prefer(form: RatingForm, winner: int, items: slice = slice(None), rater: str = "Ann") -> list[Rating]:
    return [Rating(rater, item.id, "left" if item.models[0] == winner else "right") for item in form.items[items]]


def test_preferences_are_counted_behind_the_drawn_sides(form: RatingForm) -> None:
    ratings = [
        *prefer(form, 0, slice(0, 24)),
        *prefer(form, 1, slice(24, 34)),
        *(Rating("Ann", item.id, "same") for item in form.items[34:38]),
    ]
    found = judge_ratings(ratings, form.key(), seed=2)
    assert found.models == ("small", "large")
    assert found.counts == {"first": 24, "same": 4, "second": 10}
    values = [1.0] * 24 + [0.0] * 10 + [0.5] * 4
    assert found.means == pytest.approx((26 / 38, 12 / 38))
    assert found.intervals[0] == bootstrap_interval(values, 2)
    assert found.test is not None
    assert found.test.difference == pytest.approx(14 / 38)
    assert found.test.significant
    assert (found.items, found.unrated, found.kappa) == (38, 2, None)


def test_an_item_counts_once_however_many_looked_at_it(form: RatingForm) -> None:
    alone = judge_ratings(prefer(form, 0, slice(0, 10)), form.key())
    crowd = [one for rater in ("A", "B", "C") for one in prefer(form, 0, slice(0, 5), rater)]
    together = judge_ratings([*crowd, *prefer(form, 1, slice(5, 10))], form.key())
    assert alone.means[0] == 1
    assert together.means[0] == 0.5
    assert together.test is not None
    assert not together.test.significant


def test_agreement_is_kappa_meant_over_the_pairs(form: RatingForm) -> None:
    said = {"A": "left left same right", "B": "left same same right", "C": "right left same left"}
    words = {rater: text.split() for rater, text in said.items()}
    ratings = [
        Rating(rater, item.id, word)
        for rater, given in words.items()
        for item, word in zip(form.items, given, strict=False)
    ]
    pairs = [("A", "B"), ("A", "C"), ("B", "C")]
    wanted = sum(cohen_kappa_score(words[a], words[b]) for a, b in pairs) / 3
    assert agreement(ratings, form.key()) == pytest.approx(wanted)
    assert agreement(prefer(form, 0), form.key()) is None


def test_scores_of_two_models_and_of_one() -> None:
    form = make_form("scores", ROWS[:10], {name: given[:10] for name, given in ANSWERS.items()}, seed=0)
    assert len(form.items) == 20
    ratings = [Rating("A", item.id, 4 if item.models == (0,) else 2) for item in form.items]
    ratings += [Rating("B", item.id, 5 if item.models == (0,) else 2) for item in form.items]
    found = judge_ratings(ratings, form.key())
    assert found.means == (4.5, 2)
    assert found.test is not None
    assert found.test.difference == 2.5
    assert found.counts == {"1": 0, "2": 20, "3": 0, "4": 10, "5": 10}
    weighted = cohen_kappa_score([4] * 10 + [2] * 10, [5] * 10 + [2] * 10, labels=[1, 2, 3, 4, 5], weights="quadratic")
    assert found.kappa == pytest.approx(weighted)
    alone = make_form("scores", ROWS[:3], {"small": ANSWERS["small"][:3]}, seed=0)
    one = judge_ratings([Rating("A", item.id, 3) for item in alone.items], alone.key())
    assert (one.means, one.test) == ((3.0,), None)


def test_a_table_and_lines_are_filled_in_as_well(form: RatingForm, tmp_path: Path) -> None:
    page, table, lines, key = write_form(form, tmp_path / "form.html")
    rows = list(csv.DictReader(table.open(newline="")))
    rows[0]["rating"], rows[1]["rating"], rows[1]["comment"] = " Left ", "same", "both rude"
    with (tmp_path / "bo.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    found = read_ratings(tmp_path / "bo.csv", find_key(tmp_path / "bo.csv"))
    assert found == [Rating("bo", "q001", "left"), Rating("bo", "q002", "same", "both rude")]
    filled = [json.loads(line) for line in lines.read_text().splitlines()]
    filled[2] |= {"rating": "right", "rater": "Cy"}
    (tmp_path / "cy.jsonl").write_text("\n".join(map(json.dumps, filled)))
    assert read_ratings(tmp_path / "cy.jsonl", json.loads(key.read_text())) == [Rating("Cy", "q003", "right")]
    assert page.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"form": "0" * 16}, "fills in the form 0000"),
        ({"ratings": [{"item": "q999", "rating": "left"}]}, "There is no item 'q999'"),
        ({"ratings": [{"item": "q001", "rating": "best"}]}, "'best' is no rating. Write one of left, same, right"),
        ({"ratings": [{"item": "q001", "rating": "left"}] * 2}, "Ann rated q001 twice"),
        ({"ratings": []}, "Nothing was rated"),
        ({"ratings": 3}, "This is no file of ratings"),
    ],
)
def test_ratings_that_cannot_count_are_refused(
    form: RatingForm, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    whole = {"schema": 1, "form": form.id, "rater": "Ann", "ratings": [{"item": "q001", "rating": "left"}], **change}
    (tmp_path / "ann.json").write_text(json.dumps(whole))
    with pytest.raises(DataError, match=said):
        judge_ratings(read_ratings(tmp_path / "ann.json", form.key()), form.key())


def test_the_key_is_that_of_the_form(form: RatingForm, tmp_path: Path) -> None:
    other = make_form("pairs", ROWS, ANSWERS, seed=9)
    write_form(other, tmp_path / "other.html")
    (tmp_path / "ann.json").write_text(json.dumps({"form": form.id, "rater": "Ann", "ratings": []}))
    with pytest.raises(DataError, match=f"form {form.id}, whose key is not in {tmp_path}"):
        find_key(tmp_path / "ann.json")
    with pytest.raises(DataError, match=r"whose key .*other\.key\.json is not"):
        find_key(tmp_path / "ann.json", tmp_path / "other.key.json")
    assert as_csv(form).splitlines()[0] == "form,item,prompt,left,right,rating,comment"
