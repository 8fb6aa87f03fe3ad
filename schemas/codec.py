"""One encoder and one decoder for each message type, made once. Canonical bytes are what hashes are taken over."""

from __future__ import annotations

import msgspec

from schemas.again import Ask, Holder, Page
from schemas.frames import AnyFrame
from schemas.jobs import Command, IngressPresence, Job, Presence

_encoder = msgspec.json.Encoder(order="deterministic")

encode = _encoder.encode  # canonical: fields in the order of their definition, keys of mappings sorted
decode_ask = msgspec.json.Decoder(Ask).decode
decode_holder = msgspec.json.Decoder(Holder).decode
decode_page = msgspec.json.Decoder(Page).decode
decode_frame = msgspec.json.Decoder(AnyFrame).decode
decode_job = msgspec.json.Decoder(Job).decode
decode_command = msgspec.json.Decoder(Command).decode
decode_presence = msgspec.json.Decoder(Presence).decode
decode_ingress_presence = msgspec.json.Decoder(IngressPresence).decode
