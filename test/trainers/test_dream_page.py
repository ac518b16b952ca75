"""The page of a dream: what the server answers and refuses, and the page in a real browser."""

from __future__ import annotations

import base64
import http.client
import json
import signal
import socket
import struct
import threading
import time
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from _chromium import Chromium, find_chromium
from _real_envs import make_nested, make_reacher
from _small_models import MAKE
from tensordict.nn import TensorDictModule as Mod
from torchrl.envs import GymEnv

from torchrl_wm import WorldModelEnv
from torchrl_wm.modules import fit_normalizers
from torchrl_wm.trainers import DreamServer, DreamSession, make_real_env, serve_dream

needs_chromium = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium is installed"
)


def dream(make, policy=None, **settings) -> DreamSession:
    torch.manual_seed(0)
    real_env = make_real_env(make, max_episode_steps=12)
    model, _ = MAKE["ensemble"](real_env, propagation="mean", termination="none")
    data = real_env.rollout(20)
    fit_normalizers(model, data)
    env = WorldModelEnv(model, real_env)
    return DreamSession(
        env, real_env=real_env, data=data, policy=policy, title="A <b>dream", **settings
    )


def pushes(td):
    return td.set("action", torch.full((*td.batch_size, 1), 0.75))


@contextmanager
def served(session: DreamSession):
    server = DreamServer(session)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join(20)
    assert not thread.is_alive()


