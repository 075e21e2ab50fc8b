"""Many who ask at once, and one call for them."""

import asyncio
import threading
from collections.abc import Sequence

from app.api.request_batching import Gathered


def test_who_asks_meanwhile_shares_the_next_call() -> None:
    calls: list[Sequence[int]] = []
    begun, going = threading.Event(), threading.Event()

    def double(asked: Sequence[int]) -> list[int | Exception]:
        calls.append(asked)
        begun.set()
        going.wait(30)
        return [ValueError(f"{number} is odd") if number % 2 else 2 * number for number in asked]

    async def ask() -> list[int | BaseException]:
        gathered = Gathered(double, most=3)
        first = asyncio.create_task(gathered.ask(0))
        await asyncio.to_thread(begun.wait, 30)
        others = [asyncio.create_task(gathered.ask(number)) for number in range(1, 6)]
        await asyncio.sleep(0)
        others[3].cancel()
        going.set()
        return await asyncio.gather(first, *others, return_exceptions=True)

    answers = asyncio.run(ask())
    assert calls == [[0], [1, 2, 3], [4, 5]]
    assert [answers[place] for place in (0, 2)] == [0, 4]
    assert [str(answers[place]) for place in (1, 3, 5)] == ["1 is odd", "3 is odd", "5 is odd"]
    assert isinstance(answers[4], asyncio.CancelledError)


def test_a_call_that_fails_fails_for_all_and_the_next_is_made() -> None:
    failing = True

    def answer(asked: Sequence[int]) -> Sequence[int]:
        if failing:
            raise RuntimeError("away")
        return asked

    async def ask() -> None:
        nonlocal failing
        gathered = Gathered(answer)
        found = await asyncio.gather(gathered.ask(1), gathered.ask(2), return_exceptions=True)
        assert [str(each) for each in found] == ["away"] * 2
        failing = False
        assert await gathered.ask(3) == 3

    asyncio.run(ask())
