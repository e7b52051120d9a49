"""The page of a vote: who may ask for it, and how it works in headless Chromium.

Screenshots are kept in outputs/vote_screenshots/, to be looked at.
"""

import http.client
import json
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image, ImageDraw

from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.rewards.ballot import Ballot
from qzo_diffusion.rewards.vote_server import HOST, served
from qzo_diffusion.rewards.votes import VoteFile, pairs_of_round
from tests import browser

KEPT = Path(__file__).parents[2] / "outputs/vote_screenshots"
ROUNDS, PAIRS = 2, 3
PROMPTS = [
    "a red apple",
    "a <b>bold</b> house & a fish with a rather long name, to be wrapped",
    "x",
]
in_browser = pytest.mark.skipif(browser.missing() is not None, reason=str(browser.missing()))


def drawing(sides, colour):
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).regular_polygon((32, 32, 26), sides, fill=colour)
    return image


@contextmanager
def voting(run):
    """A vote without a model: a thread draws plain pictures and waits, as a run does. Yields the
    address, and the rounds that were finished."""
    ballot, file, over, finished = Ballot(PAIRS, ROUNDS), VoteFile(run), threading.Event(), []

    def draw():
        for step in range(ROUNDS):
            pairs = pairs_of_round(PROMPTS, 0, step)
            known = file.of_round(step)
            ballot.begin(step, pairs, known, lambda *one, step=step: file.add(step, *one))
            for pair in pairs:
                if pair.place not in known:
                    ballot.show(pair, drawing(3 + pair.place, "red"), drawing(3, "navy"))
            choices = ballot.wait(lambda: over.is_set() or ballot.stopped)
            if choices is None:
                return
            finished.append(choices)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        with served(ballot, "ink & <paper>") as address:
            yield address, finished
    finally:
        over.set()
        thread.join(10)


def answer(address, method="GET", body=None, **headers):
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
    try:
        query = f"?{place.query}" if place.query else ""
        connection.request(method, place.path + query, body, headers)
        found = connection.getresponse()
        return found.status, found.read(), found.headers
    finally:
        connection.close()


@pytest.fixture
def vote(tmp_path):
    with voting(tmp_path / "votes.jsonl") as (address, finished):
        yield address, finished


def waited(found, seconds=30):
    stop = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < stop
        time.sleep(0.02)
    return value


def test_without_the_token_everything_is_refused(vote):
    address, _ = vote
    token = urlsplit(address).path.strip("/")
    root = address.removesuffix(f"{token}/")
    places = ["", "state", "picture/1/1/left", f"{token}", f"{token[:-1]}/", f"x{token}/state"]
    for place in [*places, f"%2e/{token}/", "é/", f"{token.swapcase()}/"]:
        for method in ("GET", "POST"):
            status, body, _ = answer(root + place.replace("é", "%C3%A9"), method, body="{}")
            assert (status, body) == (403, b"Forbidden\n"), place
    assert answer(f"{address}state")[0] == 200
    assert len(token) >= 32


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Host": "evil.example:80"}, {"Origin": "http://evil.x"}]
)
def test_a_page_of_another_site_is_refused_even_with_the_token(vote, headers):
    address, _ = vote
    assert answer(f"{address}state", **headers)[0] == 403
    assert answer(f"{address}stop", "POST", **headers)[0] == 403
    assert not json.loads(answer(f"{address}state")[1])["stopped"]


def test_it_listens_on_this_machine_alone_and_its_page_asks_nobody_else(vote):
    address, _ = vote
    assert urlsplit(address).hostname == HOST == "127.0.0.1"
    status, body, headers = answer(address)
    assert status == 200
    text = body.decode()
    assert "http://" not in text
    assert "https://" not in text
    assert "ink &amp; &lt;paper&gt;" in text
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"


def test_two_starts_have_two_tokens(tmp_path):
    with voting(tmp_path / "a") as (first, _), voting(tmp_path / "b") as (second, _):
        other = urlsplit(first).path
        assert other != urlsplit(second).path
        assert answer(f"http://{HOST}:{urlsplit(second).port}{other}state")[0] == 403


@pytest.mark.parametrize(
    "body",
    [
        "",
        "no JSON",
        "[]",
        '{"round": 1}',
        '{"round": 1, "pair": 1, "choice": "both"}',
        '{"round": true, "pair": 1, "choice": "left"}',
        '{"round": 1, "pair": 1, "choice": ["left"]}',
        " " * 5000,
    ],
)
def test_what_is_no_choice_changes_nothing(vote, body):
    address, _ = vote
    waited(lambda: json.loads(answer(f"{address}state")[1])["ready"])
    assert answer(f"{address}choice", "POST", body)[0] == 400
    assert json.loads(answer(f"{address}state")[1])["done"] == 0
    assert answer(f"{address}nothing")[0] == answer(f"{address}nothing", "POST")[0] == 404
    assert answer(f"{address}picture/1/99/left")[0] == 404


def test_a_port_that_is_taken_is_told(vote):
    address, _ = vote
    with (
        pytest.raises(ConfigError, match="can't be used"),
        served(Ballot(1, 1), "", urlsplit(address).port),
    ):
        pass
    with pytest.raises(ConfigError, match="can't be used"), served(Ballot(1, 1), "", 2**20):
        pass


