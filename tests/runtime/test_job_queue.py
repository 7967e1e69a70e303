"""Between a slot and its workers: no job is lost or ended twice, whoever comes late or anew."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

from trainables.runtime.job_queue import RESTARTS, Mailbox


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 10))


def test_ranks_get_each_job_once_and_go_home_when_it_is_closed() -> None:
    async def scene() -> None:
        box = Mailbox()
        waiting = [asyncio.create_task(box.get(0, rank, None)) for rank in (0, 1)]
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in waiting)
        await box.put("one")
        assert [await task for task in waiting] == [(1, "one"), (1, "one")]
        assert await box.take(0.1) == {"begun": "1"}
        later = asyncio.create_task(box.get(1, 0, None))
        await box.end(1, json.dumps({"status": "ended"}))
        assert await box.take(0.1) == {"end": json.dumps({"status": "ended"})}
        await box.put("two")
        assert await later == (2, "two")
        late = asyncio.create_task(box.get(2, 0, None))
        await asyncio.sleep(0.01)
        await box.close()
        assert await late == (2, None)

    run(scene())


def test_a_rank_waits_in_its_report_until_the_slot_has_heard() -> None:
    async def scene() -> None:
        box = Mailbox()
        await box.put("job")
        report = asyncio.create_task(box.emit(1, "records"))
        assert await box.take(1) == {"records": "records"}
        await asyncio.sleep(0.01)
        assert not report.done(), "what shall become of the trial is not known yet"
        nothing = asyncio.create_task(box.take(0.05))
        assert await report is False and await nothing is None
        report = asyncio.create_task(box.emit(1, "more"))
        assert await box.take(1) == {"records": "more"}
        await box.stop()
        assert await report is True

    run(scene())


def test_a_late_rank_neither_ends_nor_feeds_the_next_job() -> None:
    async def scene() -> None:
        box = Mailbox()
        await box.put("one")
        await box.end(1, "first end")
        await box.end(1, "second end")
        assert await box.take(0.1) == {"end": "first end"} and await box.take(0.01) is None
        await box.put("two")
        await box.end(1, "late")
        assert await box.emit(1, "late") is True and await box.take(0.01) is None
        assert not box.is_over

    run(scene())


def test_ranks_that_come_anew_take_up_the_unfinished_job_but_not_for_ever() -> None:
    async def scene() -> None:
        box = Mailbox()
        await box.put("job")
        for _ in range(1 + RESTARTS):  # the first time nothing was lost
            assert await box.get(0, 0, None) == (1, "job")
            assert await box.take(1) == {"begun": "1"}
        last = asyncio.create_task(box.get(0, 0, None))
        message = await box.take(1)
        assert message is not None
        end = json.loads(message["end"])
        assert end["status"] == "failed" and f"lost {RESTARTS + 1} times" in end["reason"]
        await box.put("next")
        assert await last == (2, "next")

    run(scene())


def test_a_job_that_was_stopped_is_not_taken_up_again() -> None:
    async def scene() -> None:
        box = Mailbox()
        await box.put("job")
        assert await box.get(0, 0, None) == (1, "job")
        assert await box.take(1) == {"begun": "1"}
        await box.stop()
        waiting = asyncio.create_task(box.get(0, 0, None))
        message = await box.take(1)
        assert message is not None and json.loads(message["end"])["status"] == "stopped"
        waiting.cancel()

    run(scene())


def test_a_group_with_a_machine_that_is_not_fit_is_given_no_job_and_says_why_to_each() -> None:
    async def scene() -> None:
        box = Mailbox()
        waiting = [asyncio.create_task(box.get(0, rank, None)) for rank in (0, 1)]
        await box.put("one")
        assert [await task for task in waiting] == [(1, "one"), (1, "one")]
        assert await box.take(1) == {"begun": "1"}
        await box.refuse("host: why")  # it was lost, and made anew on another machine
        assert await box.take(1) == {"fault": "host: why"}
        again = asyncio.create_task(box.get(0, 0, None))
        await box.put("two")
        assert await box.take(1) == {"fault": "host: why"} and await box.take(0.01) is None
        assert not again.done()
        await box.close()
        assert await again == (2, None)

    run(scene())
