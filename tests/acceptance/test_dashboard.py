"""The dashboard in a real headless Chromium: sign in, follow a job and read a report.

`make pictures` runs these tests to take the pictures of docs/.
"""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from playwright.sync_api import Page, expect

from app.spec.hyperparameters import DPOHyperparameters, SupervisedHyperparameters
from app.spec.metrics import CHARTS, measured
from tests.helpers.browser import chromium, watched
from tests.helpers.preferences import pairs, write
from tests.helpers.service import Running, create_job, job_body

PICTURES = os.environ.get("DASHBOARD_PICTURES")
"""The folder for the pictures of docs/. Without it, no pictures are taken."""


@pytest.fixture
def page() -> Iterator[Page]:
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        problems = watched(page)
        yield page
    assert problems == []


def picture(page: Page, name: str) -> None:
    """Take a picture of the page if `PICTURES` is set."""
    if PICTURES:
        page.screenshot(path=Path(PICTURES) / f"{name}.png", full_page=False)


def moving_picture(page: Page, name: str, status: str) -> None:
    """Record the page of a job as an animated PNG until the job has `status`, if `PICTURES` is set."""
    if not PICTURES:
        return
    from PIL import Image

    screenshots = []
    while page.locator("#job").get_attribute("data-status") != status:
        screenshots.append(page.screenshot())
        page.wait_for_timeout(300)  # milliseconds between two frames
    screenshots.append(page.screenshot())
    first, *rest = [Image.open(io.BytesIO(content)).convert("RGB").quantize(24, dither=0) for content in screenshots]
    path = Path(PICTURES) / f"{name}.png"
    first.save(path, save_all=True, append_images=rest, duration=[250] * len(rest) + [4000], loop=0)


TRAITS = DPOHyperparameters().traits | SupervisedHyperparameters().traits
DRAWN = [title for title, names in CHARTS.items() if set(names) & set(measured(TRAITS, validates=True))]
"""The charts of a job with SFT and DPO."""


def test_people_follow_a_job_and_read_a_report_in_the_browser(page: Page, service: Running, tmp_path: Path) -> None:
    with service.http() as http:
        root = str(httpx2.URL(service.url).join("/dashboard"))
        with service.openai() as client:
            rows = [*pairs(60, seed=1), {"prompt": "x", "chosen": "same", "rejected": "same"}]
            file = client.files.create(file=write(tmp_path / "train.jsonl", rows), purpose="fine-tune")
        steps = {"max_steps": 900, "learning_rate": 6e-5} if PICTURES else {"max_steps": 150}
        body = job_body(
            file.id,
            hyperparameters={**steps, "eval_every": 15},
            gates=[{"metric": "eval/rewards/accuracies", "min": 0.6}],
        )
        job_id = create_job(http, **body)

        page.goto(root)
        expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        refused = httpx2.post(f"{root}/login", data={"key": "wrong"})
        assert refused.status_code == 401 and "not valid" in refused.text and "set-cookie" not in refused.headers
        page.get_by_label("API key").fill(service.key)
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("heading", name="Jobs of the project default")).to_be_visible()
        expect(page.get_by_role("link", name=job_id)).to_be_visible()
        (cookie,) = page.context.cookies()
        assert cookie["httpOnly"] and cookie["sameSite"] == "Strict" and service.key not in cookie["value"]

        page.get_by_role("link", name=job_id).click()
        expect(page.locator("#charts canvas")).to_have_count(len(DRAWN))  # drawn while it trains
        moving_picture(page, "dashboard", "succeeded")
        expect(page.locator("#job")).to_have_attribute("data-status", "succeeded", timeout=120_000)
        expect(page.get_by_role("cell", name="eval/rewards/accuracies")).to_be_visible()
        expect(page.locator(".events li").first).to_contain_text("succeeded")
        page.reload()
        expect(page.locator("#charts canvas")).to_have_count(len(DRAWN))
        picture(page, "dashboard-job")
        page.goto(root)
        expect(page.locator(".state.succeeded").first).to_be_visible()

        page.goto(f"{root}/files/{file.id}?model=tiny")
        expect(page.get_by_role("heading", name="As tiny sees it")).to_be_visible()
        expect(page.get_by_role("cell", name="identical_responses")).to_be_visible()
        picture(page, "dashboard-report")

        page.get_by_role("button", name="Sign out").click()
        page.goto(f"{root}/jobs/{job_id}")
        expect(page.get_by_role("heading", name="Sign in")).to_be_visible()


def test_every_page_without_a_session_leads_to_the_sign_in(service: Running) -> None:
    root = str(httpx2.URL(service.url).join("/dashboard"))
    for path in (
        "",
        "/jobs/ftjob-x",
        "/jobs/ftjob-x/metrics",
        "/files/file-x",
        "/evaluations",
        "/evaluations/eval-x",
        "/sweeps",
        "/sweeps/sweep-x",
        "/sweeps/sweep-x/frontier",
    ):
        response = httpx2.get(root + path)
        assert (response.status_code, response.headers["location"]) == (303, "/dashboard/login")
        assert httpx2.get(root + path, cookies={"dpo_session": "forged"}).status_code == 303
    page = httpx2.get(f"{root}/login")
    assert "default-src 'self'" in page.headers["content-security-policy"]


def test_the_api_reference_asks_no_other_host(service: Running, page: Page) -> None:
    """Its content security policy would block it, and the browser would say so."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    root = service.url.removesuffix("/v1")
    page.goto(f"{root}/docs")
    expect(page.locator(".opblock").first).to_be_visible()
    assert page.locator(".opblock").count() > 50
    assert all(url.startswith((f"{root}/", "data:")) for url in asked)
