"""redis-server with a data set: DEBUG DIGEST is the oracle; BGSAVE forks a process whose memory is not there yet."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import Victim, Victims, in_threads, reserved_port
from helpers_copies import Copies
from helpers_redis import Redis, RedisError

pytestmark = pytest.mark.requires("program:redis-server")
KEYS = 200_000


def start(victims: Victims, directory: Path, where: str | int, *more: str) -> Victim:
    directory.mkdir(exist_ok=True)
    listen = ["--port", "0", "--unixsocket", where] if isinstance(where, str) else ["--port", str(where)]
    options = ["--dir", str(directory), "--save", "", "--enable-debug-command", "yes", "--bind", "127.0.0.1"]
    victim = victims.start(["redis-server", *options, *listen, *more])

    def answers() -> bool:
        with Redis(where) as redis, suppress(RedisError):  # LOADING
            return redis("PING") == "PONG"
        return False

    victim.until(answers, "redis-server")
    return victim


def fill(where: str | int) -> str:
    with Redis(where) as redis:
        redis("DEBUG", "POPULATE", KEYS, "key", 48)
        script = """for i = 1, 5000 do
            redis.call('HSET', 'hash' .. i % 50, 'field' .. i, i)
            redis.call('ZADD', 'zset' .. i % 20, i * 7 % 1000, 'member' .. i)
            redis.call('RPUSH', 'list' .. i % 10, string.rep('x', i % 200))
        end"""
        redis("EVAL", script, 0)
        for number in range(100):
            redis("SET", f"volatile{number}", number, "EX", 100_000)
        digest = redis("DEBUG", "DIGEST")
    assert isinstance(digest, str)
    return digest


@pytest.fixture
def port() -> Iterator[int]:
    with reserved_port() as port:
        yield port


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_redis(run: Path, victims: Victims, copies: Copies, port: int, tcp: bool) -> None:
    where = port if tcp else str(run / "socket")
    victim = start(victims, run / "redis", where)
    digest = fill(where)
    victim.quiet(sockets=1)

    copy = copies.replace(victim)
    with Redis(where) as redis:
        assert redis("DBSIZE") == KEYS + 100 + 50 + 20 + 10
        assert redis("DEBUG", "DIGEST") == digest
        redis("BGSAVE")
        copy.until(lambda: redis.info("persistence")["rdb_bgsave_in_progress"] == "0", "the end of BGSAVE")
        assert redis.info("persistence")["rdb_last_bgsave_status"] == "ok"

    (run / "loaded").mkdir()
    shutil.copy(run / "redis" / "dump.rdb", run / "loaded")
    start(victims, run / "loaded", str(run / "loaded.socket"))
    with Redis(str(run / "loaded.socket")) as loaded:
        assert loaded("DEBUG", "DIGEST") == digest

    def load(thread: int) -> None:
        with Redis(where) as redis:
            for number in range(500):
                assert redis("SET", f"new{thread}:{number}", number * thread) == "OK"
                assert redis("GET", f"new{thread}:{number}") == str(number * thread)
                assert redis("GET", f"key:{number}") == "value:" + str(number) + "\0" * (48 - 6 - len(str(number)))
            assert redis("EVAL", "return redis.call('INCRBY', KEYS[1], ARGV[1])", 1, "sum", thread) is not None
            assert redis("EVAL", "local s = 0 for i = 1, 1000 do s = s + i end return s", 0) == 500500

    in_threads(8, load)
    with Redis(where) as redis:
        assert redis("GET", "sum") == "28"
        ttl = redis("TTL", "volatile7")
        assert isinstance(ttl, int)
        assert 0 < ttl <= 100_000
        redis("FLUSHALL")
        assert redis("DBSIZE") == 0
        assert fill(where) == digest
    copy.process.terminate()
    assert copy.process.wait(60) == 0


def test_bgsave_right_after_the_restore(run: Path, victims: Victims, copies: Copies) -> None:
    """The child is forked before the parent has touched its data set: the child's own faults bring all of it."""
    where = str(run / "socket")
    victim = start(victims, run / "redis", where)
    digest = fill(where)
    victim.quiet(sockets=1)
    copy = copies.replace(victim)
    with Redis(where) as redis:
        redis("BGSAVE")
        copy.until(lambda: redis.info("persistence")["rdb_bgsave_in_progress"] == "0", "the end of BGSAVE")
        assert redis.info("persistence")["rdb_last_bgsave_status"] == "ok"
        assert redis("DEBUG", "RELOAD", "NOSAVE") == "OK"
        assert redis("DEBUG", "DIGEST") == digest
