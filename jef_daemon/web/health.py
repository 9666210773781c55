"""Whether the parts work: each is asked, and answers with a word."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

_PATIENCE_S = 2.0
"""A part that does not answer so soon does not work."""


@dataclass(frozen=True, slots=True)
class Word:
    """What a part says of itself."""

    works: bool
    word: str
    """For people: `connected`, `disk full`."""


Ask = Callable[[], Awaitable[Word]]


async def ask_all(parts: Mapping[str, Ask]) -> dict[str, Word]:
    """Ask every part at the same time; one that is silent or raises does not work."""
    words = await asyncio.gather(*(_ask(ask) for ask in parts.values()))
    return dict(zip(parts, words, strict=True))


async def _ask(ask: Ask) -> Word:
    try:
        async with asyncio.timeout(_PATIENCE_S):
            return await ask()
    except TimeoutError:
        return Word(works=False, word=f"no answer within {_PATIENCE_S:g} s")
    except Exception as error:  # noqa: BLE001  a part that raises when asked does not work, whatever it was
        return Word(works=False, word=str(error) or type(error).__name__)
