"""Ctrl-C and kills at any moment: a safe end, and a run that goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from _runs import DREAMER, MBPO, PETS

from torchrl_wm._interrupts import check_interrupt, deferred_interrupts
from torchrl_wm.trainers import PETSTrainer, resume_run, RunFolder, start_run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="signals of POSIX")

#: Runs that are stopped again and again, each time in a process of their own; then a run that
#: is not. Prints how often each was stopped.
SCRIPT = """
import json, os, random, signal, sys, time, traceback
from _runs import assert_same
from torchrl_wm.trainers import resume_run, start_run, trainer_class

def child(path, ready):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        trainer = resume_run(path)
        os.write(ready, b"x")
        trainer.train()
        code = 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    os._exit(code)

def stop_until_it_is_over(name, path, settings, times):
    # How often a run was stopped, at most so many times.
    start_run(name, path, **settings)
    stopped = 0
    while True:
        read, write = os.pipe()
        process = os.fork()
        if not process:
            child(path, write)
        os.close(write)
        os.read(read, 1)  # it is about to run
        os.close(read)
        if stopped < times:
            time.sleep(draw.uniform(0, longest))
            os.kill(process, how)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if code == 0:
            return stopped
        assert code == (130 if how == signal.SIGINT else -how), code
        stopped += 1

runs, how, times, longest = json.loads(sys.argv[1])
draw, stopped = random.Random(0), {}
for name, path, settings in runs:
    for number in range(200):  # a run may be over before it was stopped so often
        left = times - sum(stopped.get(path, []))
        if left:
            ended = stop_until_it_is_over(name, f"{path}-{number}", settings, left)
            stopped.setdefault(path, []).append(ended)
for name, path, settings in runs:
    whole = trainer_class(name)(**settings)
    whole.train()
    for number in range(len(stopped[path])):
        assert_same(resume_run(f"{path}-{number}"), whole)
stopped = [sum(ended) for ended in stopped.values()]
print(json.dumps(stopped))
"""


SETTINGS = {"pets": PETS, "mbpo": MBPO, "dreamer": DREAMER}
ALL = [(name, number) for name in SETTINGS for number in (1, 2)]


def stop_again_and_again(
    tmp_path: Path, how: int, times: int, longest: float, which: list = ALL
) -> list[int]:
    """Return how often a run of each recipe and number of envs was stopped."""
    runs = []
    for name, number in which:
        settings = {**SETTINGS[name], "num_envs": number, "env": "_real_envs:Ragged"}
        runs.append((name, str(tmp_path / f"{name}-{number}"), settings))
    paths = [os.getcwd(), os.path.dirname(os.path.dirname(__file__))]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([runs, how, times, longest])],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_ctrl_c_at_any_moment(tmp_path) -> None:
    which = [("pets", 1), ("mbpo", 2)]
    stopped = stop_again_and_again(tmp_path, signal.SIGINT, 3, 0.3, which)
    assert stopped == [3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_25_times(how, tmp_path) -> None:
    stopped = stop_again_and_again(tmp_path, how, 25, 0.6)
    assert stopped == [25] * len(ALL)


@pytest.mark.slow
def test_ctrl_c_while_processes_begin(tmp_path) -> None:
    """A terminal sends it to all processes, of which those of the envs do not care."""
    code = """
import sys
from torchrl_wm.trainers import start_run
trainer = start_run("pets", sys.argv[1], env="Pendulum-v1", collector="processes", num_envs=2)
print("ready", flush=True)
try:
    trainer.train()
except KeyboardInterrupt:
    sys.exit(130)
"""
    for wait in (0.1, 1.5, 3.0, 9.0):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / str(wait))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        while "ready" not in (process.stdout.readline() or "ready"):
            continue
        threading.Event().wait(wait)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130, (wait, err)
        assert "Traceback" not in err, (wait, err)


# The flag -------------------------------------------------------------------


def send() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def handler():
    """Python's own handler, as outside of tests, and what was there before."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_until_it_is_asked_for(handler) -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt):
        with deferred_interrupts():
            send()
            reached.append(1)
            check_interrupt()
            reached.append(2)
    assert reached == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    check_interrupt()  # once


def test_the_second_is_heeded_at_once(handler) -> None:
    with pytest.raises(KeyboardInterrupt):
        with deferred_interrupts():
            send()
            send()
            raise AssertionError("not reached")
    check_interrupt()


def test_none_is_lost_at_the_end(handler) -> None:
    with pytest.raises(KeyboardInterrupt):
        with deferred_interrupts():
            send()


def test_handlers_of_others_stay(handler) -> None:
    noted = []
    signal.signal(signal.SIGINT, lambda *_: noted.append(1))
    with deferred_interrupts():
        send()
        check_interrupt()
    assert noted == [1]


def test_other_threads_run_as_well(handler, tmp_path) -> None:
    trainer = start_run("pets", tmp_path / "run", **{**PETS, "trials": 1})
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.is_over


@pytest.mark.parametrize("where", ["fitting", "evaluating"])
def test_long_steps_are_left_midway(where, handler, tmp_path) -> None:
    settings = {**PETS, "evaluation_interval": 20, "evaluation_episodes": 1}
    trainer = start_run("pets", tmp_path / "run", **settings)
    if where == "fitting":
        fit, steps = trainer.recipe.on_fit, []

        def on_fit(step: int, number: int) -> None:
            steps.append(step)
            if len(steps) == 10:
                send()
            fit(step, number)

        trainer.recipe.on_fit = on_fit
    else:
        act, count = trainer.policy.forward, []

        def forward(tensordict):
            count.append(1)
            if len(count) == 5:  # the random steps ask nobody
                send()
            return act(tensordict)

        trainer.policy.forward = forward
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with pytest.raises(RuntimeError, match="PETSTrainer.resume"):
        trainer.train()
    assert RunFolder.open(tmp_path / "run").saved()
    again = resume_run(tmp_path / "run")
    again.train()
    whole = PETSTrainer(**settings)
    whole.train()
    assert (again.data[:] == whole.data[:]).all()