def test_choices_come_from_requests_and_survive_the_server(tmp_path):
    file = tmp_path / "votes.jsonl"
    with voting(file) as (address, finished):
        waited(lambda: json.loads(answer(f"{address}state")[1])["ready"])
        given = {"round": 1, "pair": 1, "choice": "right"}
        state = json.loads(answer(f"{address}choice", "POST", json.dumps(given))[1])
        assert state["done"] == 1
        assert finished == []
    with voting(file) as (address, finished):
        waited(lambda: json.loads(answer(f"{address}state")[1])["done"] == 1)
        for pair in (2, 3):
            given = {"round": 1, "pair": pair, "choice": "left"}
            ready = {"pair": pair, "ready": True}.items()
            waited(lambda ready=ready: ready <= json.loads(answer(f"{address}state")[1]).items())
            answer(f"{address}choice", "POST", json.dumps(given))
        assert waited(lambda: finished) == [{0: "right", 1: "left", 2: "left"}]


@pytest.fixture(scope="module")
def chromium():
    with browser.browser() as opened:
        yield opened


@pytest.fixture
def page(chromium, vote):
    chromium.emulate(dark=False, width=1280, height=900)
    chromium.open(vote[0])
    ready(chromium)
    yield chromium
    chromium.open("about:blank")  # a page whose program ends complains
    chromium.complaints()


def text(page, name):
    return page.run(f"return document.getElementById({name!r}).textContent")


def ready(page, done=None):
    """Wait for a pair that can be chosen, with so many pairs done."""
    shown = "return !document.getElementById('choose-left').disabled"
    waited(lambda: page.run(shown) and done in (None, int(text(page, "done"))))


LEFT, RIGHT, DOWN, BACK, ESCAPE = "\ue012", "\ue014", "\ue015", "\ue003", "\ue00c"


@in_browser
def test_keys_alone_are_enough(page, vote):
    page.keys("body", LEFT)
    ready(page, 1)
    assert text(page, "prompt") == PROMPTS[1]
    page.keys("body", RIGHT)
    ready(page, 2)
    page.keys("body", BACK)
    ready(page, 1)
    page.keys("body", DOWN)
    ready(page, 2)
    page.keys("body", RIGHT)
    ready(page, 3)
    assert vote[1] == [{0: "left", 1: "equal", 2: "right"}]
    assert (text(page, "round"), text(page, "place"), text(page, "left")) == ("2", "1", "3")
    page.keys("body", BACK)  # a finished round is in the journal
    ready(page, 3)
    for done in (4, 5):
        page.keys("body", LEFT)
        ready(page, done)
    page.keys("body", LEFT)
    waited(lambda: "Thank you" in text(page, "status"))
    assert len(vote[1]) == ROUNDS
    assert page.complaints() == []


@in_browser
def test_clicks_do_the_same(page, vote):
    page.click("#picture-right")
    ready(page, 1)
    page.click("#choose-equal")
    ready(page, 2)
    page.click("#undo")
    ready(page, 1)
    page.click("#choose-left")
    ready(page, 2)
    page.click("#choose-right")
    ready(page, 3)
    assert vote[1] == [{0: "right", 1: "left", 2: "right"}]
    page.click("#stop")
    waited(lambda: "Stopped" in text(page, "status"))
    assert page.run("return document.querySelectorAll('button:enabled').length") == 0
    assert page.complaints() == []


@in_browser
def test_a_page_that_was_closed_shows_the_same_pair_again(page, vote):
    page.keys("body", LEFT)
    ready(page, 1)
    page.open("about:blank")
    page.open(vote[0])
    ready(page, 1)
    assert text(page, "prompt") == PROMPTS[1]
    page.keys("body", ESCAPE)
    waited(lambda: "Stopped" in text(page, "status"))
    assert page.complaints() == []


@in_browser
def test_it_asks_nobody_else_and_names_everything(page, vote):
    asked = page.run("return performance.getEntriesByType('resource').map(one => one.name)")
    assert asked
    assert all(one.startswith((vote[0], "data:")) for one in asked)
    assert page.run("return [...document.images].every(one => one.alt && one.naturalWidth == 64)")
    assert (
        page.run("return [...document.querySelectorAll('button')].filter(one => !one.innerText)")
        == []
    )


@in_browser
@pytest.mark.parametrize(("dark", "width"), [(False, 1280), (True, 390), (False, 320)])
def test_it_fits_a_phone(page, dark, width):
    page.keys("body", LEFT)
    ready(page, 1)  # the long prompt
    page.emulate(dark, width, 844)
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    bottom = "return document.getElementById('stop').getBoundingClientRect().bottom <= innerHeight"
    assert page.run(bottom), "the buttons are below the screen"
    small = "[...document.querySelectorAll('button')].filter(one => one.offsetHeight < 44)"
    assert page.run(f"return {small}.length") == 0
    page.screenshot(KEPT / f"{'dark' if dark else 'light'}_{width}.png")
