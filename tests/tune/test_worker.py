from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from nsa_gen.tune.records import Failure
from nsa_gen.tune.worker import Pool, Request, wait


class Served:
    """What the pool's processes serve in these tests."""

    def __init__(self, name="", broken=False):
        if broken:
            raise ValueError("cannot be made")
        self.name, self.calls = name, 0

    def pid(self):
        return os.getpid()

    def count(self):
        self.calls += 1
        return self.calls

    def variable(self, name):
        return os.environ.get(name, "unset")

    def sleep(self, seconds):
        time.sleep(seconds)
        return "slept"

    def end(self, status):
        os._exit(status)

    def die(self, number):
        print("the last line it wrote", file=sys.stderr, flush=True)
        os.kill(os.getpid(), number)

    def fail(self):
        raise RuntimeError("odd\n  thing")

    def fatal(self):
        return Failure("illegal_access", "context lost")

    def modules(self):
        return sorted(m for m in ("optuna", "torch", "triton") if m in sys.modules)


@pytest.fixture
def pool():
    pools = []

    def make(size=1, **options):
        pools.append(Pool([partial(Served, str(i)) for i in range(size)], **options))
        return pools[-1]

    yield make
    for made in pools:
        made.close()


def answers(pool, *requests):
    tickets = [pool.submit(request) for request in requests]
    found = {}
    until = time.monotonic() + 60
    while len(found) < len(tickets) and time.monotonic() < until:
        wait([pool], 1.0)
        found.update(pool.collect())
    return [found[ticket] for ticket in tickets]


def ask(pool, method, *args, **options):
    return answers(pool, Request(method, args, **options))[0]


def test_a_process_is_kept_and_is_not_this_one(pool):
    made = pool(env={"NSA_GEN_TEST": "given", "HOME": None})
    first, second = ask(made, "pid"), ask(made, "pid")
    assert first == second != os.getpid()
    assert ask(made, "count") == 1 and ask(made, "count") == 2
    assert ask(made, "variable", "NSA_GEN_TEST") == "given" and "NSA_GEN_TEST" not in os.environ
    assert ask(made, "variable", "HOME") == "unset"
    assert ask(made, "modules") == []  # a worker imports what its backend imports, no more


def test_faults_are_told_apart_and_the_pool_goes_on(pool):
    made = pool()
    first = ask(made, "pid")
    odd = ask(made, "fail")
    assert (odd.kind, odd.message) == ("error", "RuntimeError: odd thing")
    assert ask(made, "pid") == first  # an exception costs no process
    assert ask(made, "fatal").kind == "illegal_access"
    second = ask(made, "pid")
    assert second != first  # a lost context does
    ended = ask(made, "end", 7)
    assert ended.kind == "crash" and "exit status 7" in ended.message
    killed = ask(made, "die", signal.SIGSEGV)
    assert killed.kind == "crash" and "SIGSEGV" in killed.message and "the last line it wrote" in killed.message
    assert ask(made, "count") == 1
    assert made.workers[0].starts == 4


def test_the_deadline_kills_what_hangs(pool):
    made = pool()
    first = ask(made, "pid")
    began = time.monotonic()
    late = ask(made, "sleep", 60, deadline_s=0.3)
    assert late.kind == "hang" and "0.3 s" in late.message
    assert time.monotonic() - began < 20
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert ask(made, "pid", deadline_s=30) != first


def test_grace_is_for_a_new_key_only(pool):
    made = pool()
    ask(made, "pid")
    assert ask(made, "sleep", 1.0, deadline_s=0.2, grace_s=20, key="a") == "slept"
    assert ask(made, "sleep", 1.0, deadline_s=0.2, grace_s=20, key="a").kind == "hang"
    assert ask(made, "sleep", 1.0, deadline_s=0.2, grace_s=20, key="a") == "slept"  # fresh: prepared anew


def test_a_process_that_cannot_start_answers(pool):
    broken = Pool([partial(Served, broken=True)])
    try:
        answer = ask(broken, "pid")
        assert answer.kind == "error" and "cannot be made" in answer.message
    finally:
        broken.close()


def test_requests_are_shared_out_by_priority(pool):
    made = pool(2)
    pids = answers(made, *(Request("pid") for _ in range(6)))
    assert set(pids) <= {w._process.pid for w in made.workers}
    one = pool(1)
    ask(one, "pid")
    tickets = [one.submit(Request("sleep", (0.3,))), one.submit(Request("count"), 5), one.submit(Request("count"), 1)]
    found = {}
    while len(found) < 3:
        wait([one], 1.0)
        found.update(one.collect())
    assert (found[tickets[2]], found[tickets[1]]) == (1, 2)


def test_close_kills_the_busy(pool):
    made = pool()
    pid = ask(made, "pid")
    made.submit(Request("sleep", (60,)))
    made.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signal is Linux's")
def test_processes_die_with_a_killed_parent(tmp_path):
    code = (
        "import sys, time; sys.path[:0] = [%r, %r]\n"
        "from test_worker import Served, Pool, Request, ask\n"
        "if __name__ == '__main__':\n"
        "    pool = Pool([Served]); print(ask(pool, 'pid'), flush=True); pool.submit(Request('sleep', (600,))); time.sleep(600)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code % (str(Path(__file__).parent), str(Path(__file__).parents[2])))
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait(10)
    parent.stdout.close()
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            break
        if state == "Z":  # dead, waiting for whoever adopted it
            break
        time.sleep(0.1)
    else:
        pytest.fail("the worker outlived its parent")
