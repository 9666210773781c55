"""The bus: session after session, so that after a broker's restart everything comes back by itself.

One place decides when to give up, when to wait and what is said about it: a line for each change of state,
not for each try.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence

import structlog
import tenacity

from jef_daemon.config import masked
from jef_daemon.errors import BrokerError
from jef_daemon.names import WATCHED as WATCHED_HEADER
from jef_daemon.names import Names
from jef_daemon.ports import Clock, Delivery, Outgoing, SystemClock
from jef_daemon.rabbitmq.keepers import keepers
from jef_daemon.rabbitmq.refusals import meaning, reason
from jef_daemon.rabbitmq.session import OnDelivery, Session, connect, group_of, queues_of
from jef_daemon.rabbitmq.topology import LOCKS, WATCHED, Topology
from jef_daemon.sections import Bus as BusSettings

log = structlog.get_logger()

_CONNECT_TIMEOUT_S = 15.0
_SET_UP_S = 15.0
_FIRST_PAUSE_S = 0.2
_LET_GO_S = 10.0
"""For a connection that is of no use any more to be closed."""
_MARGIN_S = 15.0
"""On top of all that a try to connect may take: after that the bus hangs."""


class RabbitBus:
    """Messages in and out of RabbitMQ (`ports.Bus`).

    Guarantees: consumers, topology and unconfirmed publishes (by their sender) come back after any loss of
    the connection; a wrong password, virtual host, permission or topology at the first connection ends
    `run` with a `BrokerError`, later ones are waited out.

    Args:
        url: the broker's.
        names: of exchanges and queues.
        actions: whose queues are declared; consumed are those that `resume` names.
        settings: flow control.
        on_delivery: called in the event loop for each delivery, in order.
        name: how the broker's lists call this connection.
        ledger: the ledger's own name: for the answers to its jobs' locks, and the locks that are kept in it.
        watches_only: it only hears statuses and tells some; nothing else is declared.
        clock: to see that the bus gets on.
        coordinates: it carries workflows out.
    """

    def __init__(
        self,
        url: str,
        names: Names,
        actions: Sequence[str],
        settings: BusSettings,
        on_delivery: OnDelivery,
        name: str = "jef",
        ledger: str | None = None,
        *,
        watches_only: bool = False,
        clock: Clock | None = None,
        coordinates: bool = False,
    ) -> None:
        self._names = names
        self._ledger = ledger
        self._keepers = keepers(names, ledger)
        self._url = url
        self._where = masked(url)
        self._watches_only, self._coordinates = watches_only, coordinates
        self._topology = self._needed(actions, settings)
        self._queues = queues_of(names, actions, ledger)
        self._settings = settings
        self._on_delivery = on_delivery
        self._name = name
        self._wanted: set[str] = set()
        self._bindings: dict[tuple[str, str], set[str]] = {}
        """Routing keys by queue and exchange, beside those of the topology."""
        self._session: Session | None = None
        self._connected = asyncio.Event()
        self._changing = asyncio.Lock()
        self._has_been_connected = False
        self._stopping = False
        self._clock = clock or SystemClock()
        self._moved_at = self._clock.monotonic()
        """When it got on last: a try to connect, a connection that came or went, an answer of the broker."""
        self.is_blocked = False
        """Whether the broker takes no messages just now, as it said itself: it is short of memory or disk."""
        self.reconnects = 0

    @property
    def connected(self) -> asyncio.Event:
        """Set while messages can be sent."""
        return self._connected

    @property
    def session(self) -> int:
        """Number of the session that is connected; 0: none is."""
        return self._session.number if self._session and self._connected.is_set() else 0

    @property
    def locks_kept_by(self) -> str:
        """The ledger that keeps the locks of this prefix, once it is known to be another one; else empty."""
        return self._keepers[LOCKS].elsewhere

    @property
    def unconfirmed(self) -> int:
        """Messages on their way: published, not confirmed yet."""
        return self._session.unconfirmed if self._session else 0

    async def run(self) -> None:
        """Hold a session, and the next, until cancelled.

        Raises:
            BrokerError: the first connection was refused for good, or the broker stayed away too long.
        """
        while True:
            session = await self._connect()
            self._has_been_connected = True
            self._move()
            self._connected.set()
            log.info("broker_connected", broker=self._where, session=session.number)
            # Beside the wait for its end: a broker that falls silent must not keep us from seeing that.
            changing = asyncio.create_task(self._change_all(), name="consumers")
            try:
                error = await session.wait_broken()
            finally:
                changing.cancel()
                self._connected.clear()
            self._session = None
            self._move()
            if self._stopping:
                return
            self.reconnects += 1
            log.warning("broker_lost", broker=self._where, reason=reason(error) if error else "closed")
            await _let_go(session)

    async def _connect(self) -> Session:
        settings = self._settings
        told = ""

        def tell(state: tenacity.RetryCallState) -> None:
            nonlocal told
            error = state.outcome.exception() if state.outcome else None
            said = reason(error) if error else ""
            if said != told:
                log.warning("broker_unreachable", broker=self._where, reason=said, consequence="trying again")
                told = said

        try:
            async for attempt in tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception(self._can_be_waited_out),
                wait=tenacity.wait_random_exponential(_FIRST_PAUSE_S, max=settings.reconnect_max_s),
                stop=tenacity.stop_after_delay(settings.connect_for_s)
                if settings.connect_for_s
                else tenacity.stop_never,
                before_sleep=tell,
                reraise=True,
            ):
                with attempt:
                    return await self._open_session()
        except BrokerError:
            raise
        except Exception as error:  # noqa: BLE001  whatever the network raised, the operator's patience is over
            raise BrokerError(
                f"no broker answers at {self._where} within {settings.connect_for_s:g} s ({reason(error)}); "
                "start RabbitMQ or set JEF_AMQP_URL"
            ) from None
        raise AssertionError("tenacity returned without an attempt")

    async def _open_session(self) -> Session:
        session = None
        self._move()
        try:
            connection = await connect(self._url, self._settings, self._name, _CONNECT_TIMEOUT_S)
            session = Session(connection, self._settings, self._on_delivery, self._names.prefix)
            # A broker that has just started greets before its queues have leaders; a request that comes too
            # early hangs there for a minute, one that is asked again is answered at once.
            async with asyncio.timeout(_SET_UP_S):
                await session.set_up(self._topology)
                for (queue, exchange), keys in self._bindings.items():
                    await session.bind(queue, exchange, sorted(keys))
                # Before the first delivery: what comes while the others are set up is acknowledged, too.
                self._session = session
                for source in sorted(self._wanted):
                    await self._consume(session, source)
        except Exception as error:  # noqa: BLE001 - the client raises what it likes; told and tried again
            self._session = None
            if session is not None:
                await _let_go(session)
            raise meaning(error, self._where) or error from None
        return session

    def _can_be_waited_out(self, error: BaseException) -> bool:
        if isinstance(error, BrokerError):
            return self._has_been_connected
        return isinstance(error, Exception)

    async def answers(self, patience_s: float) -> bool:
        """Whether the bus works, or waits for the broker as it should; False: it hangs.

        Connected, the broker is asked something; where no answer comes the connection is given up, so that what was
        wrong is the broker's if it goes on being silent, and ours if no other connection is tried. Without a
        connection, tries must follow one another.
        """
        session = self._session
        if session is not None and not session.is_broken and self._connected.is_set():
            try:
                async with asyncio.timeout(patience_s):
                    await session.answers()
            except Exception as error:  # noqa: BLE001  the client raises what it likes; it is no answer
                self.is_blocked = await session.is_blocked()
                if not self.is_blocked:
                    log.warning(
                        "broker_silent", reason=reason(error), consequence="another connection is tried"
                    )
                    session.give_up(f"no answer within {patience_s:g} s")
            else:
                self.is_blocked = False
            self._move()
        settings = self._settings
        tries_s = settings.reconnect_max_s + _CONNECT_TIMEOUT_S + _SET_UP_S + _LET_GO_S
        return self._clock.monotonic() - self._moved_at < tries_s + _MARGIN_S

    def _move(self) -> None:
        self._moved_at = self._clock.monotonic()

    # --- the port ----------------------------------------------------------------------------------------

    async def publish(self, messages: Sequence[Outgoing]) -> asyncio.Future[None]:
        """See `ports.Bus`."""
        await self._connected.wait()
        session = self._session
        if session is None or session.is_broken:
            raise ConnectionError("the connection to the broker was lost")
        return await session.publish(messages)

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """See `ports.Bus`."""
        session = self._session
        if session is None or session.is_broken:
            return
        ours = [delivery.tag for delivery in deliveries if delivery.session == session.number]
        if ours:
            try:
                await session.acknowledge(deliveries[0].source, max(ours))
            except Exception as error:  # noqa: BLE001  the broker will deliver them again; they are known then
                log.debug("acknowledgement_lost", reason=reason(error))

    async def pause(self, source: str) -> None:
        """See `ports.Bus`."""
        self._wanted.discard(source)
        await self._change(source)

    async def resume(self, source: str) -> None:
        """See `ports.Bus`."""
        self._wanted.add(source)
        await self._change(source)

    async def serve(self, actions: Sequence[str], settings: BusSettings) -> None:
        """Have other actions: their queues are declared, now where the broker is there, else when it is again.

        Args:
            actions: as in the constructor. Those that are consumed stay so until `pause`.
            settings: flow control, from the next session on.

        Raises:
            BrokerError: it refuses a queue. Nothing has changed then.
        """
        topology = self._needed(actions, settings)
        session = self._session if topology != self._topology else None
        if session is not None and not session.is_broken and self._connected.is_set():
            try:
                async with asyncio.timeout(_SET_UP_S):
                    await session.declare(topology)
            except Exception as error:  # noqa: BLE001  refused, or the session is breaking: the next one declares it
                if (refusal := meaning(error, self._where)) is not None:
                    raise refusal from None
                log.debug("declaration_lost", reason=reason(error))
        self._topology, self._settings = topology, settings
        # Those of actions that are gone stay: they may be consumed still.
        self._queues |= queues_of(self._names, actions, self._ledger)

    async def bind(self, queue: str, exchange: str, routing_keys: Iterable[str]) -> None:
        """Let what is published with these keys come into a queue, from now on and after each reconnection.

        Raises:
            ConnectionError: the connection was lost meanwhile: the next one has them.
        """
        keys = set(routing_keys)
        self._bindings.setdefault((queue, exchange), set()).update(keys)
        await self._connected.wait()
        session = self._session
        if session is None or session.is_broken:
            raise ConnectionError("the connection to the broker was lost")
        try:
            await session.bind(queue, exchange, sorted(keys))
        except Exception as error:  # noqa: BLE001  the client raises what it likes; the session is no good any more
            await session.discard()
            raise ConnectionError(reason(error)) from None

    async def stop(self) -> None:
        """End the session in good order; `run` returns then."""
        self._stopping = True
        self._wanted.clear()
        session, self._session = self._session, None
        if session is not None and not session.is_broken:
            await session.stop()

    async def stop_requests(self) -> None:
        """Let no more requests for jobs come; what concerns those that run still comes."""
        for source in [source for source in self._wanted if group_of(source) != source]:
            await self.pause(source)

    async def stop_consuming(self) -> None:
        """Let no more deliveries come, from any source."""
        for source in list(self._wanted):
            await self.pause(source)

    def _needed(self, actions: Sequence[str], settings: BusSettings) -> Topology:
        return Topology.of(
            self._names,
            actions,
            settings.queue_type,
            self._ledger,
            watches_only=self._watches_only,
            coordinates=self._coordinates,
        )

    async def _change_all(self) -> None:
        """What was paused or resumed while the session was set up."""
        for source in self._queues:
            await self._change(source)

    async def _change(self, source: str) -> None:
        async with self._changing:
            session = self._session
            if session is None or session.is_broken:
                return
            try:
                if source in self._wanted:
                    await self._consume(session, source)
                else:
                    await session.cancel(source)
            except Exception as error:  # noqa: BLE001  the session is breaking; the next one does what is wanted
                log.debug("consumer_change_lost", source=source, reason=reason(error))
                await session.discard()

    async def _consume(self, session: Session, source: str) -> None:
        keeper = self._keepers.get(source)
        if keeper is not None and not await keeper.is_ours(session):
            return
        if source == WATCHED:
            wanted = {WATCHED_HEADER: self._ledger}
            await session.listen(source, self._queues[source], self._names.watched, wanted)
            return
        await session.consume(source, self._queues[source])


async def _let_go(session: Session) -> None:
    """Close what is left of a session; one whose socket takes nothing any more is not waited for."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LET_GO_S):
            await session.discard()
