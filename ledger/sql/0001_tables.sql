-- What the ledger keeps: the log as it was written, the facts that its events state, and how far it has read.
-- No keys and no indexes: the writer sees to uniqueness, and zone maps over time-ordered ids do an index's work.

-- payload has the event's canonical bytes exactly as they were stored in the log: hashes are taken over them.
-- zstd, said here, makes it a third of what DuckDB would choose (docs/adr/0010-payload.md).
CREATE TABLE events (
    log        VARCHAR NOT NULL,
    position   BIGINT  NOT NULL,
    stream_seq BIGINT  NOT NULL,
    id         UUID,
    kind       VARCHAR NOT NULL,
    v          BIGINT,
    ts         TIMESTAMP,
    org        VARCHAR,
    request_id UUID,
    epoch      BIGINT,
    producer   VARCHAR,
    payload    JSON NOT NULL USING COMPRESSION zstd
);

COMMENT ON TABLE events IS 'Every event of the log, exactly once, as it was written. Prompts and answers are never in it.';
COMMENT ON COLUMN events.log IS 'EVENTS (what happened to requests) or CONTROL (what the operator stated).';
COMMENT ON COLUMN events.position IS 'The event''s place in its log: 1, 2, 3, ... without gaps, the same in every replay.';
COMMENT ON COLUMN events.stream_seq IS 'The message of the stream that brought it; a message of EVENTS is a page of events.';
COMMENT ON COLUMN events.id IS 'UUIDv7. NULL where it could not be read.';
COMMENT ON COLUMN events.kind IS 'Such as request.finished. "unreadable" for a line that is no event; its bytes are in the payload.';
COMMENT ON COLUMN events.v IS 'The version of the kind that was written.';
COMMENT ON COLUMN events.ts IS 'When it happened by its producer''s clock, UTC.';
COMMENT ON COLUMN events.org IS 'Whose it is; NULL where it belongs to no org.';
COMMENT ON COLUMN events.request_id IS 'The request it is about; NULL in CONTROL.';
COMMENT ON COLUMN events.epoch IS 'The attempt it is about, from 1; 0 where none is meant.';
COMMENT ON COLUMN events.producer IS 'The process that wrote it.';
COMMENT ON COLUMN events.payload IS 'The whole event: its canonical JSON, byte for byte.';

CREATE SCHEMA facts;

-- Requests under way. The only table beside cursors whose rows go away again: when the request has ended.
CREATE TABLE facts.request_opens (
    position    BIGINT NOT NULL,
    request_id  UUID   NOT NULL,
    org         VARCHAR,
    key_id      VARCHAR,
    model       VARCHAR,
    stream      BOOLEAN,
    accepted_at TIMESTAMP,
    prompt_hash VARCHAR
);

-- One row for each request that is over: request.finished or request.rejected, whichever came first.
CREATE TABLE facts.request_ends (
    position                BIGINT NOT NULL,
    request_id              UUID   NOT NULL,
    org                     VARCHAR,
    key_id                  VARCHAR,
    model                   VARCHAR,
    route                   VARCHAR,
    worker                  VARCHAR,
    status                  VARCHAR NOT NULL,
    http_status             BIGINT,
    code                    VARCHAR,
    stream                  BOOLEAN,
    accepted_at             TIMESTAMP,
    finished_at             TIMESTAMP,
    queue_us                BIGINT,
    first_token_us          BIGINT,
    duration_us             BIGINT,
    prompt_tokens           BIGINT,
    completion_tokens       BIGINT,
    cached_tokens           BIGINT,
    reasoning_tokens        BIGINT,
    audio_prompt_tokens     BIGINT,
    audio_completion_tokens BIGINT,
    cost_pico               BIGINT,
    attempts                BIGINT,
    migrations              BIGINT,
    cached                  BOOLEAN,
    finish_reason           VARCHAR,
    estimated               BOOLEAN,
    prompt_hash             VARCHAR
);

CREATE TABLE facts.attempt_starts (
    position   BIGINT NOT NULL,
    request_id UUID   NOT NULL,
    epoch      BIGINT NOT NULL,
    org        VARCHAR,
    started_at TIMESTAMP,
    route      VARCHAR,
    worker     VARCHAR,
    queue_us   BIGINT
);

CREATE TABLE facts.attempt_losses (
    position   BIGINT NOT NULL,
    request_id UUID   NOT NULL,
    epoch      BIGINT NOT NULL,
    org        VARCHAR,
    lost_at    TIMESTAMP,
    route      VARCHAR,
    worker     VARCHAR,
    code       VARCHAR
);

CREATE TABLE facts.attempt_receipts (
    position          BIGINT NOT NULL,
    request_id        UUID   NOT NULL,
    epoch             BIGINT NOT NULL,
    org               VARCHAR,
    key_id            VARCHAR,
    finished_at       TIMESTAMP,
    route             VARCHAR,
    worker            VARCHAR,
    provider          VARCHAR,
    model             VARCHAR,
    upstream_model    VARCHAR,
    outcome           VARCHAR,
    code              VARCHAR,
    upstream_status   BIGINT,
    upstream_id       VARCHAR,
    first_token_us    BIGINT,
    duration_us       BIGINT,
    prompt_tokens     BIGINT,
    completion_tokens BIGINT,
    cached_tokens     BIGINT,
    reasoning_tokens  BIGINT,
    tokens_sent       BIGINT,
    finish_reason     VARCHAR
);

-- How far each stream has been read; written in the transaction that stores what was read.
CREATE TABLE state.cursors (
    log            VARCHAR NOT NULL,
    last_seq       BIGINT  NOT NULL,
    last_position  BIGINT  NOT NULL,
    stream_created VARCHAR,
    newest_event   UUID,
    newest_end     UUID
);

INSERT INTO state.cursors (log, last_seq, last_position) VALUES ('EVENTS', 0, 0), ('CONTROL', 0, 0);
