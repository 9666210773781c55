"""Having and keeping locks, as those outside do it: over as many connections as it takes, and no longer than true.

Part in the flow: `jef locks acquire` and `jef locks run` claim locks here. A lease is counted by our own monotonic
clock from when it was asked for, never from the answer, so that nobody else has the locks before we know.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Self

from jef_daemon.errors import BrokerError, LockLost, LockRefused
from jef_daemon.lock.messages import GrantInfo, LockReply
from jef_daemon.lock.requests import Answer, Refused
from jef_daemon.names import Names
from jef_daemon.rabbitmq.lock_client import (
    ANSWER_S,
    BROKEN,
    Message,
    Talk,
    apart,
    loop_time,
    new_queue,
    no_answer,
    talking,
    told,
)

_AGAIN_S = 0.5
"""Between two tries to reach a broker that is away."""
_ELSEWHERE_S = 3.0
"""Before asking again for what another process of the same owner has."""
_CLOSE_S = 1.0
"""For a connection to end in good order; a broken one does not."""
_WAIT_S = 60.0
"""Lease of the place in the queue, at most: whoever died waiting keeps others waiting no longer."""
_REMEMBERED = 16
"""Requests whose answer may still come."""
_LOSSES = frozenset({"LOST", "EXPIRED", "REVOKED", "CANCELLED", "REFUSED"})


class Claim:
    """One owner's claim to locks, over as many connections as it takes: asked for, waited for, held, given up.

    Args:
        url: the broker's.
        names: of queues.
        owner: who holds.
        locks: what is wanted, together or not at all: `resource` and `mode` of each.
        lease_s: how long they live without being renewed.
        sole: True: no other process of the same owner shares them, and nobody else gives them up but by force.
            False: the owner is a name that several commands use, one after the other.
    """

    def __init__(
        self,
        url: str,
        names: Names,
        owner: str,
        locks: Sequence[Mapping[str, str]],
        lease_s: float,
        *,
        sole: bool,
    ) -> None:
        self._url = url
        self._names = names
        self._owner = owner
        self._locks = list(locks)
        self._lease_s = lease_s
        self._wait_s = min(lease_s, _WAIT_S)
        self._sole = sole
        self._reply_to = new_queue(names)
        self._numbers = itertools.count(1)
        self._sent: dict[str, float] = {}
        """When a request was sent (monotonic), by correlation id: a lease counts from then, not from the answer."""
        self._open = contextlib.AsyncExitStack()
        self._talk: Talk | None = None
        self._asked = False
        self.grants: dict[str, GrantInfo] = {}
        """What is held, by resource."""
        self.until = 0.0
        """Monotonic: by our own clock nobody else has them before."""

    async def __aenter__(self) -> Self:
        await self._connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._hang_up()

    async def acquire(
        self, *, wait: bool = True, timeout_s: float | None = None, on_waiting: Callable[[LockReply], None]
    ) -> None:
        """Have the locks; `grants` tells what was granted.

        Args:
            wait: False: be refused rather than wait.
            timeout_s: wait so long at most.
            on_waiting: told each new place in the queue.

        Raises:
            LockRefused: not granted.
            BrokerError: no word from the lock service.
        """
        try:
            await self._acquire(wait=wait, timeout_s=timeout_s, on_waiting=on_waiting)
        except asyncio.CancelledError:
            if await self._leave():
                await self.release()
            raise

    async def _acquire(
        self, *, wait: bool, timeout_s: float | None, on_waiting: Callable[[LockReply], None]
    ) -> None:
        give_up_at = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        silent_at, ask_at = time.monotonic() + ANSWER_S, 0.0
        last: LockReply | None = None
        while True:
            now = time.monotonic()
            if now >= silent_at:
                raise no_answer(self._names)
            if last is not None and now >= give_up_at:
                return await self._give_up(last, timeout_s)
            if now >= ask_at or self._talk is None:
                await self._reconnect(silent_at)
                await self._send(self._acquiring(wait=wait))
                ask_at = now + self._wait_s / 3
            reply = await self._hear(min(ask_at, silent_at, max(give_up_at, now) if last else silent_at))
            if reply is None:
                continue
            silent_at = time.monotonic() + max(self._wait_s, ANSWER_S)
            if reply.status == Answer.GRANTED:
                return None
            ask_at = min(ask_at, time.monotonic() + _ask_again_s(reply, wait=wait))
            if last is None or told(reply) != told(last):
                on_waiting(reply)
            last = reply

    async def _give_up(self, last: LockReply, timeout_s: float | None) -> None:
        if not await self._leave():
            raise LockRefused(f"not granted within {timeout_s:g} s: {told(last)}")

    async def _leave(self) -> bool:
        """Leave the queue; True when the grant crossed it on its way, and is kept."""
        if not self._asked:
            return False
        with contextlib.suppress(BrokerError, *BROKEN):
            until = time.monotonic() + ANSWER_S
            await self._reconnect(until)
            if self._sole:
                # `cancel` and an answered `release` would mean whatever else the owner has.
                await self._send(self._message("release", sole=True))
                return False
            await self._send(self._message("cancel"))
            while (reply := await self._hear(until)) is not None:
                if reply.status in {Answer.CANCELLED, Answer.GRANTED}:
                    return reply.status == Answer.GRANTED
        return False

    async def keep(self, stop_before_s: float = 0.0) -> NoReturn:
        """Renew what is held, until it is lost.

        Args:
            stop_before_s: give up so long before the lease ends.

        Raises:
            LockLost: always.
        """
        while True:
            try:
                async with asyncio.timeout_at(loop_time(self.until - stop_before_s)):
                    await self._renew()
            except TimeoutError:
                reason = (
                    f"the lease of {self._lease_s:g} s could not be renewed: no word from the lock service"
                )
                raise LockLost(", ".join(self.grants), reason) from None

    async def _renew(self) -> None:
        """Have the lease once longer than it is, over a new connection where the present one brings no answer."""
        before, ask_at, unanswered = self.until, self.until - self._lease_s * 2 / 3, False
        while self.until == before:
            if self._talk is None or time.monotonic() >= ask_at:
                unanswered = await self._ask_for_renewal(again=unanswered)
                ask_at = time.monotonic() + self._lease_s / 6
            reply = await self._hear(ask_at)
            if reply is not None and reply.status in _LOSSES and self._is_ours(reply):
                raise LockLost(", ".join(reply.lost or self.grants), _why_lost(reply))

    async def _ask_for_renewal(self, *, again: bool) -> bool:
        """Send a renewal; False when it could not be sent."""
        if again:
            await self._hang_up()
        fresh = self._talk is None
        try:
            await self._reconnect(self.until)
            # Who hears from a new connection asks again: what is held is told again, with its numbers.
            await self._send(self._acquiring(wait=False) if fresh else self._renewing())
        except BrokerError:
            await asyncio.sleep(_AGAIN_S)
            return False
        return True

    async def release(self) -> bool:
        """Give up everything; False when the broker is away: it ends with its lease."""
        try:
            await self._reconnect(time.monotonic() + ANSWER_S)
            names = [] if self._sole else [{"resource": name} for name in self.grants]
            await self._send(self._message("release", locks=names, sole=self._sole))
        except BrokerError:
            return False
        return self._talk is not None

    # --- inside ------------------------------------------------------------------------------------------

    def _message(self, operation: str, **more: Any) -> Message:
        return {"operation": operation, "owner": self._owner, **more}

    def _acquiring(self, *, wait: bool) -> Message:
        asking = {"operation": "acquire", "wait": wait, "waitLeaseSeconds": self._wait_s, "sole": self._sole}
        return self._renewing() | asking

    def _renewing(self) -> dict[str, Any]:
        return {
            "operation": "renew",
            "owner": self._owner,
            "locks": self._locks,
            "leaseSeconds": self._lease_s,
        }

    def _is_ours(self, reply: LockReply) -> bool:
        """Whether a loss is of what is held now: one told unasked may be of what was held before."""
        if reply.status not in {Answer.EXPIRED, Answer.REVOKED}:
            return True
        numbers = {(grant.resource, grant.fencing_token) for grant in self.grants.values()}
        return any((grant.resource, grant.fencing_token) in numbers for grant in reply.grants or ())

    async def _connect(self) -> None:
        heartbeat_s = max(1, min(30, int(self._lease_s / 6)))
        talk = talking(self._url, self._names, self._reply_to, heartbeat_s)
        self._talk = await apart(self._open.enter_async_context(talk))

    async def _reconnect(self, until: float) -> None:
        """Have a connection; try until an instant.

        Raises:
            BrokerError: there is none.
        """
        while self._talk is None:
            try:
                async with asyncio.timeout_at(loop_time(max(until, time.monotonic()))):
                    await self._connect()
            except (BrokerError, *BROKEN) as error:
                if time.monotonic() + _AGAIN_S >= until:
                    raise BrokerError(f"no broker answers ({error})") from None
                await asyncio.sleep(_AGAIN_S)

    async def _send(self, request: Message) -> None:
        if self._talk is None:
            return
        # Rising as texts: the lock service knows by it which of a sole owner's messages are older.
        correlation_id = f"{next(self._numbers):012d}"
        self._sent[correlation_id] = time.monotonic()
        while len(self._sent) > _REMEMBERED:
            del self._sent[next(iter(self._sent))]
        self._asked = True
        try:
            await apart(self._talk.send(request, correlation_id))
        except BROKEN:
            await self._hang_up()

    async def _hear(self, until: float) -> LockReply | None:
        """The next answer, a grant of ours noted; None when the time is over or the connection lost."""
        if self._talk is None:
            return None
        try:
            heard = await self._talk.hear(until)
        except ConnectionError:
            await self._hang_up()
            return None
        if heard is None:
            return None
        correlation_id, reply = heard
        if reply.status in {Answer.GRANTED, Answer.RENEWED}:
            return self._note(reply, self._sent.get(correlation_id))
        return reply

    def _note(self, reply: LockReply, sent_at: float | None) -> LockReply:
        """Take a grant in; one with other numbers than before says that what was held is lost."""
        granted = {grant.resource: grant for grant in reply.grants or ()}
        held = {name: grant.fencing_token for name, grant in self.grants.items()}
        if other := [
            name for name in held if name not in granted or granted[name].fencing_token != held[name]
        ]:
            return LockReply(status=Answer.LOST, lost=other, reason="the lease ended")
        self.grants = granted
        if sent_at is not None:
            self.until = max(self.until, sent_at + self._lease_s)
        return reply

    async def _hang_up(self) -> None:
        self._talk = None
        stale, self._open = self._open, contextlib.AsyncExitStack()
        with contextlib.suppress(BrokerError, *BROKEN):
            async with asyncio.timeout(_CLOSE_S):
                await apart(stale.aclose())


def _why_lost(reply: LockReply) -> str:
    if reply.status == Answer.REFUSED:
        return f"the lease ended meanwhile ({reply.reason})"
    return reply.reason or reply.status.lower()


def _ask_again_s(reply: LockReply, *, wait: bool) -> float:
    """When to ask again, after an answer that is no grant.

    Raises:
        LockRefused: it would be no use.
    """
    if reply.status == Answer.WAITING:
        return float("inf")  # as often as ever
    if reply.status == Answer.EXPIRED:
        return 0.0
    if reply.code == Refused.ELSEWHERE and wait:
        return _ELSEWHERE_S
    raise LockRefused(f"not granted: {told(reply)}")
