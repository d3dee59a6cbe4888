"""People label in a real headless Chromium, by keyboard alone, on a narrow screen and in the dark."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.helpers.browser import chromium, watched
from tests.helpers.preferences import write
from tests.helpers.service import Running, ended_labelling, upload

GUIDELINE = "Prefer the **longer** answer.\n\n- Read both.\n- <b>No HTML</b>"
HOSTILE = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> [x](javascript:alert(1)) ![i](http://example.com/i.png)"
Choose = Callable[[str, list[str]], str]
"""The keys that a person presses, from the prompt and the answers as they are shown."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def labelling(service: Running, folder: Path, rows: list[dict[str, Any]], **people: Any) -> str:
    """A labelling that waits for people, with a grader as a second labeller."""
    data = upload(service, write(folder / "rows.jsonl", rows), "fine-tune")
    likeness = {
        "type": "text_similarity", "name": "likeness", "evaluation_metric": "fuzzy_match",
        "input": "{{sample.output_text}}", "reference": "{{item.prompt}}",
    }  # fmt: skip
    body = {
        "data": data, "own_answers": True, "name": "which is better?", "seed": 1,
        "labellers": [{"people": {"guideline": GUIDELINE, **people}}, {"grader": likeness}],
    }  # fmt: skip
    with service.http() as http:
        created = http.post("/labellings", json=body)
        assert created.status_code == 200, created.text
        labelling_id = str(created.json()["id"])
        service.until(lambda: http.get(f"/labellings/{labelling_id}").json()["awaits"] == "people", "the items")
    return labelling_id


def key_of(service: Running, name: str) -> str:
    with service.http() as http:
        created = http.post("/keys", json={"name": name, "scopes": ["label"]}).raise_for_status()
    return str(created.json()["key"])


def sign_in(page: Page, service: Running, key: str) -> None:
    """Sign in by keyboard. A key that may only label begins at its own list."""
    page.goto(service.url.removesuffix("/v1") + "/dashboard")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type(key)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Label", exact=True)).to_be_visible()


def begin(page: Page, labelling_id: str) -> None:
    """Open the labelling by Tab and Enter."""
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.getAttribute('href')") == f"/dashboard/label/{labelling_id}":
            break
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="which is better?")).to_be_visible()


def shown(page: Page) -> tuple[int, str, list[str]]:
    """(item, prompt, answers) of the page."""
    answers = [text.strip() for text in page.locator(".answers .text").all_inner_texts()]
    return int(page.locator("input[name=item]").input_value()), page.locator(".prompt").inner_text().strip(), answers


def press(page: Page, keys: list[str]) -> None:
    for key in keys:
        page.keyboard.press(key)


def work(page: Page, choose: Callable[[str, list[str]], list[str]]) -> list[int]:
    """Label until nothing is left. Returns the items."""
    done = []
    while page.locator("#label .answers").count():
        item, prompt, answers = shown(page)
        done.append(item)
        with page.expect_navigation():
            press(page, choose(prompt, answers))
    return done


def longer(_prompt: str, answers: list[str]) -> list[str]:
    return ["1" if len(answers[0]) > len(answers[1]) else "2"]


def test_three_people_with_known_bias_label_a_file_that_trains_a_model(
    browser: Browser, service: Running, tmp_path: Path
) -> None:
    """Anna takes the longer answer, Ben the shorter one, and Cleo the longer one of every second prompt."""
    rows = [
        {"prompt": f"prompt {k}", "chosen": f"answer {k}", "rejected": f"a much longer answer {k}"} for k in range(6)
    ]
    labelling_id = labelling(service, tmp_path, rows, verdicts=3)
    bias: dict[str, Callable[[str], bool]] = {
        "anna": lambda prompt: True, "ben": lambda prompt: False, "cleo": lambda prompt: int(prompt[-1]) % 2 == 0,
    }  # fmt: skip
    looks: dict[str, dict[str, Any]] = {
        "anna": {"viewport": {"width": 400, "height": 800}}, "ben": {"color_scheme": "dark"}, "cleo": {},
    }  # fmt: skip
    for name, prefers_longer in bias.items():
        context = browser.new_context(**looks[name])
        page = context.new_page()
        problems = watched(page)
        sign_in(page, service, key_of(service, name))
        begin(page, labelling_id)
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), name

        def choose(prompt: str, answers: list[str], prefers_longer: Any = prefers_longer) -> list[str]:
            is_longer = len(answers[0]) > len(answers[1])
            return ["1" if is_longer == prefers_longer(prompt) else "2"]

        assert sorted(work(page, choose)) == list(range(6))
        assert problems == []
        context.close()
    ended = ended_labelling(service, labelling_id)
    metrics = ended["metrics"]
    assert metrics["people/verdicts"] == 18 and metrics["people/flagged"] == 0
    # Anna and Ben never agree. Cleo agrees with each of them on half of the prompts.
    assert metrics["people/agreement"] == pytest.approx((0 + 0.5 + 0.5) / 3)
    # Each class is given in half of all cases, so that chance agrees in half of them.
    assert metrics["people/kappa"] == pytest.approx((1 / 3 - 0.5) / 0.5)
    with service.http() as http:
        content = http.get(f"/files/{ended['file']}/content").raise_for_status().text
        for row in map(json.loads, content.splitlines()):
            number = int(row["prompt"][-1])
            assert set(row["people"]) == {"anna", "ben", "cleo"}
            assert ("longer" in row["responses"][0]) == (number % 2 == 0), "two of three decide"
            assert row["scores"] == pytest.approx([2 / 3, 1 / 3])
        report = http.get(f"/labellings/{labelling_id}/report").json()
        assert [one["name"] for one in report["people"]["annotators"]] == ["anna", "ben", "cleo"]
        assert report["people"]["pairs"] == 18 and "kappa@grader" in metrics
        body = {
            "model": "tiny", "training_file": ended["file"], "validation_split": 0.0,
            "method": {"type": "dpo", "dpo": {"hyperparameters": {"max_steps": 2}}},
        }  # fmt: skip
        job_id = http.post("/fine_tuning/jobs", json=body).raise_for_status().json()["id"]
    service.wait_for(job_id, lambda job: job["status"] == "succeeded")


