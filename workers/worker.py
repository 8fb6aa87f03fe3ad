"""The worker: pulls while slots are free, runs attempts, says what it is doing, drains when told to. It knows no provider."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import msgspec
import structlog

from bus.connection import BusUnavailable, Connection, Forget, Message
from bus.log import EventLog
from bus.puller import Puller
from bus.streams import await_streams, until_it_answers
from schemas import codec, subjects
from schemas.errors import PenstockError
from schemas.events import INGRESS_LOST
from schemas.ids import IngressId, Nonce, RouteId, WorkerId
from schemas.jobs import (
    PRESENCE_EVERY_S,
    Announce,
    Cancel,
    Cancelled,
    HandedBack,
    Job,
    Presence,
    Resend,
    Take,
    WorkerState,
)
from schemas.settings import ModelSettings, NatsSettings, WorkerSettings
from workers.attempt import Progress, run_attempt
from workers.intake import Intake
from workers.orphans import Orphans, Served
from workers.receipt import receipt
from workers.reporter import KEPT_FOR_S, ORPHAN_KEPT_FOR_S, KeptReports, Outbox, Reporter
from workers.route import Route
from workers.standby import Standby

log = structlog.get_logger()

FLUSH_WAIT_S = 3.0  # for receipts, behind all that a drain may take

NAK = b"-NAK"
NAK_LATER = b'-NAK {"delay": 2000000000}'
NAK_SOON = b'-NAK {"delay": 50000000}'
ACK = b""


@dataclass(frozen=True, slots=True)
class Running:
    """An attempt under way: what is needed to stop it or to hear it again."""

    task: asyncio.Task[None]
    progress: Progress
    report: Reporter
    job: Job


class Worker:
    """Serves *routes* from the queue until `drain`."""

    def __init__(
        self,
        connection: Connection,
        event_log: EventLog,
        routes: list[Route],
        *,
        worker: WorkerId,
        settings: WorkerSettings,
        nats_settings: NatsSettings,
        version: str = "",
    ) -> None:
        self.id = worker
        self._connection = connection
        self._log = event_log
        self._routes = {route.id: route for route in routes}
        self._settings = settings
        self._nats_settings = nats_settings
        self._version = version
        self._started_ns = time.time_ns()
        self._state = WorkerState.GONE
        self._running: dict[Nonce, Running] = {}
        self._kept = KeptReports(asyncio.get_running_loop())
        self._outbox = Outbox(connection)
        self._standby = Standby(time.monotonic)
        self._beat: asyncio.Task[None] | None = None
        self._forget: Forget | None = None
        self._telling: set[asyncio.Task[None]] = set()
        self._orphans = Orphans(connection, self._served, self._stop_for)

    async def start(self) -> None:
        """Raises: ApiError, BusUnavailable; then it has drained."""
        await await_streams(self._connection, self._nats_settings)
        self._outbox.start()
        for subject in (subjects.ctl(self.id), subjects.EVERY_WORKER):
            await self._connection.listen(subject, self._on_command)
        await self.announce()  # whoever had this name before is gone, whether somebody has noticed or not
        self._state = WorkerState.SERVING
        await self._connection.listen(subjects.here(self.id), _nothing)
        await self._orphans.start()
        # Before the routes: whoever takes jobs must be heard, however long NATS lets the next route wait.
        self._forget = self._connection.on_reconnect(self._on_reconnect)
        self._beat = asyncio.create_task(self._announce_regularly(), name="presence")
        try:
            for route in self._routes.values():
                await self._open(route)
        except PenstockError:
            await self.drain()  # the routes that are open have taken jobs by now
            raise
        await self.announce()

    async def add(self, route: Route) -> None:
        """Begins to serve one more route. Raises: ApiError, BusUnavailable."""
        await self._open(route)
        self._routes[route.id] = route
        await self.announce()

    async def offer(self, route_id: RouteId, models: tuple[ModelSettings, ...]) -> None:
        """The route of a pool serves these models from now on. Raises: ApiError, BusUnavailable."""
        route = self._routes[route_id]
        names = tuple(model.name for model in models)
        if route.intake is not None:
            await route.intake.widen(names)
        route.models = models
        await self.announce()
        if route.intake is not None:
            await route.intake.narrow(names)

    async def remove(self, route_id: RouteId) -> None:
        """Serves the route no more, and every ingress hears of it at once. What runs there may finish: see `Route.idle`."""
        route = self._routes.pop(route_id)
        await self.announce()
        if route.intake is not None:
            await route.intake.stop()

    async def drain(self) -> None:
        """No new jobs; what runs may finish within ``drain_s``; the rest is handed back. Then the worker is gone.

        While the log is away its receipts wait for it in what is left of the time that this may take: nobody else has them.
        """
        over_at = asyncio.get_running_loop().time() + 2 * self._settings.drain_s
        self._state = WorkerState.DRAINING
        log.info("draining", running=len(self._running))
        await self.announce()
        await asyncio.gather(*(route.intake.stop() for route in self._routes.values() if route.intake is not None))
        await self._wait_idle(self._settings.drain_s)
        for running in self._running.values():
            self._stop(running, HandedBack(reason="worker_draining"))
        await self._wait_idle(self._settings.drain_s)
        await self._orphans.stop()
        await self._flush_log(until=max(over_at, asyncio.get_running_loop().time()) + FLUSH_WAIT_S)
        await self._outbox.stop()  # behind the log: what was lost with a connection is said again once that is back
        if self._forget is not None:
            self._forget()
            self._forget = None
        self._state = WorkerState.GONE
        await self.announce()
        if self._beat is not None:
            self._beat.cancel()
            await asyncio.gather(self._beat, return_exceptions=True)

    def routes(self) -> list[RouteId]:
        return list(self._routes)

    async def announce(self) -> None:
        """Publishes this worker's presence, with the routes that are open or being opened."""
        presence = Presence(
            worker=self.id,
            state=self._state,
            routes=tuple(route.offer() for route in self._routes.values() if route.intake is not None),
            started_ns=self._started_ns,
            version=self._version,
            listens=True,
            waits=True,
        )
        try:
            await self._connection.say(subjects.presence(self.id), codec.encode(presence))
        except BusUnavailable as error:
            log.debug("presence_not_sent", error=error.message)

    async def _announce_regularly(self) -> None:
        while True:
            await asyncio.sleep(PRESENCE_EVERY_S)
            await self.announce()

    async def _open(self, route: Route) -> None:
        def take(msg: Message, puller: Puller) -> None:
            self._on_delivery(route, msg, puller)

        intake = Intake(
            self._connection,
            route.id,
            slots=route.slots,
            nats_settings=self._nats_settings,
            take=take,
            pool=route.pool,
        )
        route.intake = intake
        route.provider.throttle(lambda reason: self._hold(route, reason))
        route.provider.attach(lambda reason: self._tell(route, reason))
        try:
            await until_it_answers(lambda: intake.start(route.names()))
        except PenstockError:
            await intake.stop()
            raise

    def _tell(self, route: Route, reason: str | None) -> None:
        """The route can't serve, for *reason*, or can again: it pulls or doesn't, and every ingress hears of it at once."""
        if route.down == reason:
            return
        slots = route.provider.slots() if reason is None else None
        if slots is not None and slots != route.slots:
            route.resize(slots)
        if reason is None:
            log.info("route_up", route=route.id, slots=route.slots)
        else:
            log.info("route_down", route=route.id, reason=reason)
        route.down = reason
        self._changed(route)
        self._admit_standby(route)

    def _hold(self, route: Route, reason: str | None) -> None:
        """The route's jobs are to wait in the queue, for *reason*, where another worker may take them; or needn't any more."""
        if route.held != reason:
            log.info("route_held" if reason else "route_released", route=route.id, reason=reason)
            route.held = reason
            self._changed(route)

    def _changed(self, route: Route) -> None:
        if route.intake is not None:
            (route.intake.pause if route.down or route.held else route.intake.resume)()
        task = asyncio.create_task(self.announce())
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    def _on_delivery(self, route: Route, msg: Message, puller: Puller) -> None:
        assert route.intake is not None  # noqa: S101 - it is where the delivery comes from
        try:
            job = codec.decode_job(msg.data)
        except msgspec.MsgspecError:
            # A newer release wrote it: leave it to a worker that can read it, but don't take it again at once.
            log.warning("job_unreadable", subject=msg.subject)
            self._outbox.put(msg.reply, b'-NAK {"delay": 1000000000}')
            route.intake.returned(puller)
            return
        if self.id in job.not_workers:
            # It failed here; another worker of the route is to have it.
            self._outbox.put(msg.reply, NAK_SOON)
            route.intake.returned(puller)
            return
        if job.nonce in self._running or self._kept.get(job.nonce) is not None:
            # Delivered again because the ack was lost on its way: it is being done here, or was.
            self._outbox.put(msg.reply, ACK)
            route.intake.returned(puller)
            return
        if self._state is not WorkerState.SERVING or route.free <= 0 or route.down is not None:
            self._outbox.put(msg.reply, NAK)
            (route.intake.refused if route.free <= 0 else route.intake.returned)(puller)
            return
        if self._orphans.is_one(job):
            self._outbox.put(msg.reply, NAK_LATER)  # so it comes again if its ingress does, or expires
            route.intake.returned(puller)
            return
        if not route.provider.admit(job):
            self._outbox.put(msg.reply, NAK_SOON)  # to another worker, or to this one when its limits allow
            route.intake.returned(puller)
            return
        route.take_slot()
        route.intake.taken(puller, free=route.free)
        # Started and right behind it the ack: from Started on the ingress owns recovery, and only what was never started is
        # delivered again. The other way round, a worker killed between the two would take the job with it.
        self._begin(route, job)
        self._outbox.put(msg.reply, ACK)

    def _take(self, job: Job, *, wait_s: float) -> None:
        """Begins a job that comes from its ingress directly, now or when there is a slot, or says at once that it can't."""
        if job.nonce in self._running or self._kept.get(job.nonce) is not None:
            return  # said twice, or the queue was faster
        route = self._routes.get(job.route)
        if route is not None and self._has_room(route) and _may_have(self.id, job, route):
            self._begin_unasked(route, job)
        elif wait_s > 0:
            if route is not None and job.continuation is not None:  # one that has not begun has its place in the queue
                self._standby.join(job, for_s=wait_s)
        else:
            report = self._reporter(job)
            report.ended(HandedBack(reason="no_free_slot"))
            self._kept.add(report)

    def _has_room(self, route: Route) -> bool:
        return self._state is WorkerState.SERVING and route.free > 0 and route.down is None

    def _begin_unasked(self, route: Route, job: Job) -> None:
        """Begins a job that the queue's pullers did not ask for: it takes a slot that they had asked for."""
        route.take_slot()
        if route.intake is not None:
            route.intake.lent()
        self._begin(route, job)

    def _admit_standby(self, route: Route) -> None:
        """Whoever waits at this worker gets the slots that are free."""
        while self._has_room(route) and (job := self._standby.take(route.id)) is not None:
            self._begin_unasked(route, job)

    def _begin(self, route: Route, job: Job) -> None:
        """Says Started and runs the attempt; its slot is taken."""
        progress, report = Progress(), self._reporter(job)
        # Its first step, which asks the engine, comes before Started is sent.
        task = asyncio.create_task(self._serve(route, job, report, progress))
        report.started()
        # A callback and not the task's own finally: a task that is cancelled before its first step runs none of its body.
        task.add_done_callback(lambda _: self._free(route, job.nonce, report))
        self._running[job.nonce] = Running(task, progress, report, job)

    def _reporter(self, job: Job) -> Reporter:
        return Reporter(job, self._outbox, worker=self.id, max_kept_bytes=self._settings.max_kept_bytes)

    async def _serve(self, route: Route, job: Job, report: Reporter, progress: Progress) -> None:
        try:
            outcome = await run_attempt(job, provider=route.provider, report=report, progress=progress)
            self._log.note(receipt(job, route, report, progress, outcome, worker=self.id, producer=self._log.producer))
        except PenstockError as error:
            log.error("receipt_lost", request_id=job.request_id, epoch=job.epoch, error=error.message)
        except Exception:
            log.exception("receipt_broke", request_id=job.request_id, epoch=job.epoch)

    def _free(self, route: Route, nonce: Nonce, report: Reporter) -> None:
        orphan = self._running.pop(nonce).progress.stop == Cancelled(reason=INGRESS_LOST)
        self._kept.add(report, for_s=ORPHAN_KEPT_FOR_S if orphan else KEPT_FOR_S)
        route.free_slot()
        waiting = self._standby.take(route.id) if self._has_room(route) else None
        if waiting is not None:  # the slot is handed on, and the queue's pullers know nothing of it
            route.take_slot()
            self._begin(route, waiting)
        elif route.intake is not None:
            route.intake.freed()

    async def _on_command(self, msg: Message) -> None:
        try:
            command = codec.decode_command(msg.data)
        except msgspec.MsgspecError:
            log.warning("command_unreadable", subject=msg.subject)
            return
        match command:
            case Cancel(nonce=nonce, reason=reason):
                if running := self._running.get(nonce):
                    self._stop(running, Cancelled(reason=reason))
                else:
                    self._standby.leave(nonce)
            case Resend(nonce=nonce, seq=seq):
                found = self._running.get(nonce)
                report = found.report if found is not None else self._kept.get(nonce)
                if report is not None:
                    report.resend(seq)
            case Take(job=job, wait_s=wait_s):
                self._take(job, wait_s=wait_s)
            case Announce():
                await self.announce()

    def _served(self) -> list[Served]:
        return [Served(running.job, running.progress.began) for running in self._running.values()]

    def _stop_for(self, ingress: IngressId) -> None:
        """Stops what runs for an ingress that is gone."""
        for running in [running for running in self._running.values() if running.job.ingress == ingress]:
            self._stop(running, Cancelled(reason=INGRESS_LOST))

    def _stop(self, running: Running, why: Cancelled | HandedBack) -> None:
        if running.progress.stop is None:
            running.progress.stop = why
            # One that hasn't begun sees it then, and says so; cancelled before its first step it would say nothing.
            if running.progress.entered:
                running.task.cancel()

    async def _on_reconnect(self) -> None:
        """Frames may have been lost with the connection. The last one of an attempt would never be missed, so it is said again."""
        await self.announce()
        for report in (*(running.report for running in self._running.values()), *self._kept):
            report.repeat_last()

    async def _flush_log(self, *, until: float) -> None:
        try:
            async with asyncio.timeout_at(until):
                await self._log.flush()
        except TimeoutError:
            log.error("receipts_not_recorded_in_time", waiting=self._log.waiting)

    async def _wait_idle(self, timeout_s: float) -> None:
        tasks = [running.task for running in self._running.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)


async def _nothing(_: Message) -> None:
    """What is said there is of no interest; that somebody listens is."""


def _may_have(worker: WorkerId, job: Job, route: Route) -> bool:
    """An answer that has begun was admitted once. One that has not is as any job of the queue."""
    if job.continuation is not None:
        return True
    return worker not in job.not_workers and route.held is None and route.provider.admit(job)
