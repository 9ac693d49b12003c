"""What the asset pages show: rows over the weeks, twins side by side, pictures that are well-formed."""

from __future__ import annotations

import base64
import datetime
import re
from xml.etree import ElementTree

import polars as pl

from finetune_assets.assets.plots import funnel_plot, stacked_plot
from finetune_assets.dataset import by_week, choose, sample_rows
from finetune_assets_tests.dataset.small_corpus import START, Corpus, dental
from finetune_assets_tests.dataset.test_twins import ANSWER, ASK, TEST, TRAIN


def svg(markdown: str) -> ElementTree.Element:
    found = re.fullmatch(r"!\[.*\]\(data:image/svg\+xml;base64,(.*)\)", markdown)
    assert found
    return ElementTree.fromstring(base64.b64decode(found[1]))


def test_rows_over_the_weeks_add_up_and_rare_values_are_one() -> None:
    names = [f"intent <{n % 9}>" for n in range(300) for _ in range(n % 9 + 1)]
    started = [START + datetime.timedelta(days=n % 40) for n in range(len(names))]
    weeks = by_week(pl.DataFrame({"intent": names, "started_at": started}), "intent")
    assert list(weeks) == sorted(weeks)
    assert all(datetime.date.fromisoformat(week).weekday() == 0 for week in weeks)
    assert sum(sum(values.values()) for values in weeks.values()) == len(names)
    assert [list(values) for values in weeks.values()] == [[f"intent <{n}>" for n in (8, 7, 6, 5, 4)] + ["other"]] * len(weeks)
    picture = svg(stacked_plot(weeks, "intent"))
    bars = picture.findall(".//{*}rect")
    assert len(bars) == sum(n > 0 for values in weeks.values() for n in values.values())
    assert {title.text for title in picture.findall(".//{*}title")} >= {
        f"{next(iter(weeks))}: other {weeks[next(iter(weeks))]['other']}"
    }
    assert stacked_plot({}, "intent") == "(nothing yet)"


def test_the_funnel_shows_what_was_added(corpus: Corpus) -> None:
    steps = [{"step": "read", "dropped": 0, "left": 10}, {"step": "a<b", "dropped": 4, "left": 6}]
    texts = [t.text for t in svg(funnel_plot([*steps, {"step": "added", "dropped": -2, "left": 8}])).findall(".//{*}text")]
    assert texts == ["read", "10", "a<b", "6  (−4)", "added", "8  (+2)"]


def test_removed_twins_stand_beside_what_was_kept(corpus: Corpus) -> None:
    corpus.fill()
    kept = corpus.example(1, user_text=ASK, reply=ANSWER, **TEST)
    near = corpus.example(2, user_text=ASK, reply=ANSWER.replace("cuarenta", "cuarent"), **TRAIN)
    corpus.example(3, user_text=ASK, reply=ANSWER.upper(), **TRAIN)
    bad = corpus.example(4, user_text="¿Qué hora es allí?", reply="No lo sé, pregunte a otro por favor.")
    same = corpus.example(5, user_text="¿Qué hora es allí?", reply="No lo sé, pregunte a otro, por favor")
    corpus.rate(bad, "negative", "Son las cinco en punto de la tarde.")
    choice = choose(corpus.write(), dental())
    twins = {row["reason"]: row for row in choice.notes["twins"]}
    assert set(twins) == {"near_duplicate", "same_as_negative", "exact_duplicate"}
    assert (twins["near_duplicate"]["message_id"], twins["near_duplicate"]["kept_message_id"]) == (near, kept)
    assert twins["near_duplicate"]["kept"] == f"{ASK}\n{ANSWER}"
    assert 0.9 <= twins["near_duplicate"]["similarity"] < 1 == twins["exact_duplicate"]["similarity"]
    assert twins["same_as_negative"]["message_id"] == same
    assert "No lo sé" in twins["same_as_negative"]["kept"]  # the reply as it was said, not its correction
    assert len(sample_rows(choice.kept, 3)) == 3