def test_answers_are_ranked_tied_skipped_flagged_and_undone_by_keyboard(
    browser: Browser, service: Running, tmp_path: Path
) -> None:
    rows = [{"prompt": f"prompt {k}", "responses": ["one", "three!", "fourteen"]} for k in range(4)]
    labelling_id = labelling(service, tmp_path, rows)
    page = browser.new_page()
    problems = watched(page)
    sign_in(page, service, key_of(service, "dora"))
    begin(page, labelling_id)

    def key(text: str) -> str:
        return str(shown(page)[2].index(text) + 1)

    with page.expect_navigation():  # one is left after two: it is the last
        press(page, [key("fourteen"), key("three!"), "Enter"])
    page.keyboard.press(key("one"))
    expect(page.locator("output.rank", has_text="rank 1")).to_have_count(1)
    page.keyboard.press("Backspace")
    expect(page.locator("output.rank", has_text="rank")).to_have_count(0)
    with page.expect_navigation():  # two are equally good
        press(page, [key("one"), "=", key("three!"), "Enter"])
    with page.expect_navigation():
        press(page, ["s"])
    with page.expect_navigation():
        press(page, ["u"])
    assert shown(page)[1] == "prompt 2", "the skipped one is back"
    page.locator("input[name=reason]").focus()
    page.keyboard.type("1 of 3 is 's' and 'u'")
    with page.expect_navigation():  # in the field of the reason, Enter flags
        press(page, ["Enter"])
    with page.expect_navigation():  # all three
        press(page, [key("one"), "=", key("fourteen"), "=", "Enter"])
    expect(page.get_by_role("status")).to_contain_text("not open")
    ended = ended_labelling(service, labelling_id)
    assert ended["metrics"]["people/flagged"] == 1 and ended["metrics"]["rows"] == 2
    with service.http() as http:
        verdicts = http.get(f"/labellings/{labelling_id}/verdicts").json()["data"]
        content = http.get(f"/files/{ended['file']}/content").text
    assert [(one["item"], one["ranking"], one["flag"], one["withdrawn_at"] is None) for one in verdicts] == [
        (0, [[2], [1], [0]], None, True),
        (1, [[0, 1], [2]], None, True),
        (2, None, None, False),
        (2, None, "1 of 3 is 's' and 'u'", True),
        (3, [[0, 1, 2]], None, True),
    ]
    scores = [row["scores"] for row in map(json.loads, content.splitlines())]
    assert scores == [[1.0, 0.5, 0.0], [0.75, 0.75, 0.0]], "the last one has no order, and the flagged one no score"
    assert problems == []


def test_text_of_models_does_nothing_on_the_page(browser: Browser, service: Running, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": f"prompt {HOSTILE}",
            "chosen": f"# A\n\n```python\nprint('<b>')\n```\n{HOSTILE}",
            "rejected": "**no**",
        }
    ]
    labelling_id = labelling(service, tmp_path, rows)
    page = browser.new_page()
    problems, requests = watched(page), list[str]()
    page.on("request", lambda request: requests.append(request.url))
    sign_in(page, service, key_of(service, "eve"))
    begin(page, labelling_id)
    assert page.title() == "Label which is better?"
    assert page.locator("main img, main script, main iframe").count() == 0
    assert page.locator("main a[href^=javascript]").count() == 0
    assert page.locator(".answers pre code").inner_text().strip() == "print('<b>')"
    assert page.locator(".answers strong").inner_text() == "no"
    page.locator("summary").click()
    assert "<b>No HTML</b>" in page.locator(".guideline").inner_text()
    assert all(url.startswith(service.url.removesuffix("/v1")) for url in requests), "nothing is loaded from elsewhere"
    assert problems == []


def test_a_key_that_may_only_label_has_no_other_page(browser: Browser, service: Running, tmp_path: Path) -> None:
    page = browser.new_page()
    sign_in(page, service, key_of(service, "fay"))
    root = service.url.removesuffix("/v1")
    for path in ("", "/evaluations", "/sweeps", "/jobs/ftjob-x", "/files/file-x"):
        page.goto(f"{root}/dashboard{path}")
        expect(page.get_by_role("heading", name="Label", exact=True)).to_be_visible()
