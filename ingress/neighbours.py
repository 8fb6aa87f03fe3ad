"""Answers that another ingress has: found by asking all of them, and fetched piece by piece.

Whoever asks waits for the next piece before it asks on, so that a client's slowness holds nothing but its own reader back, and
whoever has the answer keeps nothing for who asks: only that somebody is attached to the request, until it hasn't asked for a while.
"""

from __future__ import annotations

import asyncio

import msgspec
import structlog
from starlette.types import Receive

from bus.connection import BusUnavailable, Connection, Message
from ingress.archive import Archive
from ingress.reader import Reader
from ingress.transcript import Owner, Transcript
from schemas import codec, subjects
from schemas.again import Ask, Page
from schemas.errors import AnswerNotFound, AnswerNotKept, BadRequest, PenstockError, QueueUnavailable
from schemas.ids import IngressId, RequestId

log = structlog.get_logger()

FIND_WAIT_S = 1.0  # for the one that has it to say so, which it does at once; the others say nothing
HOLD_S = 1.0  # how long it waits for something to tell, asked for more
ANSWER_WAIT_S = HOLD_S + 2.0
LEASE_S = ANSWER_WAIT_S + 1.0  # for the next question; then whoever asked is gone
PAGE_BYTES_MAX = 4 * 1024 * 1024  # as base64 it has to fit into a message
ANSWERING_MAX = 1024  # questions at once; more get no answer


class Neighbours:
    def __init__(self, connection: Connection, ingress: IngressId) -> None:
        self._connection = connection
        self._ingress = ingress
        self._archive: Archive | None = None
        self._answering: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        for subject in (subjects.EVERY_INGRESS, subjects.again(self._ingress)):
            await self._connection.listen(subject, self._on_ask)

    def tell_of(self, archive: Archive) -> None:
        """From here on, others are told what *archive* has."""
        self._archive = archive

    async def find(self, owner: Owner, request_id: RequestId, *, after: int) -> FarReader:
        """A reader of what another ingress has. Raises: AnswerNotFound, AnswerNotKept, BadRequest, QueueUnavailable."""
        ask = Ask(request_id=request_id, org=owner.org, key_id=owner.key_id, after=after)
        try:
            return await self._read(ask, subjects.EVERY_INGRESS, within_s=FIND_WAIT_S)
        except AnswerNotFound:
            if not self._connection.is_up:  # nobody could be asked: it may be there
                raise QueueUnavailable from None
            raise

    async def read(self, ask: Ask, ingress: IngressId) -> FarReader:
        """A reader of what *ingress* has. Raises: AnswerNotFound, also if it is gone; AnswerNotKept, BadRequest."""
        return await self._read(ask, subjects.again(ingress), within_s=ANSWER_WAIT_S)

    async def _read(self, ask: Ask, subject: str, *, within_s: float) -> FarReader:
        try:
            return FarReader(self, ask, await self.ask(ask, subject, within_s=within_s))
        except BusUnavailable as error:
            raise AnswerNotFound from error

    async def ask(self, ask: Ask, subject: str, *, within_s: float = ANSWER_WAIT_S) -> Page:
        """Raises: BusUnavailable, AnswerNotFound, AnswerNotKept, BadRequest."""
        answer = await self._connection.request(subject, codec.encode(ask), timeout_s=within_s)
        page = codec.decode_page(answer.data)
        if page.refused == BadRequest.code:
            raise BadRequest(page.message)
        if page.refused == AnswerNotFound.code:
            raise AnswerNotFound
        if page.refused is not None:
            raise AnswerNotKept
        return page

    async def _on_ask(self, msg: Message) -> None:
        if len(self._answering) < ANSWERING_MAX:
            task = asyncio.create_task(self._answer(msg))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

    async def _answer(self, msg: Message) -> None:
        sought = msg.subject == subjects.EVERY_INGRESS
        try:
            page = await self._page(codec.decode_ask(msg.data), hold_s=0.0 if sought else HOLD_S)
        except AnswerNotFound as error:
            if sought:
                return  # it may be another's
            page = self._refusal(error)
        except PenstockError as error:
            page = self._refusal(error)
        except msgspec.MsgspecError:
            log.warning("ask_unreadable")
            return
        try:
            await self._connection.say(msg.reply, codec.encode(page))
        except BusUnavailable as error:
            log.debug("page_not_sent", error=error.message)

    async def _page(self, ask: Ask, *, hold_s: float) -> Page:
        """What there is, waited for until *hold_s* is over if there is nothing. Raises: AnswerNotFound, AnswerNotKept, BadRequest."""
        if self._archive is None:
            raise AnswerNotFound
        transcript = self._archive.find(Owner(ask.org, ask.key_id), ask.request_id)
        transcript.check(ask.after)
        reader = Reader(transcript, after=ask.after)
        asyncio.get_running_loop().call_later(LEASE_S, reader.close)
        body, ended = b"", False
        try:
            async with asyncio.timeout(hold_s):
                if ask.claimed:
                    await self._check_claim(self._archive, transcript)
                await reader.begun()
                body = await reader.next()
                ended = not body
        except TimeoutError:
            pass
        if len(body) > PAGE_BYTES_MAX:
            raise AnswerNotKept
        return Page(
            ingress=self._ingress,
            status=transcript.status,
            headers=tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in transcript.headers),
            body=body,
            last=reader.after,
            ended=ended or (transcript.ended and reader.after == transcript.last),
            over=transcript.ended,
        )

    async def _check_claim(self, archive: Archive, transcript: Transcript) -> None:
        """A request that is being cancelled is waited for. Raises: AnswerNotFound if its key is free."""
        if transcript.is_deserted:
            await transcript.over()
        if not archive.is_claimed(transcript.request_id):
            raise AnswerNotFound

    def _refusal(self, error: PenstockError) -> Page:
        return Page(ingress=self._ingress, refused=error.code, message=error.message)


class FarReader:
    """As `ingress.reader.Reader`, of a transcript that another ingress has; *page* is its first piece."""

    near = False

    def __init__(self, neighbours: Neighbours, ask: Ask, page: Page) -> None:
        self.gone = False
        self.told_status = False
        self.untold = b""
        self.running = not page.over
        self._neighbours = neighbours
        self._ask = ask
        self._subject = subjects.again(page.ingress)
        self._page: Page = page
        self._read = False  # what is in the present piece

    @property
    def status(self) -> int:
        return self._page.status

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self._page.headers]

    @property
    def request_id(self) -> RequestId:
        return self._ask.request_id

    @property
    def last(self) -> int:
        """The last event in what was read."""
        return self._page.last

    async def listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone = True

    async def begun(self) -> bool:
        while not self._page.status and not self.gone:
            await self.wait()
        return not self.gone

    async def wait(self) -> None:
        """Asks on, once. Raises: AnswerNotKept, also if who has it is gone: its client is cut off, and may ask again."""
        after = self._page.last if self._page.body else self._ask.after
        # What has begun is read to its end, whatever becomes of its key.
        claimed = self._ask.claimed and not self.status
        self._ask = msgspec.structs.replace(self._ask, after=after, claimed=claimed)
        try:
            self._page = await self._neighbours.ask(self._ask, self._subject)
        except (BusUnavailable, AnswerNotFound, BadRequest) as error:
            raise AnswerNotKept from error
        self._read = False

    async def next(self) -> bytes:
        while not self.gone:
            if self._read:
                if self._page.ended:
                    break
                await self.wait()
            self._read = True
            if self._page.body or self._page.ended:
                return self._page.body
        return b""

    def close(self) -> None:
        """Who has it notices that nobody asks any more."""