def asked(server, method, path, body=None, **headers):
    """The status and the content of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    given = {"Content-Type": "application/json"} if body is not None else {}
    given.update({name.replace("_", "-"): value for name, value in headers.items()})
    content = body if body is None or isinstance(body, bytes) else json.dumps(body)
    connection.request(method, path, content, given)
    answer = connection.getresponse()
    content, kind = answer.read(), answer.headers["Content-Type"]
    connection.close()
    return answer.status, json.loads(content) if "json" in kind else content.decode()


@pytest.fixture(scope="module")
def server():
    with served(dream("Pendulum-v1", pushes)) as server:
        yield server


@pytest.fixture(autouse=True)
def begun(request):
    if "server" in request.fixturenames:
        asked(request.getfixturevalue("server"), "POST", "/reset", {"seed": 0})


def test_it_answers_with_what_the_session_shows(server) -> None:
    status, page = asked(server, "GET", "/")
    assert status == 200 and "<title>" in page
    # Nothing is fetched from elsewhere.
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    status, state = asked(server, "GET", "/state")
    assert status == 200 and state["title"] == "A <b>dream"
    (control,) = state["controls"]
    assert (control["kind"], control["low"], control["high"]) == ("number", -2.0, 2.0)
    assert state["has_policy"] and state["has_real"] and state["at"] == 1
    status, answer = asked(server, "POST", "/step", {"action": [0.5], "at": 1})
    moment = server.session.moments[-1]
    shown = answer["moment"]
    assert status == 200 and answer["at"] == 2 and shown["action"] == [0.5]
    assert shown["imagined"]["reward"] == moment.imagined.reward
    assert shown["disagreement"] == moment.disagreement
    assert shown["real"]["values"] == moment.real.values
    start, _, data = shown["real"]["frame"].partition(",")
    assert start == "data:image/png;base64"
    assert base64.b64decode(data) == moment.real.frame
    _, answer = asked(server, "POST", "/step", {"action": "policy"})
    assert answer["moment"]["action"] == [0.75]
    assert asked(server, "POST", "/look", {})[1]["moment"]["actor"] == "look"
    assert asked(server, "POST", "/back", {})[1]["at"] == 3
    state = asked(server, "GET", "/state")[1]
    assert [moment["step"] for moment in state["history"]] == [0, 1, 2]
    assert asked(server, "POST", "/reset", {"seed": 4})[1]["seed"] == 4


def test_what_it_cannot_do_is_an_error(server) -> None:
    for path, body, status, said in (
        ("/step", {"action": [7]}, 400, "from -2 up to 2, got 7"),
        ("/step", {"action": [0.0], "force": 1}, 400, "entries ['force'] are unknown"),
        ("/step", [1], 400, "A JSON object is expected"),
        ("/step", b"{", 400, "no JSON"),
        ("/step", b"\xff", 400, "no JSON"),
        ("/step", b"[" * 60_000, 400, "no JSON"),
        ("/step", {"action": [10**400]}, 400, "from -2 up to 2, got inf"),
        ("/step", b" " * 70_000, 400, "at most 65536 bytes"),
        ("/step", {"at": 5}, 409, "gone on elsewhere"),
        ("/back", {}, 400, "This is the start"),
        ("/reset", {"seed": "one"}, 400, "seed must be"),
        ("/reset", {"seed": 10**400}, 400, "seed must be"),
        ("/quit", {}, 404, "There is no '/quit'"),
    ):
        got, answer = asked(server, "POST", path, body)
        assert got == status and said in answer["error"], (path, body, answer)
    assert asked(server, "GET", "/etc/passwd")[0] == 404
    assert asked(server, "GET", "/../page.html")[0] == 404
    assert asked(server, "PUT", "/step", {})[0] == 501
    assert len(server.session.moments) == 1


def test_only_its_own_page_on_this_machine_may_ask(server) -> None:
    port = server.port
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1",
        "",
        "localhost:1",
    ):
        status, answer = asked(server, "GET", "/state", Host=host)
        assert status == 403 and "this machine alone" in answer["error"]
        assert asked(server, "POST", "/step", {}, Host=host)[0] == 403
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{port}"):
        status, answer = asked(server, "POST", "/step", {}, Origin=origin)
        assert status == 403 and "Only its own page" in answer["error"]
    plain = asked(server, "POST", "/step", b"{}", Content_Type="text/plain")
    assert plain[0] == 400 and "application/json" in plain[1]["error"]
    assert len(server.session.moments) == 1
    for name in ("127.0.0.1", "localhost"):
        here = {"Host": f"{name}:{port}", "Origin": f"http://{name}:{port}"}
        assert asked(server, "POST", "/step", {"action": [0.0]}, **here)[0] == 200


def test_nobody_else_on_the_network_reaches_it(server) -> None:
    assert server.url.startswith("http://127.0.0.1:")
    with pytest.raises(OSError):  # another address of this machine
        socket.create_connection(("127.0.0.2", server.port), timeout=2)


def test_ports_are_checked(server) -> None:
    session = server.session
    with pytest.raises(OSError, match=f"The port {server.port} .* port=0"):
        DreamServer(session, server.port)
    for port in (-1, 70_000, "80", True):
        with pytest.raises(ValueError, match="port must be"):
            DreamServer(session, port)
    with pytest.raises(TypeError, match="has its real env"):
        serve_dream(session, policy=pushes, open_page=False)


def test_requests_wait_for_each_other(server) -> None:
    answers = []

    def step():
        answers.append(asked(server, "POST", "/step", {"action": [0.0]})[1]["at"])

    threads = [threading.Thread(target=step) for _ in range(6)]
    # Browsers open connections that they say nothing on.
    idle = socket.create_connection(("127.0.0.1", server.port))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    idle.close()
    assert sorted(answers) == [2, 3, 4, 5, 6, 7]


def test_numbers_that_are_not_finite_are_shown_as_such() -> None:
    session = dream("Pendulum-v1")
    head = session._imagined.env.world_model
    head.reward_head = Mod(
        lambda x: x[..., :1] / 0, [("next", "observation")], [("next", "reward")]
    )
    session.usual_disagreement = {"median": float("nan"), "high": float("inf")}
    with served(session) as server:
        status, answer = asked(server, "POST", "/step", {"action": [0.0]})
        shown = asked(server, "GET", "/state")
    assert status == 200 and answer["moment"]["imagined"]["reward"] is None
    assert shown[0] == 200
    assert shown[1]["usual_disagreement"] == {"median": None, "high": None}


def test_pages_that_are_closed_meanwhile_leave_no_trace(server, capfd) -> None:
    state = f"GET /state HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode()
    for said, pause in ((state, 0), (b"", 0.1)):
        page = socket.create_connection(("127.0.0.1", server.port))
        # Closed at once, the connection is reset.
        page.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        page.sendall(said)
        time.sleep(pause)
        page.close()
        assert asked(server, "GET", "/state")[0] == 200
    time.sleep(0.2)
    assert "Traceback" not in capfd.readouterr().err


def test_an_error_of_the_users_own_is_shown() -> None:
    def broken(td):
        raise OSError("no memory for plans")

    with served(dream("Pendulum-v1", broken)) as server:
        status, answer = asked(server, "POST", "/step", {"action": "policy"})
        assert status == 500
        assert answer["error"] == "OSError: no memory for plans"
        assert asked(server, "POST", "/step", {"action": [0.0]})[0] == 200


def test_ctrl_c_ends_it(monkeypatch) -> None:
    real_env = GymEnv("Pendulum-v1")
    model, _ = MAKE["ensemble"](real_env, normalize=False)
    found, opened = [], []
    monkeypatch.setattr("webbrowser.open", opened.append)

    def use(url):
        with urllib.request.urlopen(url + "state", timeout=60) as answer:
            found.append(json.load(answer))
        signal.raise_signal(signal.SIGINT)

    def ready(url):
        found.append(url)
        threading.Thread(target=use, args=(url,)).start()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        serve_dream(
            WorldModelEnv(model, real_env), real_env=real_env, seed=3, on_ready=ready
        )
    finally:
        signal.signal(signal.SIGINT, before)
    url, state = found
    assert state["seed"] == 3 and opened == [url]
    with pytest.raises(OSError):
        urllib.request.urlopen(url, timeout=2)


# In a browser ---------------------------------------------------------------


def do(page: Chromium, action, *given) -> str:
    """Do something that asks the server; return what the page then says."""
    before = page.evaluate("+(document.body.dataset.asked || 0)")
    action(*given)
    page.wait(f"document.body.dataset.asked > {before}")
    return page.evaluate("document.getElementById('status').textContent")


def text(page: Chromium, selector: str) -> str:
    return page.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")


@pytest.fixture(scope="module")
def browser():
    with Chromium() as browser:
        yield browser


def visit(browser: Chromium, server: DreamServer) -> None:
    browser.console.clear()
    browser.open(server.url)
    browser.wait("document.body.dataset.ready === 'true'")


@needs_chromium
def test_one_steps_it_by_keys_and_buttons(server, browser) -> None:
    visit(browser, server)
    assert text(browser, "h1") == "A <b>dream"
    size = "document.querySelector('#{} img').naturalWidth"
    browser.wait(
        " && ".join(f"{size.format(side)} > 50" for side in ("imagined", "real"))
    )
    for _ in range(3):
        browser.press("ArrowRight")
    assert do(browser, browser.press, " ") == "Step 1. You acted: 0.6."
    assert do(browser, browser.press, "p") == "Step 2. The policy acted: 0.75."
    assert do(browser, browser.click, "#random").startswith("Step 3. A random action")
    moment = server.session.moments[-1]
    shown = float(text(browser, "#real .facts b"))
    assert shown == pytest.approx(moment.real.reward, rel=1e-3)
    assert text(browser, "#bars .name") == "observation[0]"
    for chart in ("reward", "total", "spread"):
        drawn = f"document.querySelector('#{chart}-chart path').getAttribute('d')"
        assert browser.evaluate(drawn).count("L") == 2
    assert do(browser, browser.press, "b").startswith("Step 2.")
    assert "looked at the real env" in do(browser, browser.press, "l")
    assert do(browser, browser.press, "r") == "Step 0. The episode begins."
    assert len(server.session.moments) == 1 and browser.console == []


@needs_chromium
def test_errors_are_shown_and_it_goes_on(server, browser) -> None:
    visit(browser, server)
    browser.evaluate(
        "(() => { const box = document.querySelector('input[type=number]');"
        "box.value = 9; box.dispatchEvent(new Event('input')); })()"
    )
    said = do(browser, browser.click, "#step")
    assert said == "action must be a number from -2 up to 2, got 9."
    assert browser.evaluate("document.getElementById('status').className") == "error"
    # Somebody else, such as another tab, goes on meanwhile.
    asked(server, "POST", "/step", {"action": [1.0]})
    assert "gone on elsewhere" in do(browser, browser.press, "p")
    assert do(browser, browser.press, "p") == "Step 2. The policy acted: 0.75."


@needs_chromium
def test_it_plays_to_the_end_of_the_episode(server, browser) -> None:
    visit(browser, server)
    browser.evaluate("document.getElementById('fps').value = 30")
    browser.press("Enter")
    browser.wait("document.getElementById('real').classList.contains('over')")
    browser.press("Enter")
    browser.wait("document.body.dataset.busy === 'false'")
    assert not browser.evaluate("document.getElementById('play').matches('.on')")
    assert server.session.moments[12].real.truncated
    assert browser.evaluate("document.getElementById('look').disabled")


@needs_chromium
@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("env", ["CartPole-v1", make_nested, make_reacher])
def test_other_envs_fit_the_page(env, width, browser) -> None:
    session = dream(env)
    with served(session) as server:
        browser.resize(width, 900)
        visit(browser, server)
        if env == "CartPole-v1":
            assert do(browser, browser.press, "2") == "Step 1. You acted: 1."
        else:
            assert do(browser, browser.press, " ") == "Step 1. You acted: 0."
        assert browser.evaluate("document.getElementById('policy').disabled")
        wide = "document.documentElement.scrollWidth"
        assert browser.evaluate(wide) == width and browser.console == []
        has_frame = env is not make_reacher
        hidden = browser.evaluate("document.querySelector('#imagined img').hidden")
        assert hidden == (not has_frame)
        if not has_frame:
            assert "--render" in browser.evaluate(
                "document.getElementById('notes').textContent"
            )
    browser.resize(1400, 900)


@needs_chromium
def test_a_model_of_latents_has_no_picture(browser) -> None:
    real_env = GymEnv("Pendulum-v1")
    model, _ = MAKE["tdmpc2"](real_env)
    session = DreamSession(WorldModelEnv(model, real_env), real_env=real_env)
    with served(session) as server:
        visit(browser, server)
        assert text(browser, "#imagined .none") == "No picture: the notes say why."
        assert browser.evaluate("document.querySelector('#real .none').hidden")
        assert "latents" in browser.evaluate(
            "document.getElementById('notes').textContent"
        )
        assert browser.evaluate("document.querySelectorAll('#bars .name').length") == 16


@needs_chromium
def test_a_dream_without_a_real_env_stands_alone(browser) -> None:
    real_env = GymEnv("Pendulum-v1")
    model, _ = MAKE["ensemble"](real_env, normalize=False, termination="none")
    session = DreamSession(
        WorldModelEnv(model, real_env),
        data=real_env.rollout(20),
        render=lambda observation: np.zeros((9, 9), np.uint8),
    )
    with served(session) as server:
        visit(browser, server)
        do(browser, browser.press, "n")
        assert browser.evaluate("document.getElementById('real').hidden")
        assert browser.evaluate("document.getElementById('look').hidden")
        assert browser.console == []
    said = do(browser, browser.press, "n")
    assert "The server does not answer" in said
